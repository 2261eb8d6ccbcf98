"""A thread that hashes blocks while the next ones are read and the last ones are written."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

WAITING_BYTES = 1 << 25  # may wait in memory for the thread


class HashingThread:
    """Hashes blocks in order, in a thread of its own. Blocks must not change until they are hashed."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[None]]] = deque()

    def update(self, digest: hashlib._Hash, data: bytes | memoryview) -> None:
        """Adds a block to a digest, after a wait where too many bytes wait already."""
        nbytes = memoryview(data).nbytes
        self.wait(WAITING_BYTES - nbytes)
        self._waiting.append((nbytes, self._thread.submit(digest.update, data)))

    def wait(self, most_bytes: int = 0) -> None:
        """Waits until no more than this many bytes wait to be hashed."""
        while self._waiting and sum(nbytes for nbytes, _ in self._waiting) > most_bytes:
            self._waiting.popleft()[1].result()

    def close(self) -> None:
        """Ends the thread; blocks that still wait are left out."""
        self._thread.shutdown(cancel_futures=True)
