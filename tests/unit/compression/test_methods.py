"""Every method against its definition, written out densely on rows that the test keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.compression import COMPRESSORS, Evidence
from regraft.compression.fisher import DAMPING
from regraft.errors import InputError
from regraft.numerics.moments import Moments
from regraft.numerics.pooled import PooledMoments
from regraft.numerics.truncation import Factors

METHODS = ("svd", "asvd", "svd_llm", "bolaco", "fisher")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = draw(4, 50, 12, seed=1) * torch.linspace(0.05, 2.0, 12, dtype=torch.float64) + draw(12, seed=2)
GRADIENTS = draw(200, 8, seed=3) @ draw(8, 8, seed=4)


def evidence(shape: tuple[int, int] = (8, 12), inputs: Tensor = INPUTS, gradients: Tensor = GRADIENTS) -> Evidence:
    seen = PooledMoments.empty(inputs.shape[-1], len(inputs))
    for group, rows in enumerate(inputs):
        seen.add(rows, group)
    felt = Moments.empty(gradients.shape[-1])
    felt.add(gradients)
    return Evidence("layers.0.q_proj", draw(*shape, seed=5), seen, felt)


def product(factors: Factors) -> Tensor:
    return factors.left_OR @ factors.right_RI


@pytest.mark.parametrize("name", METHODS)
def test_full_rank_changes_nothing(name: str) -> None:
    one = evidence()
    found = COMPRESSORS.get(name).truncate(one)
    factors = found.at(8)
    torch.testing.assert_close(product(factors), one.weight_OI, rtol=1e-7, atol=1e-7)
    assert factors.bias_O is None or float(factors.bias_O.abs().max()) < 1e-6
    assert (found.mean_I is not None) == COMPRESSORS.get(name).adds_bias


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_llm_loses_exactly_what_it_drops(rank: int) -> None:
    """E|Wx - W'x|^2 over the calibration rows is the sum of the dropped squared singular values of W times the Cholesky factor."""
    one = evidence()
    found = COMPRESSORS.get("svd_llm").truncate(one)
    rows = INPUTS.reshape(-1, 12)
    lost = float((rows @ (one.weight_OI - product(found.at(rank))).T).square().sum(dim=1).mean())
    assert lost == pytest.approx(float(found.damage()[rank]), rel=1e-6)
    whitened = one.weight_OI @ torch.linalg.cholesky(rows.T @ rows / len(rows))
    dropped = torch.linalg.svdvals(whitened)[rank:].square().sum()
    assert lost == pytest.approx(float(dropped), rel=1e-6)


@pytest.mark.parametrize("rank", [2, 5])
def test_bolaco_is_the_papers_formula(rank: int) -> None:
    """B = U_r, A = U_r' W and (I - U_r U_r') E[Y] from the pooled covariance of the outputs, which nobody here computes from inputs."""
    one = evidence()
    factors = COMPRESSORS.get("bolaco").truncate(one).at(rank)
    outputs = INPUTS @ one.weight_OI.T
    pooled = torch.stack([torch.cov(group.T) for group in outputs]).mean(dim=0)
    leading = torch.linalg.eigh(pooled)[1][:, -rank:]
    projector = leading @ leading.T
    torch.testing.assert_close(product(factors), projector @ one.weight_OI, rtol=1e-6, atol=1e-8)
    mean = outputs.reshape(-1, 8).mean(dim=0)
    assert factors.bias_O is not None
    torch.testing.assert_close(factors.bias_O, mean - projector @ mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["bolaco", "fisher"])
def test_the_bias_keeps_the_mean_of_the_outputs(name: str) -> None:
    one = evidence()
    factors = COMPRESSORS.get(name).truncate(one).at(2)
    rows = INPUTS.reshape(-1, 12)
    assert factors.bias_O is not None
    before, after = rows @ one.weight_OI.T, rows @ product(factors).T + factors.bias_O
    torch.testing.assert_close(after.mean(dim=0), before.mean(dim=0), rtol=1e-9, atol=1e-9)
    assert float((rows @ product(factors).T).mean(dim=0).sub(before.mean(dim=0)).abs().max()) > 1e-2, "without the bias it would be another"


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_fisher_charges_half_the_quadratic_form(rank: int) -> None:
    """The price is 1/2 tr(G D C D') by its definition, and that is half the sum of the dropped squared singular values."""
    one = evidence()
    found = COMPRESSORS.get("fisher").truncate(one)
    gap = one.weight_OI - product(found.at(rank))
    second = GRADIENTS.T @ GRADIENTS / len(GRADIENTS)
    metric = (1.0 - DAMPING) * second + DAMPING * second.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    covariance = torch.stack([torch.cov(group.T) for group in INPUTS]).mean(dim=0)
    charged = 0.5 * float((metric @ gap @ covariance @ gap.T).trace())
    assert charged == pytest.approx(float(found.damage()[rank]), rel=1e-6)
    left, right = torch.linalg.cholesky(metric), torch.linalg.cholesky(covariance)
    singular = torch.linalg.svdvals(left.T @ one.weight_OI @ right)
    assert charged == pytest.approx(0.5 * float(singular[rank:].square().sum()), rel=1e-6)


def test_fisher_knows_which_outputs_matter() -> None:
    """Where one output alone moves the predictions, one rank keeps almost all of it; SVD-LLM keeps what is large."""
    gradients = torch.zeros(200, 8, dtype=torch.float64)
    gradients[:, 3] = draw(200, seed=6)
    one = evidence(gradients=gradients)
    rows = INPUTS.reshape(-1, 12) - INPUTS.reshape(-1, 12).mean(dim=0)

    def lost(name: str) -> float:
        return float((rows @ (one.weight_OI - product(COMPRESSORS.get(name).truncate(one).at(1)))[3]).square().mean())

    assert lost("fisher") < 0.2 * lost("svd_llm")


def test_asvd_scales_by_the_root_of_the_mean_magnitude() -> None:
    one = evidence()
    scale = INPUTS.reshape(-1, 12).abs().mean(dim=0).sqrt()
    u, s, v = torch.linalg.svd(one.weight_OI * scale, full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ v[:3] / scale
    torch.testing.assert_close(product(COMPRESSORS.get("asvd").truncate(one).at(3)), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_in_a_subspace(name: str) -> None:
    """Fewer rows than channels: no method fails or explodes, and those that look at the outputs are exact on the rows that they saw."""
    few = INPUTS[:1, :5]
    one = evidence(inputs=few)
    factors = COMPRESSORS.get(name).truncate(one).at(6)
    assert torch.isfinite(product(factors)).all()
    assert float(torch.linalg.matrix_norm(product(factors))) < 20 * float(torch.linalg.matrix_norm(one.weight_OI))
    if name in ("svd_llm", "bolaco", "fisher"):
        bias = 0.0 if factors.bias_O is None else factors.bias_O
        torch.testing.assert_close(few @ product(factors).T + bias, few @ one.weight_OI.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["asvd", "svd_llm", "bolaco", "fisher"])
def test_nothing_seen_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=r"layers\.0\.q_proj"):
        COMPRESSORS.get(name).truncate(Evidence("layers.0.q_proj", draw(8, 12)))


@pytest.mark.parametrize("name", ["asvd", "svd_llm", "bolaco", "fisher"])
def test_inputs_that_are_not_finite_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=r"layers\.0\.q_proj.*NaN"):
        COMPRESSORS.get(name).truncate(evidence(inputs=torch.full_like(INPUTS, torch.nan)))


def test_the_registry_has_them_all() -> None:
    assert set(METHODS) <= set(COMPRESSORS)
