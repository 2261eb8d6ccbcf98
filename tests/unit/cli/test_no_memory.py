"""What torch and NumPy say when memory runs out becomes one line with the step, the bytes and the settings that need less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.cli.no_memory import is_no_memory, no_memory_line
from regraft.cli.progress import progress


def failed(what: str) -> Exception:
    """Returns the error that a library raises when it is asked for more than any machine has."""
    try:
        with progress("pruning", quiet=True) as say:
            say("scoring layers")
            np.zeros(1 << 58, np.uint8) if what == "numpy" else torch.empty(1 << 58, dtype=torch.uint8)
    except (MemoryError, RuntimeError) as error:
        return error
    raise AssertionError("there was room")


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_errors_of_the_libraries_are_known(library: str) -> None:
    error = failed(library)
    assert is_no_memory(error), error
    line = no_memory_line(error, ["prune", "model"])
    assert line.startswith("the memory of this machine is not enough (at: scoring layers; "), line
    assert "were asked for); prune with --memory" in line
    assert "256. PiB" in line or "288230376.15 GB" in line, line


def test_a_gpu_and_what_says_no_number() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB.")
    assert no_memory_line(error, ["recover"]).startswith("the memory of this GPU is not enough (20.00 GiB were asked for); take a smaller")
    assert no_memory_line(MemoryError(), []) == "the memory of this machine is not enough; take a smaller input"
    assert not is_no_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_no_memory(OSError(2, "No such file or directory"))
