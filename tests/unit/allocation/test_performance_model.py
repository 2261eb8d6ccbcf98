"""The concave performance model: its derivatives, its posterior against a dense formula, what it finds, and what it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from regraft.allocation.concave import correction_kernel, design_of
from regraft.allocation.features import standardized
from regraft.allocation.fill import fill, random_vectors
from regraft.allocation.fitting import fit
from regraft.allocation.observations import observe, stacked
from regraft.allocation.perceptron import PaperRankAdaptor
from regraft.allocation.prior import default_prior
from regraft.allocation.rankadaptor import RankAdaptor, expected_improvement
from regraft.plans import RankTrial
from regraft.testing.planted import World, all_vectors


def measured(world: World, count: int, fidelity: float = 1.0, seed: int = 0) -> list[RankTrial]:
    vectors = [world.uniform, *random_vectors(world.space, count - 1, {world.uniform}, np.random.default_rng(seed))]
    return [world.trial(ranks, fidelity) for ranks in vectors]


def test_gains_are_concave_pinned_at_uniform_and_their_derivatives_are_right() -> None:
    world = World(5)
    design = design_of(world.space, default_prior())
    draw = np.random.default_rng(0)
    parameters = design.mean + 0.3 * draw.standard_normal(len(design.mean))
    table, _ = design.tables(parameters)
    assert table[:, world.space.choices.index(8)] == pytest.approx(0.0)
    assert (np.diff(table) > 0).all()
    assert (np.diff(table, n=2) < 0).all()
    choices = stacked(world.space, [world.uniform, (2, 12, 4, 6, 10)])
    _, jacobian = design.gains(parameters, choices)
    for place in [0, 1, *range(4, len(parameters))]:
        step = np.zeros_like(parameters)
        step[place] = 1e-6
        high, low = (design.gains(parameters + sign * step, choices)[0].sum(1) for sign in (1, -1))
        assert jacobian[:, place] == pytest.approx((high - low) / 2e-6, abs=1e-6)


def test_the_posterior_is_the_gaussian_one_of_the_linearised_model() -> None:
    """Against the textbook formula with the dense prior covariance of all parameters, without the function's shortcuts."""
    world = World(4, noise_nats=0.002)
    trials = measured(world, 9)
    posterior = fit(world.space, trials, default_prior())
    design, seen = posterior.design, observe(world.space, trials)
    parameters, shared = posterior.parameters, design.shared
    prior = np.zeros((len(parameters), len(parameters)))
    prior[:shared, :shared] = design.shared_covariance
    spreads = [posterior.spread**2] * 4 + [0.6**2] * 4
    prior[range(shared, shared + 8), range(shared, shared + 8)] = spreads
    gains, jacobian = design.gains(parameters, seen.choices)
    correction = posterior.correction_nats**2
    kernel = correction_kernel(world.space, seen.choices, seen.choices)
    losses = seen.losses - seen.losses.mean()
    offset = 100.0 * losses.std() ** 2 + 1e-12
    covariance = jacobian @ prior @ jacobian.T + correction * kernel + offset + posterior.noise_nats**2 * np.eye(9)
    target = losses + gains.sum(1) - jacobian @ (parameters - design.mean)
    asked = all_vectors(world.space)[:30]
    there, slope = design.gains(parameters, stacked(world.space, asked))
    cross = slope @ prior @ -jacobian.T - correction * correction_kernel(world.space, stacked(world.space, asked), seen.choices)
    mean, spread = posterior.moments(asked)
    own = slope @ prior @ slope.T + correction * correction_kernel(world.space, stacked(world.space, asked), stacked(world.space, asked))
    assert spread == pytest.approx(own - cross @ np.linalg.solve(covariance, cross.T), abs=1e-9)
    # The mean: the gains at the mode, and what the correction learns beside them.
    learned = -correction * correction_kernel(world.space, stacked(world.space, asked), seen.choices)
    assert mean == pytest.approx(there.sum(1) + learned @ np.linalg.solve(covariance, target), abs=1e-6)


