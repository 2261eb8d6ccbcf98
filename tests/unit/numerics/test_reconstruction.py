"""Least squares against SciPy's solver on the activations themselves, and the removal order against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from regraft.errors import InputError
from regraft.numerics.moments import Moments
from regraft.numerics.reconstruction import DAMPINGS, JudgingRows, NormalEquations, best_damping, error, reconstruct
from regraft.numerics.surgeon import removal_order

GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(8, 8, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(500, 8, generator=GENERATOR, dtype=torch.float64) @ MIX
W = torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64)


def moments(rows):
    seen = Moments.empty(rows.shape[1])
    for part in rows.split(77):
        seen.add(part)
    return seen


def lstsq_error(kept):
    kept = list(kept)
    solution, *_ = np.linalg.lstsq(X[:, kept].numpy(), (X @ W.T).numpy(), rcond=None)
    return float(np.square(X[:, kept].numpy() @ solution - (X @ W.T).numpy()).sum() / len(X)), torch.tensor(solution).T


def test_moments_match_numpy():
    seen = moments(X)
    torch.testing.assert_close(seen.second_DD, X.T @ X / len(X))
    torch.testing.assert_close(seen.mean_D, X.mean(0))
    torch.testing.assert_close(seen.variance_D, torch.tensor(np.var(X.numpy(), axis=0, ddof=1)))


def test_moments_of_wide_rows_match_their_definition() -> None:
    """Rows of 1,030 channels are multiplied in float32, block by block; the blocks are not of one size."""
    rows = torch.randn(1300, 1030, generator=GENERATOR)
    seen = moments(rows)
    exact = rows.double()
    torch.testing.assert_close(seen.second_DD, exact.T @ exact / 1300, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen.square_DD, seen.square_DD.T)


def test_rows_judge_as_their_moments_do() -> None:
    kept = torch.tensor([0, 2, 3, 6])
    judge, equations = JudgingRows(W, kept, X), seen(W, moments(X), kept)
    assert judge.power == pytest.approx(equations.power)
    for new in (W[:, kept], torch.randn(len(W), 4, dtype=torch.float64)):
        assert judge.error(new) == pytest.approx(equations.error(new), rel=1e-9)


def test_reconstruction_is_the_least_squares_solution():
    kept = torch.tensor([0, 2, 3, 7])
    want_error, want = lstsq_error(kept.tolist())
    got = reconstruct(W, moments(X).second_DD, kept, 1e-12)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert error(W, moments(X).second_DD, kept, got) == pytest.approx(want_error, rel=1e-7)
    assert want_error < error(W, moments(X).second_DD, kept, W[:, kept]), "plain pruning must be worse"


def test_all_channels_kept_changes_nothing_and_heavy_damping_gives_plain_pruning():
    everything = torch.arange(8)
    torch.testing.assert_close(reconstruct(W, moments(X).second_DD, everything, 1e-2), W, rtol=1e-9, atol=1e-9)
    kept = torch.tensor([1, 4])
    torch.testing.assert_close(reconstruct(W, moments(X).second_DD, kept, 1e9), W[:, kept], rtol=1e-6, atol=1e-6)


def test_singular_moments_are_solved():
    doubled = torch.cat([X, X], dim=1)
    weight = torch.cat([W, W], dim=1)
    got = reconstruct(weight, moments(doubled).second_DD, torch.arange(8), 1e-12)
    torch.testing.assert_close(got, 2 * W, rtol=1e-4, atol=1e-4)


def test_damping_is_chosen_by_the_part_that_was_not_fitted():
    fit, judge = moments(X[:9]), moments(X[9:])
    kept = torch.tensor([0, 1, 2, 3, 4])
    chosen = best_damping(seen(W, fit, kept), [seen(W, judge, kept)])
    errors = {damping: error(W, judge.second_DD, kept, reconstruct(W, fit.second_DD, kept, damping)) for damping in (1e-6, 1e-2, chosen)}
    assert errors[chosen] == min(errors.values())


def seen(weight: torch.Tensor, part: Moments, kept: torch.Tensor) -> NormalEquations:
    found = NormalEquations(weight, kept)
    found.add(part.square_DD)
    return found


def test_equations_know_the_error_of_any_weights_and_several_parts_add_up() -> None:
    kept = torch.tensor([0, 2, 3, 6])
    first, then = moments(X[:9]), moments(X[9:])
    both = seen(W, first, kept)
    both.include(seen(W, then, kept))
    for new in (W[:, kept], torch.randn(len(W), 4, dtype=torch.float64)):
        direct = float((X @ W.T - X[:, kept] @ new.T).square().sum())
        assert both.error(new) == pytest.approx(direct, rel=1e-9)
    torch.testing.assert_close(both.solve(1e-6), seen(W, moments(X), kept).solve(1e-6))


@pytest.mark.parametrize("outputs", [5, 20])
def test_each_removal_is_the_cheapest_and_its_price_is_right(outputs):
    weight = torch.randn(outputs, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    order, costs = removal_order(weight, moments(X).second_DD, damping=1e-13)

    def cost(gone):
        kept = [channel for channel in range(8) if channel not in gone]
        if not kept:
            return float((X @ weight.T).square().sum() / len(X))
        solution, *_ = np.linalg.lstsq(X[:, kept].numpy(), (X @ weight.T).numpy(), rcond=None)
        return float(np.square(X[:, kept].numpy() @ solution - (X @ weight.T).numpy()).sum() / len(X))

    gone: list[int] = []
    for unit, price in zip(order, costs, strict=True):
        steps = {other: cost([*gone, other]) - (cost(gone) if gone else 0.0) for other in range(8) if other not in gone}
        assert unit == min(steps, key=steps.__getitem__)
        assert price == pytest.approx(steps[unit], rel=1e-5)
        gone.append(unit)


def test_blocks_leave_together_and_the_first_is_the_best_of_all():
    order, costs = removal_order(W, moments(X).second_DD, block=2, damping=1e-13)
    alone = {unit: lstsq_error([c for c in range(8) if c // 2 != unit])[0] for unit in range(4)}
    assert order[0] == min(alone, key=alone.__getitem__)
    assert costs[0] == pytest.approx(min(alone.values()), rel=1e-5)
    assert sorted(order) == [0, 1, 2, 3]
    assert sum(costs) == pytest.approx(float((X @ W.T).square().sum() / len(X)), rel=1e-6)


def test_the_metric_of_the_output_decides_what_is_cheap():
    only_first = torch.zeros(5, 5, dtype=torch.float64)
    only_first[0, 0] = 1.0
    order, costs = removal_order(W, moments(X).second_DD, damping=1e-13, metric_OO=only_first)
    want, _ = removal_order(W[:1], moments(X).second_DD, damping=1e-13)
    assert order[:4] == want[:4]
    assert sum(costs) == pytest.approx(float((X @ W[0]).square().mean()), rel=1e-6)


def test_greedy_is_far_better_than_chance_and_near_the_best_subset():
    _, costs = removal_order(W, moments(X).second_DD, damping=1e-13)
    errors = sorted(lstsq_error(kept)[0] for kept in combinations(range(8), 4))
    assert sum(costs[:4]) <= errors[len(errors) // 10]
    assert sum(costs[:4]) <= 2.0 * errors[0]


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="do not divide a width of 8"):
        removal_order(W, moments(X).second_DD, block=3)
    with pytest.raises(InputError, match="not finite"):
        reconstruct(W, moments(X).second_DD * torch.nan, torch.tensor([0]), 1e-3)


def test_with_several_kinds_of_text_the_one_that_is_fitted_worst_chooses_the_damping() -> None:
    """Text of another kind, which the fit has not seen, wants more of the old weights than text of the same kind does."""
    weight = torch.randn(6, 12, dtype=torch.float64)
    kept = torch.arange(8)

    def drawn(mixing: torch.Tensor, rows: int) -> Moments:
        moments = Moments.empty(12)
        moments.add(torch.randn(rows, 12, dtype=torch.float64) @ mixing)
        return moments

    own = torch.randn(12, 12, dtype=torch.float64)
    other = torch.randn(12, 12, dtype=torch.float64)
    fit, same, strange = drawn(own, 200), drawn(own, 200), drawn(other, 200)
    equations, alike, unlike = (seen(weight, part, kept) for part in (fit, same, strange))
    alone = best_damping(equations, [alike])
    both = best_damping(equations, [alike, unlike])
    assert both > alone

    def relative(part: Moments, damping: float) -> float:
        old = float((weight @ part.square_DD @ weight.T).trace())
        return error(weight, part.square_DD, kept, equations.solve(damping)) / old

    worst = {damping: max(relative(same, damping), relative(strange, damping)) for damping in DAMPINGS}
    assert worst[both] == min(worst.values())
    assert best_damping(equations, [alike, alike]) == alone
