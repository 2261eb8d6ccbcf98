"""Biases against the solution of their normal equations."""

from __future__ import annotations

import pytest
import torch

from planted import seen
from regraft.completion.biases import fit_biases, mean_only
from regraft.completion.entries import EntryList
from regraft.errors import InputError


def table(rows: int = 12, columns: int = 9, seed: int = 0) -> EntryList:
    generator = torch.Generator().manual_seed(seed)
    places = seen(rows, columns, 0.5, seed).nonzero()
    return EntryList(places[:, 0], places[:, 1], 3 + torch.randn(len(places), generator=generator).double(), (rows, columns))


@pytest.mark.parametrize("shrinkage", [0.5, 3.0, 40.0])
def test_biases_solve_the_ridge_problem(shrinkage: float) -> None:
    entries = table()
    rows, columns = entries.shape
    design = torch.zeros(entries.count, rows + columns, dtype=torch.float64)
    design[torch.arange(entries.count), entries.rows] = 1.0
    design[torch.arange(entries.count), rows + entries.columns] = 1.0
    normal = design.T @ design + shrinkage * torch.eye(rows + columns, dtype=torch.float64)
    exact = torch.linalg.solve(normal, design.T @ (entries.values - entries.values.mean()))
    found = fit_biases(entries, shrinkage)
    torch.testing.assert_close(found.rows, exact[:rows], rtol=0, atol=1e-7)
    torch.testing.assert_close(found.columns, exact[rows:], rtol=0, atol=1e-7)


def test_a_row_without_entries_has_no_bias() -> None:
    entries = EntryList(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 4.0]).double(), (3, 3))
    found = fit_biases(entries, 1.0)
    assert found.rows[1] == 0.0
    assert found.columns[2] == 0.0
    assert found.at(torch.tensor([1]), torch.tensor([2])).item() == pytest.approx(7 / 3)


def test_the_mean_alone_predicts_the_mean() -> None:
    entries = table()
    predicted = mean_only(entries).at(torch.tensor([0, 5]), torch.tensor([3, 8]))
    torch.testing.assert_close(predicted, entries.values.mean().expand(2), rtol=0, atol=1e-14)


def test_no_shrinkage_is_refused() -> None:
    with pytest.raises(InputError, match="shrinkage 0 is not allowed"):
        fit_biases(table(), 0.0)
