"""A safetensors folder that is read piece by piece into ordinary memory.

Files are read and never mapped, because pages of a mapped file count as resident memory, which ``--memory`` limits.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.errors import ModelError
from regraft.models.weights import AGAIN, read_header, stored_tensors, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Size of the blocks of rows in which a matrix is compared or copied.
PIECE_BYTES = 1 << 25


@dataclass(frozen=True)
class Place:
    """Location of a tensor in a file.

    Attributes:
        path: The file.
        offset: Position of the tensor's first byte in the file.
        dtype: Stored dtype.
        shape: Shape of the tensor.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of stored bytes."""
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """The tensors of a model folder, by name.

    Args:
        folder: A folder with safetensors files, whose headers are all checked first.
        files: Only these files, for a folder that is not complete yet; None for all.

    Attributes:
        places: Location of each tensor, by name.
        bytes_read: Number of bytes read so far.

    Raises:
        ModelError: A file is missing, truncated or damaged, or its tensors differ from the index.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.bytes_read = 0
        self.places: dict[str, Place] = {}
        if files is None:
            stored_tensors(folder)  # refuses an incomplete or damaged folder
        for path in weight_files(folder) if files is None else files:
            header = read_header(path)
            for name, start in _starts(path):
                self.places[name] = Place(path, start, DTYPES[header[name].dtype], header[name].shape)

    def read(self, name: str) -> Tensor:
        """Returns a tensor in its stored dtype."""
        place = self.places[name]
        return self._read(place, 0, place.numel).reshape(place.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows ``start`` to ``stop - 1`` of a tensor: shape (stop - start, ...)."""
        place = self.places[name]
        width = prod(place.shape[1:])
        return self._read(place, start * width, (stop - start) * width).reshape(stop - start, *place.shape[1:])

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Returns the rows with these indices, int64 (n,): shape (n, ...)."""
        place = self.places[name]
        width = prod(place.shape[1:])
        found = torch.empty(len(rows), width, dtype=place.dtype)
        with place.path.open("rb", buffering=0) as stream:
            for index, row in enumerate(rows.tolist()):
                self._into(stream, place, row * width, found[index])
        return found.reshape(len(rows), *place.shape[1:])

    def sample(self, name: str, step: int, most: int) -> Tensor:
        """Returns every ``step``-th value of a tensor in memory order, at most ``most`` of them."""
        place = self.places[name]
        found = torch.empty(min(most, -(-place.numel // step)), dtype=place.dtype)
        with place.path.open("rb", buffering=0) as stream:
            for index in range(len(found)):
                self._into(stream, place, index * step, found[index : index + 1])
        return found

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yields a tensor in blocks of rows, in order."""
        place = self.places[name]
        if not place.shape:
            yield self.read(name)
            return
        rows = place.shape[0]
        step = max(1, PIECE_BYTES // max(1, place.nbytes // max(1, rows)))
        for start in range(0, rows, step):
            yield self.rows(name, start, min(rows, start + step))

    def _read(self, place: Place, first: int, count: int) -> Tensor:
        found = torch.empty(count, dtype=place.dtype)
        with place.path.open("rb", buffering=0) as stream:
            self._into(stream, place, first, found)
        return found

    def _into(self, stream: FileIO, place: Place, first: int, tensor: Tensor) -> None:
        """Fills a tensor with the values of a stored tensor from value ``first`` on."""
        buffer = memory_of(tensor)
        stream.seek(place.offset + first * place.dtype.itemsize)
        done = 0
        while done < len(buffer):
            got = stream.readinto(buffer[done:])
            if not got:
                raise ModelError(f"'{place.path}' ended while it was read, {len(buffer) - done} bytes too early; {AGAIN}")
            done += got
        self.bytes_read += len(buffer)


def memory_of(tensor: Tensor) -> memoryview:
    """Returns a view of the bytes of a contiguous CPU tensor, for reading and writing in place."""
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def _starts(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the name of each tensor of a checked file with the offset of its first byte."""
    with path.open("rb") as stream:
        header_bytes = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, 8 + header_bytes + entry["data_offsets"][0]
