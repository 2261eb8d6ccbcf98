"""Writes ``docs/methods``: a page for every method, with its equations, source, departures and measured figures, and the list of them.

The words are those of the module's docstring, where they are read beside the code, and of ``methods.toml``; the figures are rows of the
tables that the benchmarks have written. Nothing of regraft is imported. Run it after a change of a docstring or of results (``make docs``).
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "methods"
MEASURED = "## Measured"
KINDS = {
    "criterion": ("Criteria", "which units matter, for pruning"),
    "selector": ("Selectors", "how many units stay in each layer"),
    "reconstruction": ("Re-fits", "what the rest takes over from what was cut"),
    "allocator": ("Allocators", "a rank for every layer"),
    "adapter": ("Adapters", "what is trained on top of a weight"),
    "compression method": ("Compression", "a linear layer as two thin ones"),
    "choice of ranks": ("Ranks of compression", "how a budget of stored parameters is spent"),
    "completion": ("Completion", "tables with gaps"),
    "export format": ("Export formats", "other programs' files"),
}


@dataclass(frozen=True)
class Method:
    """A method that has a page.

    Attributes:
        kind: Its kind, as in ``built_in.toml``.
        name: Its name.
        module: Module that registers it.
        said: What ``methods.toml`` says of it and of its kind.
        others: Names of the other methods of the module, whose entries in a list are left out.
    """

    kind: str
    name: str
    module: str
    said: dict[str, Any]
    others: frozenset[str] = field(default=frozenset())

    @property
    def page(self) -> str:
        """Name of the page."""
        return f"{self.kind.replace(' ', '-')}-{self.name}.md"


def methods() -> list[Method]:
    """Returns every built-in method, and those of ``methods.toml`` that are in no registry."""
    built_in = tomllib.loads((ROOT / "src" / "regraft" / "built_in.toml").read_text(encoding="utf-8"))
    said = tomllib.loads((ROOT / "scripts" / "methods.toml").read_text(encoding="utf-8"))
    found: list[Method] = []
    for kind in KINDS:
        own = said.get(kind, {})
        common = {key: value for key, value in own.items() if not isinstance(value, dict)}
        named = built_in.get(kind) or {name: entry["module"] for name, entry in own.items() if isinstance(entry, dict)}
        for name, module in named.items():
            others = frozenset(other for other, place in named.items() if place == module and other != name)
            found.append(Method(kind, name, module, common | own.get(name, {}), others))
    return found


def pages() -> dict[Path, str]:
    """Returns the text of every page by its path."""
    found = methods()
    return {FOLDER / "index.md": _index(found)} | {FOLDER / method.page: page(method) for method in found}


def page(method: Method) -> str:
    """Returns the page of a method."""
    place = _file(method.module).relative_to(ROOT / "src" / "regraft").as_posix()
    use = str(method.said.get("use", "")).format(name=method.name)
    lines = [f"# {method.name}", "", f"*{KINDS[method.kind][0]}: {KINDS[method.kind][1]}.* {use}. Code: `{place}`.", ""]
    if "text" in method.said:
        lines += [*str(method.said["text"]).strip("\n").splitlines(), ""]
    lines += [*markdown(docstring(method.module), method.others), ""]
    if "object" in method.said:
        lines += [*markdown(docstring(method.module, method.said["object"])), ""]
    for module in method.said.get("also", []):
        lines += [*markdown(docstring(module)), ""]
    rows = measured(method)
    if rows:
        source, heading = method.said["table"]
        title = next(line for line in _lines(source) if line.startswith("## ") and heading in line)
        lines += [
            MEASURED,
            "",
            f"From `benchmarks/results/{source}`, *{title.removeprefix('## ')}*, where machine and text are named:",
            "",
            *rows,
            "",
        ]
    elif method.kind != "export format":
        lines += [MEASURED, "", "It is in none of the tables from which these pages are made.", ""]
    return "\n".join(lines[:-1]) + "\n"


def docstring(module: str, name: str | None = None) -> str:
    """Returns the docstring of a module, or of a function or class in it up to its sections."""
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    if name is None:
        return inspect.cleandoc(ast.get_docstring(tree) or "")
    node = next(node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name)
    return re.split(r"\n(?:Args|Returns|Raises|Yields|Attributes):\n", inspect.cleandoc(ast.get_docstring(node) or ""))[0].strip()


def markdown(text: str, without: frozenset[str] = frozenset()) -> list[str]:
    r"""Returns a docstring as Markdown, without the entries of a list that are about others.

    >>> markdown("Sums ``|w|`` (:mod:`regraft.x.y`).\n\n* ``a``: one\n  more\n* ``b``: two", frozenset({"a"}))
    ['Sums `|w|` (`x/y.py`).', '', '* `b`: two']
    """
    text = re.sub(r":mod:`~?regraft\.([\w.]+)`", lambda found: f"`{_place(found[1])}`", text)
    text = re.sub(r":(?:func|class|meth):`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r":math:`([^`]*)`", r"`\1`", text).replace("``", "`")
    lines: list[str] = []
    skipping = references = False
    for line in text.splitlines():
        entry = re.match(r"[*] `(\w+)`", line)
        skipping = (entry is not None and entry[1] in without) or (skipping and line.startswith("  "))
        if skipping:
            continue
        references = line == "References:" or (references and (line.startswith("    ") or not line))
        if line == "References:":
            lines += ["References:", ""]
        elif references and line:
            lines += [f"- {line.strip()}" if line.lstrip().startswith("[") and line.startswith("    [") else f"  {line.strip()}"]
        else:
            lines.append(line)
    return lines


def measured(method: Method) -> list[str]:
    """Returns the rows about a method of a table of measured results, with the table's heading; none where it was not measured."""
    if "table" not in method.said:
        return []
    source, heading = method.said["table"]
    names = method.said.get("rows", [method.name])
    column, only = method.said.get("column", 0), method.said.get("only")
    lines = iter(_lines(source))
    for line in lines:
        if line.startswith("## ") and heading in line:
            break
    table = list(_first_table(lines))
    found = [line for line in table[2:] if _cells(line)[column] in names and (only is None or _cells(line)[0] == only)]
    return [*table[:2], *found] if found else []


