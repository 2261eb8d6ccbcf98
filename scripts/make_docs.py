"""Writes what is made from the code: ``docs/commands.md``, the table in ``docs/export.md`` and the recipe that explains every key.

The table names the tests that prove its rows, which carry the mark ``exports``; a row that is declared as run and has none is an error.

Run it after a change of options or settings (``make docs``); ``--check`` only says whether they are up to date, as the tests do.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from regraft.cli.app import COMMANDS, load_command
from regraft.cli.examples import EXAMPLES
from regraft.export import EXPORTERS
from regraft.export.contract import Holding
from regraft.pipelines.run.recipe import SECTIONS, Recipe
from regraft.settings import Settings

ROOT = Path(__file__).parents[1]
COMMANDS_PAGE = ROOT / "docs" / "commands.md"
EXPORT_PAGE = ROOT / "docs" / "export.md"
EXPLAINED_RECIPE = ROOT / "src" / "regraft" / "recipes" / "prune-recover.yaml"
WIDTH = 120
TABLE_STARTS, TABLE_ENDS = "<!-- made from the exporters' declarations by scripts/make_docs.py -->", "<!-- end -->"


def commands_page() -> str:
    """Returns the page of all commands and their options, in Markdown."""
    lines = [
        "# Commands",
        "",
        "Made from the commands' help by `scripts/make_docs.py`; do not edit by hand.",
        "",
        "Exit codes: 0 done; 2 something that you can mend, said in one line on the standard error; 128 and the number of the signal that",
        "ended the command (130 for Ctrl-C, 143 for a termination); 70 a fault of ours, with the file of its full trace.",
        "`regraft doctor` gives 1 when something that is needed is not there.",
        "",
        "Completion of commands and options in bash, zsh, fish and PowerShell: `regraft --install-completion`.",
        "",
    ]
    lines += [f"- [`regraft {name}`](#regraft-{name}): {summary}" for name, summary in COMMANDS.items()]
    for name in COMMANDS:
        lines += ["", *_command(name)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Mark:
    """What a test proves: ``@pytest.mark.exports("gguf", "deci, openelm", "query heads", "F32")``.

    Attributes:
        form: Name of the format.
        rows: Names of rows of the format.
        facts: Shapes of these rows, and number types, which count for all rows.
        file: Name of the test's file.
    """

    form: str
    rows: tuple[str, ...]
    facts: tuple[str, ...]
    file: str


def marks(folder: Path) -> list[Mark]:
    """Returns the marks ``exports`` of all tests in a folder, read without importing them."""
    found: list[Mark] = []
    for file in sorted(folder.rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "pytest.mark.exports(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.exports":
                form, rows, *facts = (str(ast.literal_eval(argument)) for argument in node.args)
                found.append(Mark(form, tuple(rows.split(", ")), tuple(facts), file.name))
    return found


def facts_of(row: Holding) -> dict[str, tuple[str, ...]]:
    """Returns the shapes and the number types of a row, each with the rows whose tests count for it; none for those of all rows."""
    shapes = re.split(r"[,;] ", row.uneven) if row.uneven else ["equal layers"]
    return dict.fromkeys(row.numbers.split(", "), ()) | dict.fromkeys(shapes, (row.name,))


def proved_by(form: str, row: Holding, found: Sequence[Mark]) -> dict[str, set[str]]:
    """Returns the files of the tests that prove each shape and number type of a row; an empty set where none does."""
    return {
        fact: {mark.file for mark in found if mark.form == form and fact in mark.facts and (not rows or set(rows) & set(mark.rows))}
        for fact, rows in facts_of(row).items()
    }


def complaints(formats: Mapping[str, Sequence[Holding]], found: Sequence[Mark]) -> Iterator[str]:
    """Yields a line for each shape and number type that is declared as run without a test's mark, and for each mark of none declared."""
    for form, rows in formats.items():
        for row in rows:
            lacking = [fact for fact, files in proved_by(form, row, found).items() if not files and row.proof.startswith("run")]
            yield from (f"{form} {row.name} declares '{fact}' as run, and no test has the mark exports for it" for fact in lacking)
    for mark in found:
        declared = [facts_of(row) for row in formats.get(mark.form, ()) if row.name in mark.rows]
        idle = [fact for fact in mark.facts if not any(fact in facts for facts in declared)]
        yield from (f"{mark.file} has the mark exports for {mark.form}: '{fact}', which is not declared" for fact in idle)
        yield from () if len(declared) == len(mark.rows) else (f"{mark.file} has the mark exports for rows that are not declared",)


