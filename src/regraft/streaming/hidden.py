"""Hidden states of the calibration windows between layers, in memory or in a file."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from regraft.errors import OutputError
from regraft.models.weights import memory_of


class HiddenStates(ABC):
    """Storage of hidden states in numbered slots, each float32 (windows, tokens, channels), on the CPU.

    Use it as a context manager: the end of the block frees all slots.
    """

    @abstractmethod
    def put(self, slot: int, first: int, hidden_BTD: Tensor) -> None:
        """Stores the states of consecutive windows, beginning with window ``first``."""

    @abstractmethod
    def get(self, slot: int, first: int, count: int) -> Tensor:
        """Returns the states of ``count`` windows, (count, tokens, channels), perhaps as a view: do not write to them."""

    @abstractmethod
    def drop(self, slot: int) -> None:
        """Frees a slot."""

    @abstractmethod
    def close(self) -> None:
        """Frees all slots."""

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class InMemory(HiddenStates):
    """Hidden states in memory.

    Args:
        shape: (windows, tokens, channels).
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._slots: dict[int, Tensor] = {}

    def put(self, slot: int, first: int, hidden_BTD: Tensor) -> None:
        """Stores the states of consecutive windows, beginning with window ``first``."""
        if slot not in self._slots:
            self._slots[slot] = torch.empty(self._shape)
        self._slots[slot][first : first + hidden_BTD.shape[0]] = hidden_BTD.detach()

    def get(self, slot: int, first: int, count: int) -> Tensor:
        """Returns a view of the states of some windows."""
        return self._slots[slot][first : first + count]

    def drop(self, slot: int) -> None:
        """Frees the memory of a slot."""
        self._slots.pop(slot, None)

    def close(self) -> None:
        """Frees all memory."""
        self._slots.clear()


class OnDisk(HiddenStates):
    """Hidden states in a file that is read and written piece by piece and never mapped.

    Args:
        path: Path of the file, which is created at once and removed by :meth:`close`.
        shape: (windows, tokens, channels).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._path = path
        self._file = path.open("w+b", buffering=0)

    def put(self, slot: int, first: int, hidden_BTD: Tensor) -> None:
        """Writes the states of consecutive windows, beginning with window ``first``."""
        data = memory_of(hidden_BTD.detach().to(device="cpu", dtype=torch.float32).contiguous())
        self._file.seek(self._offset(slot, first))
        while data:
            data = data[self._file.write(data) :]

    def get(self, slot: int, first: int, count: int) -> Tensor:
        """Reads the states of some windows."""
        hidden_BTD = torch.empty(count, *self._shape[1:])
        buffer = memory_of(hidden_BTD)
        self._file.seek(self._offset(slot, first))
        while buffer:
            got = self._file.readinto(buffer)
            if not got:
                raise OutputError(f"'{self._path}' was changed while it was in use; free some space and start again")
            buffer = buffer[got:]
        return hidden_BTD

    def drop(self, slot: int) -> None:
        """Does nothing: the next ``put`` to the slot overwrites it."""

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _offset(self, slot: int, first: int) -> int:
        windows, tokens, channels = self._shape
        return 4 * (slot * windows + first) * tokens * channels


def room_for(path: Path, needed_bytes: int) -> None:
    """Refuses a file that does not fit on the disk.

    Raises:
        OutputError: The free space is too small; the message gives both sizes.
    """
    free_bytes = shutil.disk_usage(path).free
    if needed_bytes > free_bytes:
        raise OutputError(
            f"hidden states of the calibration windows need {needed_bytes / 1e9:.2f} GB on the disk of '{path}', which has "
            f"{free_bytes / 1e9:.2f} GB free; free some space, or use fewer `samples`, a shorter `seq_len` or more `memory`"
        )
