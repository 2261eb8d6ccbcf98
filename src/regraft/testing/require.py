"""The error of a method that does not hold its contract, and the state of the global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class NonconformingError(AssertionError):
    """A method that does not hold its contract; the message says what it did."""


def require(holds: bool, message: str) -> None:
    """Raises :class:`NonconformingError` with the message unless the condition holds."""
    if not holds:
        raise NonconformingError(message)


@contextmanager
def generators_left_alone(who: str) -> Iterator[None]:
    """Requires that the global generators of Python, NumPy and PyTorch are afterwards as they were."""
    before = _states()
    yield
    require(_states() == before, f"{who} draws from a global random generator; draw from one of the seed that it is given")


def _states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()
