"""Random numbers by counting: the same in any chunks, uniform, and unrelated between keys and neighbours."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest

from regraft.errors import InputError
from regraft.numerics.counter import MOST, random_uniform

COUNT = 200_000


def reference(key: int, index: int) -> float:
    """The documented mixing in Python's integers."""

    def mix(state: int) -> int:
        state ^= state >> 16
        state = state * 0x7FEB352D % 2**32
        state ^= state >> 15
        state = state * 0x846CA68B % 2**32
        return state ^ state >> 16

    state = mix(mix(index ^ key % 2**32) ^ (key >> 32) % 2**32)
    signed = state - 2**32 if state >= 2**31 else state
    return float(torch.tensor(signed, dtype=torch.int32).to(torch.float32)) / 2**31


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 0x123456789ABCDEF])
def test_it_is_the_documented_mixing(key: int) -> None:
    found = random_uniform(key, 5, 40).tolist()
    assert found == [reference(key, 5 + index) for index in range(40)]
    assert random_uniform(key, MOST - 2, 2).tolist() == [reference(key, MOST - 2 + index) for index in range(2)]


def test_chunks_do_not_matter() -> None:
    whole = random_uniform(7, 0, 1000)
    parts = [random_uniform(7, start, min(37, 1000 - start)) for start in range(0, 1000, 37)]
    assert torch.equal(torch.cat(parts), whole)


def test_it_is_uniform_and_neighbours_are_unrelated() -> None:
    numbers = random_uniform(11, 0, COUNT).double()
    assert kstest(numbers.numpy(), "uniform", args=(-1, 2)).pvalue > 1e-4
    limit = 5 / COUNT**0.5  # five standard deviations of a correlation of independent numbers
    for other in (numbers.roll(1), numbers.roll(2), random_uniform(12, 0, COUNT).double(), random_uniform(11 + 2**32, 0, COUNT).double()):
        assert abs(float(torch.corrcoef(torch.stack([numbers, other]))[0, 1])) < limit
    bits = numbers.sort().values
    assert float(torch.corrcoef(torch.stack([bits, bits.roll(1)]))[0, 1]) > 0.9  # the control: related numbers are seen


def test_beyond_the_last_is_refused() -> None:
    with pytest.raises(InputError, match="there are 2147483647"):
        random_uniform(0, MOST, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_same_on_a_gpu() -> None:
    assert torch.equal(random_uniform(3, 10, 5000, "cuda").cpu(), random_uniform(3, 10, 5000))
