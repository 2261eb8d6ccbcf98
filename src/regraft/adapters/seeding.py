"""Keeps libraries that draw from the global random generators from changing them for everyone else.

PEFT initialises with the global generator and the Hugging Face ``Trainer`` seeds all of them; both run inside :func:`isolated`.
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
    """Seeds Python, NumPy and PyTorch (CPU and CUDA) inside the block and puts all of them back afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002  (what the libraries inside draw from is the global generator)
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
    """Returns a seed in ``[0, 2**63)`` that depends on all of its arguments and on nothing else.

    >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1) != derived_seed(0, "order", 2)
    True
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
