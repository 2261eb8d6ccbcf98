"""The folders of the unit tests mirror the rooms of the package, so that a reader finds the proof of a room without a search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

UNIT = Path(__file__).parent
SOURCE = Path(__file__).parents[2] / "src" / "regraft"


def folders(root: Path, files: str) -> set[str]:
    """Returns the folders below ``root`` that hold such files directly, as relative paths."""
    return {path.parent.relative_to(root).as_posix() for path in root.rglob(files) if path.parent != root}


def complaints(rooms: set[str], tested: set[str]) -> Iterator[str]:
    """Yields a line for each folder of tests that names no room, and for each room of the package that has no tests."""
    yield from (f"tests/unit/{name} names no room of the package" for name in sorted(tested - rooms))
    covered = {name.partition("/")[0] for name in tested}
    yield from (f"{name} has no tests: make tests/unit/{name}" for name in sorted(rooms) if "/" not in name and name not in covered)


def test_unit_tests_mirror_the_rooms() -> None:
    assert list(complaints(folders(SOURCE, "*.py"), folders(UNIT, "test_*.py"))) == []


def test_a_room_without_tests_and_tests_without_a_room_are_found() -> None:
    rooms = {"data", "groups", "groups/traced"}
    assert list(complaints(rooms, {"data", "groups/traced"})) == []
    assert list(complaints(rooms, {"data"})) == ["groups has no tests: make tests/unit/groups"]
    assert list(complaints(rooms, {"data", "groups", "groups/guessed"})) == ["tests/unit/groups/guessed names no room of the package"]
