"""Writer of a safetensors file tensor by tensor, so that at most one tensor is in memory, and of any large file in blocks.

The format is described in :mod:`regraft.models.weights`. The writer of the safetensors library needs all tensors of a file at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from regraft.models.weights import memory_of
from regraft.platforms import let_go
from regraft.streaming.hashing import HashingThread

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


# While a file is written, its last bytes up to this many stay in memory; those before are on the disk or on their way.
WINDOW_BYTES = 1 << 27
_STEP_BYTES = 1 << 24


class HashedFile:
    """A new file that is hashed and put on the disk while it is written; use it as a context manager.

    A thread hashes each block while the next one is made, so that the checksum costs no second reading. The disk begins with the first
    blocks, and does not wait for the last: a file larger than memory pushes nothing of other programs out of the page cache.

    Args:
        path: The file; what is there is replaced.

    Attributes:
        sha256: SHA-256 of the file in hexadecimal, once it is closed without an error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._position = self._begun = 0
        self.sha256 = ""

    def __enter__(self) -> HashedFile:
        self._file = self._path.open("wb", buffering=0)
        self._thread = HashingThread()
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Writes a block, which nobody may change afterwards.

        Raises:
            OSError: The disk is full.
        """
        self._thread.update(self._digest, data)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._position += len(data)
        if self._position - self._begun >= _STEP_BYTES:
            start = max(0, self._begun - WINDOW_BYTES)
            let_go(self._file.fileno(), start, self._position - start)
            self._begun = self._position

    def pad(self, block: int) -> None:
        """Writes zeros up to the next multiple of ``block`` bytes."""
        self.write(bytes(-self._position % block))

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        try:
            if kind is None:
                self._thread.wait()
                os.fsync(self._file.fileno())
                self.sha256 = self._digest.hexdigest()
        finally:
            self._thread.close()
            self._file.close()


@dataclass(frozen=True)
class Shard:
    """One file of a model.

    Attributes:
        name: Name of the file.
        shapes: Tensor name to shape, in the order in which the tensors are written.
        dtype: Dtype of all tensors that ``others`` does not name.
        others: Dtypes of tensors that differ, by name.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    others: Mapping[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])

    @property
    def nbytes(self) -> int:
        """Number of bytes of the weights in the file."""
        return sum(prod(shape) * self.dtype_of(name).itemsize for name, shape in self.shapes.items())

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor."""
        return self.others.get(name, self.dtype)


class ShardWriter:
    """Writer of one safetensors file; use it as a context manager.

    Args:
        folder: Folder of the file.
        shard: Name, shapes and dtype of the file.

    Attributes:
        sha256: SHA-256 of the file in hexadecimal, once it is closed.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._shard = shard
        self._left = list(shard.shapes)
        self._file = HashedFile(folder / shard.name)
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        self._file.__enter__()
        offset, header = 0, {"__metadata__": {"format": "pt"}}
        entries: dict[str, object] = dict(header)
        for name, shape in self._shard.shapes.items():
            size = prod(shape) * self._shard.dtype_of(name).itemsize
            entries[name] = {"dtype": NAMES[self._shard.dtype_of(name)], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the reference writer aligns the data to eight bytes
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Writes the next tensor, given as consecutive blocks of its rows."""
        expected = self._left.pop(0)
        assert name == expected, f"'{name}' comes where '{expected}' belongs"
        count = 0
        for piece in pieces:
            flat = piece.detach().to(device="cpu", dtype=self._shard.dtype_of(name)).contiguous().reshape(-1)
            self._file.write(memory_of(flat))
            count += flat.numel()
        assert count == prod(self._shard.shapes[name]), f"'{name}' has {count} values, not {self._shard.shapes[name]}"

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self._file.__exit__(kind, value, trace)
        if kind is None:
            assert not self._left, f"'{self._left[0]}' was not written"
            self.sha256 = self._file.sha256
