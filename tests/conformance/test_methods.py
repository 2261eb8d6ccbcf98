"""Every built-in method goes through the suite that authors of methods get; that the suite finds faults is shown in tests/unit/testing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adapter_toys import FORMS
from regraft.allocation import ALLOCATORS
from regraft.compression import COMPRESSORS
from regraft.compression.fisher import DAMPING
from regraft.export import EXPORTERS, AdapterFormat
from regraft.importance import CRITERIA
from regraft.selection import SELECTORS
from regraft.testing import (
    Watched,
    check_adapter,
    check_allocator,
    check_compressor,
    check_criterion,
    check_exporter,
    check_selector,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CRITERIA.names())
def test_criteria_conform(name: str) -> None:
    check_criterion(CRITERIA.get(name))


@pytest.mark.parametrize("name", SELECTORS.names())
def test_selectors_conform(name: str) -> None:
    check_selector(SELECTORS.get(name))


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_allocators_conform(name: str) -> None:
    check_allocator(ALLOCATORS.get(name))


def within_groups(layer: Watched) -> Tensor:
    """Returns the mean of the covariances within each group of inputs."""
    return torch.stack([torch.cov(rows.T) for rows in layer.inputs_GNI]).mean(dim=0)


def off(layer: Watched, change: Tensor, bias: Tensor) -> Tensor:
    """Returns how far the mean of the outputs is off; the bias is to make it zero."""
    return change @ layer.inputs_GNI.flatten(0, 1).mean(dim=0) + bias


def fisher_form(layer: Watched, change: Tensor, bias: Tensor) -> float:
    gradients, mean = layer.gradients_NO, off(layer, change, bias)
    second = gradients.T @ gradients / len(gradients)
    metric = (1.0 - DAMPING) * second + DAMPING * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    return 0.5 * float((metric @ change @ within_groups(layer) @ change.T).trace() + mean @ metric @ mean)


# What each method minimises, from its paper, on rows that the method never sees.
LOST: dict[str, Callable[[Watched, Tensor, Tensor], float]] = {
    "svd": lambda layer, change, bias: float(change.square().sum()),
    "asvd": lambda layer, change, bias: float((change * layer.inputs_GNI.flatten(0, 1).abs().mean(dim=0).sqrt()).square().sum()),
    "svd_llm": lambda layer, change, bias: float((layer.inputs_GNI.flatten(0, 1) @ change.T + bias).square().sum(dim=1).mean()),
    "bolaco": lambda layer, change, bias: float((change @ within_groups(layer) @ change.T).trace() + off(layer, change, bias).norm() ** 2),
    "fisher": fisher_form,
}


@pytest.mark.parametrize("name", COMPRESSORS.names())
def test_compressors_conform(name: str) -> None:
    check_compressor(COMPRESSORS.get(name), LOST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_adapters_conform(name: str) -> None:
    check_adapter(FORMS[name])


@pytest.mark.parametrize("name", [name for name in EXPORTERS.names() if isinstance(EXPORTERS.get(name), AdapterFormat)])
def test_formats_of_adapters_conform(name: str) -> None:
    check_exporter(EXPORTERS.get(name))
