"""Isolation of the global random generators, and seeds derived from other seeds.

PEFT draws initial values from the global generator, and the Hugging Face ``Trainer`` seeds all of them. Both run inside :func:`isolated`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and PyTorch (CPU and CUDA) inside the block, and restores all of them at the end."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002  (the libraries inside draw from the global generator)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def derived_seed(seed: int, *parts: object) -> int:
    """Returns a seed in ``[0, 2**63)`` that depends only on its arguments, and on all of them.

    >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1) != derived_seed(0, "order", 2)
    True
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