def test_trials_at_uniform_know_that_uniform_gains_nothing() -> None:
    world = World(5)
    mean, spread = fit(world.space, measured(world, 8), default_prior()).moments([world.uniform])
    assert mean[0] == pytest.approx(0.0, abs=1e-9)
    assert spread[0, 0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
def test_planted_gains_are_found_and_the_uncertainty_is_honest() -> None:
    inside, errors, prior_errors = 0, 0.0, 0.0
    for seed in range(6):
        world = World(6, seed=seed, noise_nats=0.001)
        posterior = fit(world.space, measured(world, 24, seed=seed), default_prior())
        asked = random_vectors(world.space, 20, set(), np.random.default_rng(100 + seed))
        mean, spread = posterior.moments(asked)
        truth = np.array([world.gain(ranks) for ranks in asked])
        inside += int((np.abs(mean - truth) < 2 * np.sqrt(np.diag(spread))).sum())
        errors += float(((mean - truth) ** 2).sum())
        prior_errors += float((truth**2).sum())
        best = world.gain(fill(world.space, world.table))
        assert world.gain(fill(world.space, posterior.table())) > 0.85 * best
    assert errors < 0.1 * prior_errors
    assert inside >= 0.85 * 120


def test_short_recoveries_and_elastic_scores_help() -> None:
    world = World(8, seed=3, noise_nats=0.002)
    real = measured(world, 6)
    elastic = [replace(trial, kind="elastic") for trial in measured(world, 40, seed=5)]
    asked = random_vectors(world.space, 30, set(), np.random.default_rng(9))
    truth = np.array([world.gain(ranks) for ranks in asked])
    alone, helped = (fit(world.space, trials, default_prior()).moments(asked)[0] for trials in (real, real + elastic))
    assert ((helped - truth) ** 2).sum() < 0.5 * ((alone - truth) ** 2).sum()


def test_the_order_of_trials_and_a_constant_loss_change_nothing() -> None:
    world = World(5, seed=1)
    trials = measured(world, 10)
    asked = all_vectors(world.space)[::40]
    moved = [replace(trial, loss_nats=(trial.loss_nats or 0.0) + 2.0) for trial in reversed(trials)]
    first, second = (fit(world.space, each, default_prior()).moments(asked)[0] for each in (trials, moved))
    assert first == pytest.approx(second, abs=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("learner", [RankAdaptor(default_prior()), PaperRankAdaptor()])
def test_cross_validation_tells_a_gain_from_noise(learner: RankAdaptor | PaperRankAdaptor) -> None:
    """The negative control: on noise alone no model may claim to explain anything."""
    world = World(4, seed=4, noise_nats=0.0005)
    planted = learner.assess(world.space, measured(world, 30))
    assert planted is not None
    assert planted.r2 > 0.3
    assert planted.rank_correlation > 0.5
    shares = []
    for seed in range(4):
        noise = World(4, seed=seed, noise_nats=0.01, total_nats=0.0)
        error = learner.assess(noise.space, measured(noise, 30, seed=seed))
        assert error is not None
        shares.append(error.r2)
    assert np.mean(shares) <= 0.05
    assert learner.assess(world.space, measured(world, 5)) is None


def test_expected_improvement_is_the_integral() -> None:
    draws = np.random.default_rng(0).standard_normal(400_000)
    for mean, deviation, best in ((0.0, 1.0, 0.5), (2.0, 0.5, 1.0), (-1.0, 2.0, 1.0)):
        sampled = np.maximum(mean + deviation * draws - best, 0.0).mean()
        assert expected_improvement(np.array([mean]), np.array([deviation**2]), best)[0] == pytest.approx(sampled, rel=0.02)
    assert expected_improvement(np.array([1.0, -1.0]), np.zeros(2), 0.0) == pytest.approx([1.0, 0.0])


def test_features_are_standardised_and_constant_ones_tell_nothing() -> None:
    world = World(6)
    found = standardized(world.space)
    assert set(found) == {"depth", "share_pruned"}
    for values in found.values():
        assert values.mean() == pytest.approx(0.0)
        assert values.std() == pytest.approx(1.0)
    flat = replace(world.space, slots=tuple(replace(slot, features={"share_pruned": 0.3}) for slot in world.space.slots))
    assert not standardized(flat)["share_pruned"].any()
