"""The pages that are made from the code are as the code would make them."""

from __future__ import annotations

import re
import runpy
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import fresh
from regraft.export.contract import Holding
from regraft.pipelines.run.recipe import SECTIONS, Recipe, read_recipe

ROOT = Path(__file__).parents[2]


def test_commands_and_the_explained_recipe_are_up_to_date() -> None:
    done = fresh.run(["scripts/make_docs.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, done.stderr + "\nrun: python scripts/make_docs.py"


def test_a_row_without_a_test_and_a_mark_without_a_row_are_found() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))
    complaints, mark = made["complaints"], made["Mark"]
    row = Holding("a program", "a family", "heads, width", "F32, Q8_0", "nothing", "run", "one")
    proved = [mark("a", ("one",), ("heads", "F32"), "test_a.py"), mark("a", ("one",), ("width", "Q8_0"), "test_b.py")]
    assert list(complaints({"a": (row,)}, proved)) == []
    assert list(complaints({"a": (row,)}, proved[:1])) == [
        "a one declares 'Q8_0' as run, and no test has the mark exports for it",
        "a one declares 'width' as run, and no test has the mark exports for it",
    ]
    # Number types count for all rows of a format, shapes for their own, and what is checked by rules needs no test.
    other = replace(row, name="two")
    assert [line.partition(",")[0] for line in complaints({"a": (row, other)}, proved)] == [
        "a two declares 'heads' as run",
        "a two declares 'width' as run",
    ]
    assert list(complaints({"a": (row, replace(other, proof="rules"))}, proved)) == []
    idle = [*proved, mark("a", ("one",), ("heds",), "test_c.py"), mark("b", ("one",), (), "test_c.py")]
    assert list(complaints({"a": (row,)}, idle)) == [
        "test_c.py has the mark exports for a: 'heds', which is not declared",
        "test_c.py has the mark exports for rows that are not declared",
    ]


def test_the_explained_recipe_has_every_key_at_its_default() -> None:
    recipe = read_recipe("prune-recover")
    for name, section in SECTIONS.items():
        assert getattr(recipe, name) == (section() if name != "compress" else None)  # as a comment: it excludes allocate
    text = (ROOT / "src" / "regraft" / "recipes" / "prune-recover.yaml").read_text(encoding="utf-8")
    keys = [*Recipe.model_fields, *(key for section in SECTIONS.values() for key in section.model_fields)]
    assert all(f"{key}:" in text for key in keys)


def test_every_method_has_a_page_in_the_words_of_its_code() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_methods.py"))
    listed = tomllib.loads((ROOT / "src" / "regraft" / "built_in.toml").read_text(encoding="utf-8"))
    assert {(method.kind, method.name) for method in made["methods"]()} >= {
        (kind, name) for kind, names in listed.items() for name in names
    }
    pages = made["pages"]()
    assert {path.name for path in (ROOT / "docs" / "methods").iterdir()} == {path.name for path in pages}
    for path, text in pages.items():
        words, _, figures = path.read_text(encoding="utf-8").partition(made["MEASURED"])
        assert words == text.partition(made["MEASURED"])[0], "run: python scripts/make_methods.py"
        # A benchmark that is run again changes its table before the page; what a page has is a row of that table, or of an older one.
        assert words.count("\n") > 3 or path.name.startswith("export-format"), path.name
        assert figures.strip() or "export-format" in path.name or path.name == "index.md", path.name
    wanda = pages[ROOT / "docs" / "methods" / "criterion-wanda.md"]
    assert "arXiv 2306.11695" in wanda
    assert "FLAP, arXiv" not in wanda  # the entry of another criterion of the same file


@pytest.mark.parametrize("page", ["docs/commands.md"])
def test_every_option_is_on_the_page(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for section in SECTIONS.values():
        if section.__name__ != "SampleSettings":
            assert all(f"--{key.replace('_', '-')}" in text for key in section.model_fields)


def test_the_picture_of_the_architecture_is_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text.partition("src/regraft/\n")[2].partition("```")[0]
    drawn = {line.split()[0].rstrip("/") for line in picture.splitlines() if line.startswith("  ") and line.strip()}
    there = {path.name for path in (ROOT / "src" / "regraft").iterdir() if path.suffix in ("", ".py")}
    assert drawn == there - {"__main__.py", "__pycache__"}


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")))
def test_a_file_that_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|toml|csv|md))`", text)
    assert [name for name in named if not any((ROOT / place / name).exists() for place in ("", "src/regraft", "tests"))] == []
