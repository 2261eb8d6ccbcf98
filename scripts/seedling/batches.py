"""Packed training windows in an order that depends on nothing but the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class PackedWindows:
    """Windows of fixed length cut from the documents of a split, laid end to end in a new order each epoch.

    Any step can be asked for at any time, so that a run that was interrupted goes on with the batch it would have had.

    Args:
        documents: One array a document, (n_tokens,) uint16, with BOS and EOS.
        window_tokens: Length of a window.
        batch_windows: Windows in a batch.
        seed: Decides the order of documents, where the first cut falls, and the order of windows.
    """

    def __init__(self, documents: Sequence[NDArray[np.uint16]], window_tokens: int, batch_windows: int, seed: int) -> None:
        self._documents = documents
        self._window_tokens = window_tokens
        self._batch_windows = batch_windows
        self._seed = seed
        total_tokens = sum(len(document) for document in documents)
        # One window less than fits, so that every epoch has the same number wherever its first cut falls.
        self.batches_per_epoch = (total_tokens // window_tokens - 1) // batch_windows
        if self.batches_per_epoch < 1:
            raise ValueError(f"{total_tokens} tokens do not fill a batch of {batch_windows} windows of {window_tokens}")
        self._epoch = -1
        self._windows = np.empty((0, window_tokens), dtype=np.uint16)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Returns the batch of a step (counted from 0): (batch_windows, window_tokens) int64."""
        epoch, within = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._windows, self._epoch = self._shuffled(epoch), epoch
        first = within * self._batch_windows
        return self._windows[first : first + self._batch_windows].astype(np.int64)

    def _shuffled(self, epoch: int) -> NDArray[np.uint16]:
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._documents))
        stream = np.concatenate([self._documents[index] for index in order])
        stream = stream[generator.integers(self._window_tokens) :]
        count = len(stream) // self._window_tokens
        windows = stream[: count * self._window_tokens].reshape(count, self._window_tokens)
        return windows[generator.permutation(count)]
