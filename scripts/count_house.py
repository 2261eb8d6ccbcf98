"""Counts what a reader of the code meets: files, lines, lengths of functions, reflection, and the files on the way of one step.

    python scripts/count_house.py            # counts by reading the source, in a second
    python scripts/count_house.py --trace    # also runs a small prune and a small rank search, and counts the files they pass through

A file is on the way of a step if one of its functions is called while the step runs; what is only imported does not count. Reflection is
every call of ``hasattr``, ``getattr`` and ``isinstance``. Lengths of functions are without decorators.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SOURCE = Path(__file__).parents[1] / "src" / "regraft"
REFLECTION = ("hasattr", "getattr", "isinstance")
TEXT = "\n\n".join(f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(200))


def trees() -> dict[Path, tuple[str, ast.Module]]:
    """Returns the text and the syntax tree of every file of the package."""
    found: dict[Path, tuple[str, ast.Module]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found[path] = (text, ast.parse(text))
    return found


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields every function of a file, methods and inner ones included."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns how many parameters a function has, without ``self`` and ``cls``."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def read_counts() -> Iterator[tuple[str, str]]:
    """Yields what can be counted by reading, with its name."""
    found = trees()
    lines = [len(text.splitlines()) for text, _ in found.values()]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for _, tree in found.values() for node in functions(tree)]
    most = max(parameters(node) for _, tree in found.values() for node in functions(tree))
    called = Counter(
        node.func.id
        for _, tree in found.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFLECTION
    )
    each = " + ".join(f"{name} {1000 * called[name] / sum(lines):.2f}" for name in REFLECTION)
    over = sum(length > 60 for length in lengths)
    yield "files / lines", f"{len(lines)} / {sum(lines):,}"
    yield "reflection per 1,000 lines", f"{1000 * called.total() / sum(lines):.1f} ({each})"
    yield "file length mean / max", f"{statistics.mean(lines):.0f} / {max(lines)}"
    yield (
        "function length mean / median / max",
        f"{statistics.mean(lengths):.1f} / {statistics.median(lengths):.0f} / {max(lengths)}",
    )
    yield "functions above 60 lines", f"{over} of {len(lengths)} ({100 * over / len(lengths):.1f} %)"
    yield "most parameters", str(most)


def files_on_the_way(step: Callable[[], Any]) -> list[str]:
    """Runs a step and returns the files of the package whose functions it calls, module bodies left out."""
    root, seen = f"{SOURCE}/", set[str]()

    def see(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and code.co_name != "<module>":
            seen.add(code.co_filename.removeprefix(root))

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        step()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # pyright: ignore[reportArgumentType]
    return sorted(seen)


def steps(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields a prune of the embedded model and a search of ranks for it, small ones, by name."""
    from regraft.pipelines.prune.prune import prune
    from regraft.pipelines.ranks.allocate import allocate_ranks
    from regraft.settings import AllocateSettings, PruneSettings, RecoverSettings

    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    pruning = PruneSettings(calibration=text, samples=8, seq_len=16)
    yield "one prune, all by default", lambda: prune("seedling", folder / "pruned", pruning)
    training = RecoverSettings(data=text, steps=20, batch=1, seq_len=16, eval_every=20, held_out_windows=2, quiet=True)
    search = AllocateSettings(trials=2, samples=2, elastic=0, confirm_seeds=0, budget="r=4", ranks=(2, 4, 6))
    yield "one search of ranks", lambda: allocate_ranks("seedling", folder / "ranks.json", search, training)


def main() -> None:
    """Prints the counts as a Markdown table, and below it the files on the way."""
    parser = argparse.ArgumentParser(description="Count what a reader of the code meets.")
    parser.add_argument("--trace", action="store_true", help="also count the files on the way of a prune and of a search of ranks")
    given = parser.parse_args()
    print("| | regraft |\n|---|---:|")
    for name, value in read_counts():
        print(f"| {name} | {value} |")
    if not given.trace:
        return
    lists: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, step in steps(Path(folder)):
            files = files_on_the_way(step)
            rooms = len({file.split("/")[0] for file in files})
            print(f"| files on the way of {name} | {len(files)} in {rooms} rooms |", flush=True)
            lists.append(f"\n{name}: {', '.join(files)}")
    print("\n".join(lists))


if __name__ == "__main__":
    main()
