"""One pass over a checkpoint: each tensor is read once, checked and hashed on the way, for a writer that never holds the model."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from torch import Tensor

from regraft.models.checks import check_values
from regraft.models.view import fingerprint_of
from regraft.models.weights import memory_of
from regraft.streaming.hashing import HashingThread
from regraft.streaming.skeleton import Skeleton


class OnePass:
    """The tensors of a skeleton, one at a time; use it as a context manager.

    A thread hashes each block of rows while the next one is read and the last one is written: the fingerprint costs no second pass.

    Args:
        skeleton: A checkpoint that was opened without its fingerprint.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._digests: dict[str, hashlib._Hash] = {}

    def __enter__(self) -> OnePass:
        self._thread = HashingThread()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.close()

    def pieces(self, name: str, together: int = 1) -> Iterator[Tensor]:
        """Yields a parameter in the skeleton's dtype, on the CPU, in blocks of rows that nobody may change.

        Args:
            name: Name of the parameter.
            together: Each block is the whole parameter, or has a multiple of this many rows.

        Raises:
            ModelError: It holds NaN, infinity or values far beyond those of a trained model.
        """
        digest = None if name in self._digests else hashlib.sha256()
        for piece in self._skeleton.pieces(name, together):
            if digest is not None:
                self._thread.update(digest, memory_of(piece.contiguous()))
            yield piece
        if digest is not None:
            self._digests[name] = digest

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter in the skeleton's dtype, on the CPU.

        Raises:
            ModelError: It holds NaN, infinity or values far beyond those of a trained model.
        """
        found = self._skeleton.stored(name)
        if name not in self._digests:
            check_values(name, found, self._skeleton.loaded.source)
            self._digests[name] = hashlib.sha256()
            self._thread.update(self._digests[name], memory_of(found.contiguous()))
        return found

    def fingerprint(self) -> str:
        """Returns the fingerprint of the model; parameters that nobody asked for are read now."""
        parameters = list(self._skeleton.loaded.model.named_parameters())
        for name, _ in parameters:
            if name not in self._digests:
                deque(self.pieces(name), maxlen=0)
        self._thread.wait()
        dtype = self._skeleton.dtype
        return fingerprint_of((name, tuple(parameter.shape), dtype, self._digests[name].digest()) for name, parameter in parameters)
