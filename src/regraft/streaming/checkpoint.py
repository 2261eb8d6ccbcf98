"""A safetensors folder that is read piece by piece into ordinary memory.

Files are read and never mapped, because pages of a mapped file count as resident memory, which ``memory`` limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.models.view import digest_of_pieces
from regraft.models.weights import DTYPES, StoredTensor, fill, read_header, stored_tensors

# Rows of a matrix that are compared or copied in one go: few enough that their memory is used again for the next ones.
PIECE_BYTES = 1 << 23
_digests: dict[tuple[Any, ...], bytes] = {}  # of tensors, by file, its size and time, and place in it


class CheckpointFiles:
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
        self.places: dict[str, StoredTensor] = {}
        if files is None:
            self.places = stored_tensors(folder)
        for path in files or ():
            self.places |= read_header(path)

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
        found = torch.empty(len(rows), width, dtype=DTYPES[place.dtype])
        with place.path.open("rb", buffering=0) as stream:
            for index, row in enumerate(rows.tolist()):
                self._into(stream, place, row * width, found[index])
        return found.reshape(len(rows), *place.shape[1:])

    def digest(self, name: str, dtype: torch.dtype) -> bytes:
        """Returns :func:`regraft.models.view.digest_of` a tensor as it is after loading; read anew only where its file has changed."""
        place = self.places[name]
        file = place.path.stat()
        key = (str(place.path.absolute()), file.st_ino, file.st_size, file.st_mtime_ns, place.offset, dtype)
        if key not in _digests:
            _digests[key] = digest_of_pieces(piece.to(dtype) for piece in self.pieces(name))
        return _digests[key]

    def pieces(self, name: str, together: int = 1) -> Iterator[Tensor]:
        """Yields a tensor in blocks of rows, in order, each of a multiple of ``together`` rows."""
        place = self.places[name]
        if not place.shape:
            yield self.read(name)
            return
        rows = place.shape[0]
        nbytes = place.numel * DTYPES[place.dtype].itemsize
        step = max(1, PIECE_BYTES // max(1, nbytes // max(1, rows)) // together) * together
        for start in range(0, rows, step):
            yield self.rows(name, start, min(rows, start + step))

    def _read(self, place: StoredTensor, first: int, count: int) -> Tensor:
        found = torch.empty(count, dtype=DTYPES[place.dtype])
        with place.path.open("rb", buffering=0) as stream:
            self._into(stream, place, first, found)
        return found

    def _into(self, stream: FileIO, place: StoredTensor, first: int, tensor: Tensor) -> None:
        """Fills a tensor with values ``first`` onwards of a stored one."""
        self.bytes_read += fill(tensor, stream, place, first)
