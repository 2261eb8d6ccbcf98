"""The estimator keeps scikit-learn's conventions, completes what was planted, and refuses what it cannot use."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from planted import plant, seen
from regraft.completion.estimator import CompressedMatrixCompletion
from regraft.errors import DataError, InputError

pytestmark = pytest.mark.filterwarnings("ignore:the descent ended after")  # many tests need no more than its first steps

EXACT: dict[str, Any] = {"biases": False, "threshold": 0, "random_state": 0}


class Table:
    """A planted matrix, its known entries and the others."""

    def __init__(self, rows: int, columns: int, rank: int, share: float, noise: float = 0.0, offset: float = 0.0) -> None:
        self.truth = offset + plant(rows, columns, rank).numpy()
        mask = seen(rows, columns, share).numpy()
        self.mask = mask
        self.rows, self.columns = np.nonzero(mask)
        self.unseen = np.nonzero(~mask)
        spread = noise * np.random.default_rng(0).normal(size=self.rows.size)
        self.values = self.truth[mask] + spread
        self.shape = (rows, columns)

    @property
    def entries(self) -> tuple[Any, Any, Any, tuple[int, int]]:
        return self.rows, self.columns, self.values, self.shape

    def error(self, model: CompressedMatrixCompletion) -> float:
        """Relative to the spread of the unseen entries."""
        truth = self.truth[self.unseen]
        return float(np.linalg.norm(model.predict(*self.unseen) - truth) / np.linalg.norm(truth - truth.mean()))


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(50, 40, 2, 0.5)


@pytest.mark.slow
def test_it_completes_a_planted_matrix(table: Table) -> None:
    model = CompressedMatrixCompletion(2, **EXACT).fit(*table.entries)
    assert table.error(model) < 1e-5
    assert model.left_.shape == (50, 2)
    assert model.right_.shape == (40, 2)
    assert model.score(*table.unseen, table.truth[table.unseen]) > 1 - 1e-9
    assert np.isnan(model.validation_rmse_)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 4])
def test_other_depths_complete_it_too(table: Table, depth: int) -> None:
    assert table.error(CompressedMatrixCompletion(2, depth, **EXACT).fit(*table.entries)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_other_optimizers_complete_it_too(table: Table, optimizer: str) -> None:
    model = CompressedMatrixCompletion(2, optimizer=optimizer, tol=1e-8, **EXACT).fit(*table.entries)
    assert table.error(model) < 1e-3


@pytest.mark.long
def test_left_to_itself_it_sees_that_the_entries_are_exact(table: Table) -> None:
    model = CompressedMatrixCompletion(2, random_state=0).fit(*table.entries)
    assert model.choice_.threshold == 0
    assert not model.choice_.biases
    assert table.error(model) < 1e-5


@pytest.mark.long
def test_left_to_itself_it_removes_biases_and_shrinks_what_is_noisy() -> None:
    noisy = Table(60, 50, 2, 0.4, noise=2.0, offset=3.5)
    generator = np.random.default_rng(1)
    ups, downs = generator.normal(size=60), generator.normal(size=50)
    noisy.truth += ups[:, None] + downs
    noisy.values += ups[noisy.rows] + downs[noisy.columns]
    model = CompressedMatrixCompletion(4, random_state=0).fit(*noisy.entries)
    assert model.choice_.biases
    assert model.choice_.threshold > 0.1
    plain = CompressedMatrixCompletion(4, **EXACT).fit(*noisy.entries)
    assert noisy.error(model) < 0.75 * noisy.error(plain)
    assert model.validation_rmse_ == pytest.approx(2.3, abs=0.5)  # the noise is 2


@pytest.mark.long
def test_the_rank_is_found_by_held_out_error() -> None:
    exact = Table(40, 36, 3, 0.6)
    model = CompressedMatrixCompletion("auto", biases=False, threshold=0, random_state=0, max_iter=4000).fit(*exact.entries)
    assert model.rank_ == 3
    assert exact.error(model) < 1e-4


@pytest.mark.slow
def test_the_result_has_the_rank_asked_for(table: Table) -> None:
    """Too small a rank is a worse fit, not a larger matrix: the factorization is wider inside."""
    model = CompressedMatrixCompletion(1, max_iter=3000, **EXACT).fit(*table.entries)
    grid = np.indices(table.shape).reshape(2, -1)
    assert np.linalg.matrix_rank(model.predict(*grid).reshape(table.shape), tol=1e-8) == 1
    assert table.error(model) > 0.1


@pytest.mark.slow
def test_conventions_of_scikit_learn(table: Table) -> None:
    model = CompressedMatrixCompletion(2, depth=4, gamma=0.02, **EXACT)
    before = model.get_params()
    copy = clone(model)
    assert copy.get_params() == before
    assert before["gamma"] == 0.02
    assert model.set_params(rank=3).rank == 3
    assert "gamma=0.02" in repr(copy)
    with pytest.raises(NotFittedError):
        copy.predict([0], [0])
    with pytest.raises(NotFittedError):
        copy.refit(*table.entries)
    assert copy.fit(*table.entries) is copy
    assert copy.get_params() == before  # fitting leaves the settings alone


def test_the_same_seed_gives_the_same_bits(table: Table) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  (that it stays as it is)
    settings = {**EXACT, "max_iter": 60}
    one = CompressedMatrixCompletion(2, **settings).fit(*table.entries)
    other = clone(one).fit(*table.entries)
    assert np.array_equal(one.left_, other.left_)
    third = clone(one).set_params(random_state=1).fit(*table.entries)
    assert not np.array_equal(one.left_, third.left_)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


def test_the_order_of_the_entries_does_not_matter(table: Table) -> None:
    order = np.random.default_rng(0).permutation(table.rows.size)
    settings = {**EXACT, "max_iter": 60}
    one = CompressedMatrixCompletion(2, **settings).fit(*table.entries)
    other = CompressedMatrixCompletion(2, **settings).fit(table.rows[order], table.columns[order], table.values[order], table.shape)
    assert np.array_equal(one.left_, other.left_)


@pytest.mark.slow
def test_fit_transform_fills_in_what_is_missing(table: Table) -> None:
    model = CompressedMatrixCompletion(2, **EXACT)
    completed = model.fit_transform(*table.entries)
    assert completed.shape == table.shape
    assert np.array_equal(completed[table.mask], table.values)
    np.testing.assert_allclose(completed, table.truth, atol=1e-4)


@pytest.mark.slow
def test_matrices_with_nan_and_sparse_ones_are_read(table: Table) -> None:
    holed = np.where(table.mask, table.truth, np.nan)
    from_nan = CompressedMatrixCompletion(2, **EXACT).fit_transform(holed)
    np.testing.assert_allclose(from_nan, table.truth, atol=1e-4)
    listed = sparse.coo_array((table.values, (table.rows, table.columns)), shape=table.shape)
    from_sparse = CompressedMatrixCompletion(2, **EXACT).fit_transform(listed.tocsr())
    assert np.array_equal(from_nan, from_sparse)
    tensors = [torch.from_numpy(part) for part in (table.rows, table.columns, table.values)]
    assert np.array_equal(CompressedMatrixCompletion(2, **EXACT).fit_transform(*tensors, shape=table.shape), from_nan)


@pytest.mark.slow
@pytest.mark.parametrize("biases", [False, True])
def test_empty_rows_are_predicted_by_bias_and_reported(table: Table, biases: bool, caplog: pytest.LogCaptureFixture) -> None:
    kept = table.rows != 7
    settings = {**EXACT, "biases": biases, "threshold": 0.3}
    with caplog.at_level(logging.WARNING):
        model = CompressedMatrixCompletion(2, **settings).fit(
            table.rows[kept], table.columns[kept], 5.0 + table.values[kept], shape=(51, 41)
        )
    assert model.empty_rows_.tolist() == [7, 50]
    assert model.empty_columns_.tolist() == [40]
    assert "2 of 51 rows and 1 of 41 columns have no entries" in caplog.text
    predicted = model.predict([7, 50, 3, 50], [4, 4, 40, 40])
    assert np.isfinite(predicted).all()
    assert predicted[0] == predicted[1]  # both know only the column
    assert predicted[3] == pytest.approx(5.0 + table.values[kept].mean())
    column = 5.0 + table.values[kept & (table.columns == 4)]
    assert abs(predicted[0] - predicted[3]) <= abs(column.mean() - predicted[3]) + 1.0


@pytest.mark.slow
def test_refit_keeps_what_was_chosen(table: Table) -> None:
    model = CompressedMatrixCompletion(2, **EXACT).fit(*table.entries)
    choice = model.choice_
    more = np.concatenate([table.rows, table.unseen[0][:50]]), np.concatenate([table.columns, table.unseen[1][:50]])
    model.refit(*more, table.truth[more], table.shape)
    assert model.choice_ is choice
    assert table.error(model) < 1e-5


def test_constant_entries_are_predicted_by_the_constant() -> None:
    rows, columns = np.nonzero(seen(12, 10, 0.6).numpy())
    model = CompressedMatrixCompletion(2, biases=True, random_state=0).fit(rows, columns, np.full(rows.size, 4.0), (12, 10))
    np.testing.assert_allclose(model.predict([0, 11], [9, 0]), 4.0, atol=1e-9)


@pytest.mark.long
def test_progress_is_told(table: Table) -> None:
    told: list[tuple[str, float]] = []
    CompressedMatrixCompletion(2, random_state=0, progress=lambda label, share: told.append((label, share))).fit(*table.entries)
    assert {label for label, _ in told} == {"choosing the threshold", "trying without shrinkage", "completing"}
    assert all(0 <= share <= 1.5 for _, share in told)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank 0 is below 1"),
        ({"rank": -2}, "rank -2 is below 1"),
        ({"rank": 21}, "rank 21 is too large for a 50 x 40 matrix: twice the rank must fit its smaller side, so at most 20"),
        ({"rank": 2.5}, "rank 2.5 is not a whole number"),
        ({"rank": "many"}, "rank 'many' is neither a whole number nor 'auto'"),
        ({"depth": 1}, "depth 1 is below 2"),
        ({"gamma": -0.1}, "gamma -0.1 is not allowed; give a finite number at least 0"),
        ({"init_scale": 0}, "init scale 0 is not allowed"),
        ({"threshold": 1.5}, "threshold 1.5 leaves nothing"),
        ({"threshold": -1}, "threshold -1 is not allowed"),
        ({"biases": "yes"}, "biases 'yes' is not one of"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"tol": float("nan")}, "tol nan is not allowed"),
        ({"max_iter": 0}, "max iterations 0 is below 1"),
        ({"validation_fraction": 1.0, "threshold": "auto"}, "held-out fraction 1 is not below 1"),
        ({"random_state": "seed"}, "random_state 'seed' is not a seed"),
        ({"device": "abacus"}, "device 'abacus' is not known"),
        ({"device": "mps"}, "device 'mps' is not supported"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
    ],
)
def test_impossible_settings_are_refused(table: Table, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as refusal:
        CompressedMatrixCompletion(**{"rank": 2, **EXACT, **settings}).fit(*table.entries)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (([0, 0, 1], [1, 1, 0], [1.0, 2.0, 3.0]), "row 0, column 1.* is given more than once"),
        (([0, -1], [1, 1], [1.0, 2.0]), "row -1 is out of range"),
        (([0, 9], [1, 1], [1.0, 2.0], (5, 5)), "row 9 is out of range: the shape 5 x 5"),
        (([0, 1], [1, 1], [1.0, np.inf]), "value inf of entry 1 is not finite"),
        (([0, 1], [1, 1], [1.0]), "2, 2 and 1 entries"),
        (([], [], []), "no known entries"),
        (([0.5, 1], [1, 1], [1.0, 2.0]), "row 0.5 .* is not a whole number"),
        ((["a", "b"], [1, 1], [1.0, 2.0]), "the rows are not numbers"),
        (([0, 1], [1, 1], [1.0, 2.0], (0, 5)), r"shape \(0, 5\) is not two whole numbers"),
        (([0, 1], [1, 1]), "rows, columns and values belong together"),
        ((np.full((3, 3), np.nan),), "no known entries"),
        (([-1], [0], [1.0]), "row -1 is out of range: rows are numbered from 0"),
        (([0, 0, 0], [0, 1, 2], [1.0, 2.0, 3.0]), "a 1 x 3 matrix of known entries has nothing to factorize"),
        (([0, 1], [0, 1], [1e-200, 2e-200]), "the largest value is of size 2e-200"),
        (([0, 1], [0, 1], [1e200, 2.0]), "the largest value is of size 1e.200"),
        ((np.ones(3),), "must be two-dimensional"),
    ],
)
def test_entries_that_cannot_be_used_are_refused(entries: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words) as refusal:
        CompressedMatrixCompletion(1, **EXACT).fit(*entries)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_ending_before_the_tolerance_is_said(table: Table) -> None:
    with pytest.warns(
        ConvergenceWarning, match="ended after 40 iterations at a relative squared error of .* above tol=1e-12; raise max_iter"
    ):
        short = CompressedMatrixCompletion(2, max_iter=40, **EXACT).fit(*table.entries)
    assert (short.n_iter_, short.converged_) == (40, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = CompressedMatrixCompletion(2, **EXACT).fit(*table.entries)
    assert enough.converged_
    assert 40 < enough.n_iter_ < enough.max_iter


def test_bfloat16_tensors_and_generators_of_numpy_are_taken(table: Table) -> None:
    rounded = torch.tensor(table.values).bfloat16()
    given = (table.rows, table.columns, rounded, table.shape)
    one = CompressedMatrixCompletion(2, max_iter=20, **{**EXACT, "random_state": np.random.default_rng(5)}).fit(*given)
    same = CompressedMatrixCompletion(2, max_iter=20, **{**EXACT, "random_state": np.random.default_rng(5)})
    assert np.array_equal(one.left_, same.fit(table.rows, table.columns, rounded.double().numpy(), table.shape).left_)


def test_a_score_wants_a_value_for_every_pair(table: Table) -> None:
    model = CompressedMatrixCompletion(2, max_iter=5, **EXACT).fit(*table.entries)
    for values in ([1.0, 2.0], []):
        with pytest.raises(DataError, match=r"pairs and . values to compare; give as many of each, at least 2"):
            model.score([0] * (len(values) // 2), [0] * (len(values) // 2), values)


def test_predictions_outside_the_matrix_are_refused(table: Table) -> None:
    model = CompressedMatrixCompletion(2, max_iter=5, **EXACT).fit(*table.entries)
    for rows, columns, words in (([50], [0], "row 50 is out of range"), ([0], [-1], "column -1"), ([0, 1], [0], "2 rows and 1 columns")):
        with pytest.raises(DataError, match=words):
            model.predict(rows, columns)


def test_a_matrix_too_large_to_return_is_refused_before_it_is_fitted() -> None:
    model = CompressedMatrixCompletion(1, **EXACT)
    with pytest.raises(InputError, match="use fit, and predict the entries you need"):
        model.fit_transform([0, 10**6], [0, 10**6], [1.0, 2.0])
    with pytest.raises(NotFittedError):
        model.predict([0], [0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(table: Table) -> None:
    with pytest.raises(InputError, match="torch sees no CUDA device; use cpu"):
        CompressedMatrixCompletion(2, device="cuda", **EXACT).fit(*table.entries)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_completes_the_same(table: Table) -> None:
    model = CompressedMatrixCompletion(2, device="cuda", **EXACT).fit(*table.entries)
    assert table.error(model) < 1e-5
