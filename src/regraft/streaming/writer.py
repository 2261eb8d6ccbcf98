"""Writer of a safetensors file tensor by tensor, so that at most one tensor is in memory.

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

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


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
        self._path = folder / shard.name
        self._left = list(shard.shapes)
        self._digest = hashlib.sha256()
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        self._file = self._path.open("wb")
        offset, header = 0, {"__metadata__": {"format": "pt"}}
        entries: dict[str, object] = dict(header)
        for name, shape in self._shard.shapes.items():
            size = prod(shape) * self._shard.dtype_of(name).itemsize
            entries[name] = {"dtype": NAMES[self._shard.dtype_of(name)], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the reference writer aligns the data to eight bytes
        self._put(struct.pack("<Q", len(text)) + text)
        return self

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Writes the next tensor, given as consecutive blocks of its rows."""
        expected = self._left.pop(0)
        assert name == expected, f"'{name}' comes where '{expected}' belongs"
        count = 0
        for piece in pieces:
            flat = piece.detach().to(device="cpu", dtype=self._shard.dtype_of(name)).contiguous().reshape(-1)
            self._put(memory_of(flat))
            count += flat.numel()
        assert count == prod(self._shard.shapes[name]), f"'{name}' has {count} values, not {self._shard.shapes[name]}"

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        try:
            if kind is None:
                assert not self._left, f"'{self._left[0]}' was not written"
                self._file.flush()
                os.fsync(self._file.fileno())
                self.sha256 = self._digest.hexdigest()
        finally:
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
