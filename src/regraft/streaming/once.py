"""One pass over a checkpoint: each tensor is read once, checked and hashed on the way, for a writer that never holds the model."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from regraft.models.checks import check_values
from regraft.models.view import digest_of, fingerprint_of
from regraft.streaming.skeleton import Skeleton


class OnePass:
    """The tensors of a skeleton, one at a time; use it as a context manager.

    A thread hashes each tensor while the next one is read and the last one is written: the fingerprint costs no second pass.

    Args:
        skeleton: A checkpoint that was opened without its fingerprint.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._digests: dict[str, Future[bytes | None]] = {}

    def __enter__(self) -> OnePass:
        self._thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter in the skeleton's dtype, on the CPU.

        Raises:
            ModelError: It holds NaN, infinity or values far beyond those of a trained model.
        """
        found = self._skeleton.stored(name)
        if name not in self._digests:
            check_values(name, found, self._skeleton.loaded.source)
            for before in self._digests.values():  # no more than two tensors wait in memory
                before.result()
            self._digests[name] = self._thread.submit(digest_of, found)
        return found

    def fingerprint(self) -> str:
        """Returns the fingerprint of the model; parameters that nobody asked for are read now."""
        parameters = list(self._skeleton.loaded.model.named_parameters())
        for name, _ in parameters:
            if name not in self._digests:
                self.tensor(name)
        dtype = self._skeleton.dtype
        return fingerprint_of((name, tuple(parameter.shape), dtype, self._digests[name].result()) for name, parameter in parameters)
