"""Entry lists against dense masks, and against sizes at which anything dense would not fit."""

from __future__ import annotations

import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planted import plant, seen
from regraft.completion.descent import Descent, descend
from regraft.completion.entries import EntryList, WholeMatrix, entries_of
from regraft.errors import DataError, InputError
from regraft.numerics.chain import compressed_start
from regraft.numerics.frames import compact_frames
from regraft.numerics.svd import top_triplets


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    width=st.integers(1, 6),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31),
)
def test_an_entry_list_pulls_as_the_dense_mask_does(rows: int, columns: int, width: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < share
    mask[0, 0] = True
    places = mask.nonzero()[torch.randperm(int(mask.sum()), generator=generator)]  # in any order
    entries = EntryList(places[:, 0], places[:, 1], target[places[:, 0], places[:, 1]], (rows, columns))
    left = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    first = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    residual = mask * (left @ first - target)
    for observed in (entries, WholeMatrix(target, mask)):
        pull = observed.pull(left, first)
        assert pull.squared_error == pytest.approx(float(residual.square().sum()), rel=1e-12, abs=1e-12)
        torch.testing.assert_close(pull.d_left, residual @ first.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pull.d_first, left.T @ residual, rtol=1e-12, atol=1e-12)
        assert observed.pull(left, first, need_first=False).d_first is None
        torch.testing.assert_close(observed.times(first.T), (mask * target) @ first.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(observed.transpose_times(left), (mask * target).T @ left, rtol=1e-12, atol=1e-12)
        assert observed.count == int(mask.sum())


def test_an_entry_list_finds_the_leading_triplets(generator: torch.Generator) -> None:
    target, mask = plant(90, 60, 3), seen(90, 60, 0.5)
    places = mask.nonzero()
    entries = EntryList(places[:, 0], places[:, 1], target[mask], (90, 60))
    found, exact = entries.top_triplets(3, generator), top_triplets(mask * target, 3)
    torch.testing.assert_close(found.values, exact.values, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.left, exact.left, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_nothing_is_dense_when_the_mask_is_sparse(generator: torch.Generator) -> None:
    """A dense 100,000 x 80,000 residual would take 64 GB; building the frames and ten steps must stay below 0.5 GB."""
    shape, count, rank = (100_000, 80_000), 20_000, 2
    rows = torch.randint(shape[0], (count,), generator=generator)
    columns = torch.randperm(shape[1], generator=generator)[:count]
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entries = EntryList(rows, columns, values, shape)
    frames = compact_frames(entries.top_triplets(rank, generator), generator)
    outcome = descend(compressed_start(frames, 3, 1e-2, 0.01), entries, Descent(1e-2, max_iterations=10, tolerance=0.0))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert outcome.iterations == 10
    assert grown_kib < 500_000


def test_evaluating_entries_in_chunks_changes_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    left = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    right = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    rows = torch.randint(30, (101,), generator=generator)
    columns = torch.randint(20, (101,), generator=generator)
    monkeypatch.setattr("regraft.completion.entries.GATHERED_NUMBERS", 37)
    torch.testing.assert_close(entries_of(left, right, rows, columns), (left @ right.T)[rows, columns], rtol=1e-13, atol=1e-13)
    assert entries_of(left, right, rows[:0], columns[:0]).shape == (0,)


def listed(rows: list[int], columns: list[int], values: list[float]) -> EntryList:
    return EntryList(torch.tensor(rows), torch.tensor(columns), torch.tensor(values, dtype=torch.float64), (3, 4))


@pytest.mark.parametrize(
    ("rows", "columns", "values", "words"),
    [
        ([0, 3], [0, 0], [1.0, 2.0], r"row 3 is out of range: the shape 3 x 4 has rows 0 to 2"),
        ([0, 1], [0, 4], [1.0, 2.0], r"column 4 is out of range"),
        ([0, -1], [0, 1], [1.0, 2.0], r"row -1 is out of range"),
        ([0, 1, 0], [2, 1, 2], [1.0, 2.0, 3.0], r"row 0, column 2\) is given more than once \(1 repetitions"),
        ([0, 1], [0, 1], [1.0, float("nan")], r"value nan of entry 1 is not finite"),
        ([0, 1], [0, 1], [1.0], r"2, 2 and 1 entries"),
        ([], [], [], r"no observed entries"),
    ],
)
def test_bad_entries_are_refused(rows: list[int], columns: list[int], values: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words) as refusal:
        listed(rows, columns, values)
    assert "\n" not in str(refusal.value)


def test_bad_masks_are_refused() -> None:
    target = torch.eye(3, dtype=torch.float64)
    with pytest.raises(InputError, match="same shape"):
        WholeMatrix(target, torch.ones(3, 4))
    with pytest.raises(InputError, match="observes no entry"):
        WholeMatrix(target, torch.zeros(3, 3))
    target[0, 0] = torch.inf
    with pytest.raises(InputError, match="NaN or infinity"):
        WholeMatrix(target)
    WholeMatrix(target, 1.0 - torch.eye(3))  # an entry that is not observed may be anything
