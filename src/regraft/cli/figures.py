"""Figures of a command as JSON: in a file, or alone on the standard output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from regraft.atomic import json_with, reserved_file, write_text

STDOUT = Path("-")


@dataclass(frozen=True)
class Figures:
    """The place that gets the figures of a command.

    Attributes:
        path: A file; ``-`` for the standard output, where nothing else is printed then; None for nowhere.
    """

    path: Path | None

    @property
    def on_screen(self) -> bool:
        """Whether the figures have the standard output for themselves."""
        return self.path == STDOUT

    @contextmanager
    def reserved(self, *names: str) -> Iterator[None]:
        """Claims the file before anything is computed for it, while the block runs.

        Args:
            names: Keys by which a file of such figures is known, which may be replaced.

        Raises:
            OutputError: It holds something else, or cannot be written, or another process is writing it.
        """
        with reserved_file(None if self.on_screen else self.path, json_with(*names)):
            yield

    def write(self, text: str) -> None:
        """Writes a JSON text, with a line end."""
        if self.on_screen:
            print(text)
        elif self.path is not None:
            write_text(self.path, text + "\n")
