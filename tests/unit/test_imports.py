"""The direction of imports: lower rooms never import upper ones, siblings never one another, and nobody imports our code late."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "regraft"

# From the bottom upwards; rooms of one bracket are siblings. The first bracket's rooms may use one another: they are the ground.
BRACKETS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "in_short",
        "plans",
        "progress",
        "registry",
        "settings",
        "atomic",
        "claims",
        "compat",
        "platforms",
        "reading",
        "signals",
        "numerics",
    ),
    ("completion", "models", "data", "seedling"),
    ("groups",),
    ("importance", "selection", "allocation", "adapters", "compression"),
    ("surgery", "streaming"),
    ("training", "search", "evaluation", "export"),
    ("paired", "report", "testing"),
    ("pipelines",),
    ("studio",),
    ("cli",),
)
LEVEL = {room: level for level, bracket in enumerate(BRACKETS) for room in bracket}

# What is needed across a bracket although the picture has no line for it; each with its reason.
ALLOWED = {
    ("models", "seedling"): "loading by the name 'seedling' needs the folder of the embedded model",
    ("data", "seedling"): "the default text is the embedded model's corpus",
    ("streaming", "surgery"): "a layer is cut and re-fitted by the same code, whether or not the rest of the model is in memory",
}


def imports_of(text: str, package: str) -> Iterator[tuple[str, int, bool]]:
    """Yields (module, line, late) for every import of our own code in a file of a package; late ones stand inside a function."""
    tree = ast.parse(text)
    late = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "regraft" else [module]
        yield from ((name, node.lineno, id(node) in late) for name in names if name.split(".")[0] == "regraft")


def breaches(room: str, text: str, package: str = "regraft") -> Iterator[str]:
    """Yields what is wrong with the imports of one file of a room."""
    for module, line, late in imports_of(text, package):
        other = module.split(".")[1] if "." in module else ""
        if late:
            yield f"line {line}: {module} is imported inside a function"
        if not other or other == room:
            continue
        if other not in LEVEL:
            yield f"line {line}: {module} is in no bracket of the architecture; give '{other}' a place in this test"
        elif LEVEL[other] > LEVEL[room]:
            yield f"line {line}: {room} imports {module}, which stands above it"
        elif LEVEL[other] == LEVEL[room] > 0 and (room, other) not in ALLOWED:
            yield f"line {line}: {room} imports its sibling {module}"


def files() -> list[Path]:
    # `__init__` and `__main__` of the package are its doors: they see every room.
    doors = {SOURCE / "__init__.py", SOURCE / "__main__.py"}
    return [path for path in sorted(SOURCE.rglob("*.py")) if path not in doors]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"'{room}' is in no bracket of the architecture"
    package = ".".join(("regraft", *path.relative_to(SOURCE).parts[:-1]))
    assert list(breaches(room, path.read_text(encoding="utf-8"), package)) == []


@pytest.mark.parametrize(
    ("room", "text", "words"),
    [
        ("models", "from regraft.cli.app import main", "stands above"),
        ("selection", "import regraft.importance.taylor", "sibling"),
        ("groups", "def f():\n    from regraft.models import view", "inside a function"),
        ("data", "from regraft import pipelines", "stands above"),
        ("cli", "import regraft.kitchen", "no bracket"),
    ],
)
def test_a_breach_is_found(room: str, text: str, words: str) -> None:
    found = list(breaches(room, text))
    assert len(found) == 1
    assert words in found[0]


def test_relative_imports_are_seen() -> None:
    assert list(breaches("models", "from . import view\nfrom .build import build", "regraft.models")) == []
    assert "stands above" in next(breaches("models", "from ..cli import app", "regraft.models"))


def test_the_ground_may_be_used_by_all() -> None:
    assert list(breaches("numerics", "from regraft.errors import InputError\nimport torch")) == []
    assert list(breaches("cli", "from regraft.pipelines.run.run import run_recipe")) == []