def export_page() -> str:
    """Returns the page on exports: written text, with the table that the exporters declare in the place of its mark."""
    found = marks(ROOT / "tests")
    text = EXPORT_PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE_STARTS)
    _, _, after = rest.partition(TABLE_ENDS)
    lines = ["", "| format | loaded by | families | layers may differ in | numbers | lost | proof |", "|---|---|---|---|---|---|---|"]
    for name in EXPORTERS:
        for row in EXPORTERS.get(name).holds:
            files = sorted(set().union(*proved_by(name, row, found).values()))
            proof = row.proof + (f": {', '.join(files)}" if files else "")
            cells = (f"`{name}`", row.runtime, row.families, row.uneven or "nothing", row.numbers, row.lost, proof)
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return before + TABLE_STARTS + "\n".join(lines) + "\n" + TABLE_ENDS + after


def command_page(name: str) -> str:
    """Returns the page of one command, for the site."""
    first, *rest = _command(name)
    return "\n".join([first.removeprefix("#"), *rest]) + "\n"


def _command(name: str) -> list[str]:
    command = load_command(name)
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [
        parameter
        for parameter in command.params
        if parameter.param_type_name == "option" and parameter.name != "help" and not parameter.hidden
    ]
    usage = " ".join(argument.metavar if argument.required else f"[{argument.metavar}]" for argument in arguments)
    help_lines = [line.strip() for line in (command.help or "").splitlines()]
    lines = [f"## regraft {name}", "", *help_lines, "", "```", f"regraft {name} {usage} [OPTIONS]".replace("  ", " "), "```", ""]
    lines += ["```", *EXAMPLES[name], "```", ""]
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "", []).append(option)
    if arguments:
        lines += ["| argument | |", "|---|---|", *(f"| `{entry.metavar}` | {_cell(entry.help)} |" for entry in arguments), ""]
    for panel, members in panels.items():
        lines += [*([f"**{panel}**", ""] if panel else []), "| option | | default |", "|---|---|---|"]
        lines += [f"| `{_option(entry)}` | {_cell(entry.help)} | {_default(entry)} |" for entry in members]
        lines.append("")
    return lines[:-1] if lines[-1] == "" else lines


def _option(entry: Any) -> str:
    names = ", ".join(entry.opts) + ("/" + "/".join(entry.secondary_opts) if entry.secondary_opts else "")
    return _cell(names if entry.is_flag else f"{names} {entry.metavar}")


def _default(entry: Any) -> str:
    if entry.required:
        return "required"
    if entry.default is None or entry.default is False or entry.default == ():
        return ""
    if entry.default is True:
        return f"`{entry.opts[0]}`"
    value = entry.default
    return f"`{','.join(str(part) for part in value) if isinstance(value, list | tuple) else value}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ")


def explained_recipe() -> str:
    """Returns a recipe with every key at its default, each with its description."""
    lines = [
        "# Prune a model, win the loss back, measure. Every key is here, at its default, to be copied and changed:",
        "# leave out what you do not need; leave out a whole section to leave out its stage. Paths are relative to the",
        "# current directory. Change single keys without a copy:  regraft run prune-recover model=PATH prune.ratio=0.3",
        "# Made from the settings by scripts/make_docs.py.",
        "",
    ]
    given = {"description": "every key at its default, to copy", "model": "seedling"}
    for name, field in Recipe.model_fields.items():
        if name not in SECTIONS:
            lines += _key(name, given.get(name, field.default), field.description or "", "")
    for name, section in SECTIONS.items():
        written = [f"{name}:", *_section(section)]
        note = f"# {Recipe.model_fields[name].description}"
        if name == "compress":  # excludes allocate, which is here too
            note += "; take the signs away, and leave allocate out"
            written = [f"# {line}" for line in written]
        lines += ["", note, *written]
    return "\n".join(lines) + "\n"


def _section(section: type[Settings]) -> list[str]:
    return [line for name, field in section.model_fields.items() for line in _key(name, field.default, field.description or "", "  ")]


def _key(name: str, value: Any, description: str, indent: str) -> list[str]:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=WIDTH, allow_unicode=True).splitlines()[0]
    line = f"{indent}{name}: {text}"
    return [f"{line:<32}  # {description}"]


def main() -> int:
    """Writes the pages, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page is out of date")
    wanted = {COMMANDS_PAGE: commands_page(), EXPLAINED_RECIPE: explained_recipe(), EXPORT_PAGE: export_page()}
    unproved = list(complaints({name: EXPORTERS.get(name).holds for name in EXPORTERS}, marks(ROOT / "tests")))
    if unproved:
        print(*unproved, sep="\n", file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if parser.parse_args().check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run scripts/make_docs.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
