from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The script that makes seedling is no part of the package; its tests import it from where it lies.
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    """The trainer computes each window on one thread, and says so to torch for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