def _first_table(lines: Iterator[str]) -> Iterator[str]:
    """Yields the lines of the first table, up to the next heading."""
    begun = False
    for line in lines:
        if line.startswith("|"):
            begun = True
            yield line
        elif begun or line.startswith("## "):
            return


def _cells(line: str) -> Sequence[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _lines(source: str) -> list[str]:
    return (ROOT / "benchmarks" / "results" / source).read_text(encoding="utf-8").splitlines()


def _place(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def _file(module: str) -> Path:
    """Returns the file of a module or a package."""
    path = ROOT / "src" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _index(found: Sequence[Method]) -> str:
    lines = [
        "# Methods",
        "",
        "Every method with its equations, its source, where we depart from it and why, and what was measured. Made by",
        "`scripts/make_methods.py` from the code and the results of benchmarks. Which one to take: [Which method](../choosing.md).",
    ]
    for kind, (title, what) in KINDS.items():
        links = ", ".join(f"[{method.name}]({method.page})" for method in found if method.kind == kind)
        lines += ["", f"**{title}** ({what}): {links}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the pages, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page is out of date")
    check = parser.parse_args().check
    wanted = pages()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    gone = sorted(set(FOLDER.glob("*.md")) - set(wanted))
    if check:
        for path in [*stale, *gone]:
            print(f"{path.relative_to(ROOT)} is out of date; run scripts/make_methods.py", file=sys.stderr)
        return 1 if stale or gone else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in gone:
        path.unlink()
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    print(f"wrote {len(stale)} pages, removed {len(gone)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
