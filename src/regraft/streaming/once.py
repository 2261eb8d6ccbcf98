"""One pass over a checkpoint: each tensor is read once, checked and hashed on the way, for a writer that never holds the model."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from regraft.models.checks import check_values
from regraft.models.view import fingerprint_of
from regraft.models.weights import memory_of
from regraft.streaming.skeleton import Skeleton

_WAITING_BYTES = 1 << 25  # may wait in memory for the thread that hashes


class OnePass:
    """The tensors of a skeleton, one at a time; use it as a context manager.

    A thread hashes each block of rows while the next one is read and the last one is written: the fingerprint costs no second pass.

    Args:
        skeleton: A checkpoint that was opened without its fingerprint.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._digests: dict[str, hashlib._Hash] = {}
        self._waiting: deque[tuple[int, Future[None]]] = deque()

    def __enter__(self) -> OnePass:
        self._thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

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
                self._hash(digest, piece)
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
            self._hash(self._digests[name], found)
        return found

    def fingerprint(self) -> str:
        """Returns the fingerprint of the model; parameters that nobody asked for are read now."""
        parameters = list(self._skeleton.loaded.model.named_parameters())
        for name, _ in parameters:
            if name not in self._digests:
                deque(self.pieces(name), maxlen=0)
        self._wait(0)
        dtype = self._skeleton.dtype
        return fingerprint_of((name, tuple(parameter.shape), dtype, self._digests[name].digest()) for name, parameter in parameters)

    def _hash(self, digest: hashlib._Hash, piece: Tensor) -> None:
        self._wait(_WAITING_BYTES - piece.nbytes)
        self._waiting.append((piece.nbytes, self._thread.submit(digest.update, memory_of(piece.contiguous()))))

    def _wait(self, most_bytes: int) -> None:
        """Waits until no more than this many bytes wait to be hashed."""
        while self._waiting and sum(nbytes for nbytes, _ in self._waiting) > most_bytes:
            self._waiting.popleft()[1].result()
