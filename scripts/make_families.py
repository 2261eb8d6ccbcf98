"""Writes ``docs/families.md`` from what the conformance tests measure; ``--check`` only says whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"


def main() -> int:
    """Writes or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT / "tests"))
    from verdicts import page

    text = page()
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    if not check and not same:
        PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {'up to date' if same else 'differs' if check else 'written'}")
    return int(check and not same)


if __name__ == "__main__":
    sys.exit(main())
