"""Completing planted matrices: full, compressed and narrow, with the controls that must fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from planted import plant, seen
from regraft.completion.descent import Descent, Outcome, automatic_step, descend
from regraft.completion.entries import EntryList, Observed, WholeMatrix
from regraft.errors import InputError, TrainingError
from regraft.numerics.chain import Chain, compressed_start, full_start, narrow_start
from regraft.numerics.frames import compact_frames

SIZE, RANK, DEPTH, SCALE = 60, 2, 3, 1e-2


class Problem:
    """A 60 x 60 matrix of rank 2, 40 % seen."""

    def __init__(self, seed: int = 0) -> None:
        self.target = 20.0 * plant(SIZE, SIZE, RANK, seed)
        self.mask = seen(SIZE, SIZE, 0.4, seed)
        places = self.mask.nonzero()
        self.entries = EntryList(places[:, 0], places[:, 1], self.target[self.mask], (SIZE, SIZE))
        self.generator = torch.Generator().manual_seed(seed)
        self.triplets = self.entries.top_triplets(RANK, self.generator)
        self.step = automatic_step(float(self.triplets.values[0]), self.entries.share, DEPTH, 0.01, safety=1.0)

    def compressed(self, gamma: float, rank: int = RANK) -> Chain:
        frames = compact_frames(self.entries.top_triplets(rank, self.generator), self.generator)
        return compressed_start(frames, DEPTH, SCALE, gamma)

    def full(self) -> Chain:
        return full_start((SIZE, SIZE), DEPTH, SCALE, self.generator)

    def narrow(self) -> Chain:
        return narrow_start((SIZE, SIZE), 2 * RANK, DEPTH, SCALE, self.generator)

    def unseen_error(self, fitted: Tensor) -> float:
        truth = self.target[~self.mask]
        return float((fitted[~self.mask] - truth).square().sum() / truth.square().sum())

    def run(self, chain: Chain, observed: Observed | None = None, **changed: Any) -> Outcome:
        settings = {"step_size": self.step, "max_iterations": 40_000, **changed}
        return descend(chain, observed or self.entries, Descent(**settings))


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


@pytest.fixture(scope="module")
def full(problem: Problem) -> Outcome:
    return problem.run(problem.full(), WholeMatrix(problem.target, problem.mask))


@pytest.mark.long
def test_compressed_needs_as_many_iterations_as_full(problem: Problem, full: Outcome) -> None:
    small = problem.run(problem.compressed(0.01))
    assert full.converged
    assert small.converged
    assert small.iterations <= 1.15 * full.iterations
    assert problem.unseen_error(full.chain.end_to_end()) < 1e-10
    assert problem.unseen_error(small.chain.end_to_end()) < 1e-10


@pytest.mark.long
def test_narrow_needs_half_as_many_again(problem: Problem, full: Outcome) -> None:
    narrow = problem.run(problem.narrow(), max_iterations=round(1.5 * full.iterations))
    assert not narrow.converged


@pytest.mark.long
def test_frozen_outer_factors_stall(problem: Problem, full: Outcome) -> None:
    """With entries missing the subspace drifts; gamma = 0 cannot follow."""
    stalled = problem.run(problem.compressed(0.0), max_iterations=round(1.3 * full.iterations))
    assert stalled.loss > 1e-4
    earlier = next(loss for iteration, loss in stalled.losses if iteration >= 1.1 * full.iterations)
    assert stalled.loss > 0.99 * earlier  # a plateau, not a slope


@pytest.mark.long
def test_too_small_a_rank_cannot_fit_with_frozen_outer_factors(problem: Problem) -> None:
    whole = WholeMatrix(problem.target)
    frames = compact_frames(whole.top_triplets(1, problem.generator), problem.generator)
    lacking = problem.run(compressed_start(frames, DEPTH, SCALE, 0.0), whole, max_iterations=20_000)
    enough = compact_frames(whole.top_triplets(RANK, problem.generator), problem.generator)
    fitted = problem.run(compressed_start(enough, DEPTH, SCALE, 0.0), whole, max_iterations=20_000)
    assert lacking.loss > 0.1
    assert fitted.loss < 1e-12


@pytest.mark.slow
def test_full_and_narrow_run_on_entry_lists_too(problem: Problem) -> None:
    """The same steps as with a dense mask, from lists that never form the residual."""
    dense = WholeMatrix(problem.target, problem.mask)
    for chain in (problem.full(), problem.narrow(), problem.compressed(0.01)):
        by_mask = problem.run(chain, dense, max_iterations=200)
        by_list = problem.run(chain, problem.entries, max_iterations=200)
        torch.testing.assert_close(by_mask.chain.end_to_end(), by_list.chain.end_to_end(), rtol=1e-9, atol=1e-14)


@pytest.mark.long
def test_momentum_completes_the_matrix_in_a_third_of_the_iterations(problem: Problem, full: Outcome) -> None:
    """The heavy ball at 0.9 moves about ten times as far."""
    done = problem.run(problem.compressed(0.01), optimizer="momentum", tolerance=1e-10, max_iterations=20_000)
    assert done.converged
    assert done.iterations < 0.3 * full.iterations
    assert problem.unseen_error(done.chain.end_to_end()) < 1e-8


@pytest.mark.long
def test_adam_completes_the_matrix(problem: Problem) -> None:
    """At a fixed rate Adam ends in an oscillation, whose size hangs on the rounding of the machine: 1e-7 lies above all that were seen."""
    done = problem.run(problem.compressed(0.01), optimizer="adam", step_size=1e-2, tolerance=1e-7, max_iterations=20_000)
    assert done.converged
    assert problem.unseen_error(done.chain.end_to_end()) < 1e-5


@pytest.mark.parametrize("depth", [2, 4])
def test_other_depths_complete_it_too(problem: Problem, depth: int) -> None:
    frames = compact_frames(problem.triplets, problem.generator)
    step = automatic_step(float(problem.triplets.values[0]), problem.entries.share, depth, 0.01)
    start = compressed_start(frames, depth, 1e-3 if depth == 2 else 0.2, 0.01)
    done = problem.run(start, step_size=step, optimizer="momentum", tolerance=1e-10)
    assert done.converged
    assert problem.unseen_error(done.chain.end_to_end()) < 1e-8


@pytest.mark.slow
def test_rectangular_matrices_are_completed() -> None:
    target, mask = plant(50, 80, 2), seen(50, 80, 0.4)
    places = mask.nonzero()
    entries = EntryList(places[:, 0], places[:, 1], target[mask], (50, 80))
    generator = torch.Generator().manual_seed(0)
    triplets = entries.top_triplets(2, generator)
    step = automatic_step(float(triplets.values[0]), entries.share, 3, 0.01)
    start = compressed_start(compact_frames(triplets, generator), 3, 1e-3, 0.01)
    done = descend(start, entries, Descent(step, "momentum", tolerance=1e-12))
    assert done.converged
    assert float((done.chain.end_to_end() - target)[~mask].abs().max()) < 1e-4


def test_too_large_a_step_says_what_to_lower(problem: Problem) -> None:
    with pytest.raises(TrainingError, match=r"diverged at iteration .* lower the step size") as refusal:
        problem.run(problem.compressed(1.0), step_size=20 * problem.step)
    assert "\n" not in str(refusal.value)


def test_a_watch_sees_the_chain_and_can_stop(problem: Problem) -> None:
    seen_at: list[int] = []

    def watch(iteration: int, chain: Chain, loss: float) -> bool:
        assert chain.shape == (SIZE, SIZE)
        assert loss <= 1.0 + 1e-6
        seen_at.append(iteration)
        return iteration >= 40

    stopped = descend(problem.compressed(0.01), problem.entries, Descent(problem.step, watch_every=20), watch)
    assert seen_at == [0, 20, 40]
    assert stopped.iterations == 40


def test_the_start_is_not_changed_and_the_result_is_the_same_twice(problem: Problem) -> None:
    start = problem.compressed(0.01)
    kept = start.clone()
    one = problem.run(start, max_iterations=50)
    other = problem.run(start, max_iterations=50)
    assert all(torch.equal(before, after) for before, after in zip(kept.factors, start.factors, strict=True))
    assert torch.equal(one.chain.end_to_end(), other.chain.end_to_end())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step_size": -1.0}, "step size -1"),
        ({"step_size": 0.1, "momentum": 1.0}, "momentum 1 is not below 1"),
        ({"step_size": 0.1, "weight_decay": -0.1}, "weight decay -0.1"),
        ({"step_size": 0.1, "optimizer": "sgd"}, "unknown optimizer 'sgd'; known: adam, gd, momentum"),
        ({"step_size": 0.1, "max_iterations": 2.5}, "max iterations 2.5 is not a whole number"),
        ({"step_size": float("nan")}, "step size nan"),
    ],
)
def test_impossible_descents_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Descent(**settings)


def test_factors_of_another_shape_are_refused(problem: Problem) -> None:
    with pytest.raises(InputError, match="build them for one shape"):
        descend(problem.compressed(0.01), WholeMatrix(plant(5, 6, 1)), Descent(0.1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_the_same_steps(problem: Problem) -> None:
    start = problem.compressed(0.01)
    cpu = problem.run(start, max_iterations=200)
    gpu = problem.run(start.to("cuda"), problem.entries.to("cuda"), max_iterations=200)
    torch.testing.assert_close(gpu.chain.end_to_end().cpu(), cpu.chain.end_to_end(), rtol=1e-9, atol=1e-13)
