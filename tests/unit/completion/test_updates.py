"""Our update rules take the steps that torch.optim takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from regraft.completion.updates import ADAM_EPSILON, Adam, HeavyBall, Moved, Update

RULES: dict[str, tuple[Callable[[Sequence[Moved]], Update], Callable[[Any], torch.optim.Optimizer]]] = {
    "gd": (HeavyBall, lambda groups: torch.optim.SGD(groups, lr=1.0)),
    "momentum": (lambda moved: HeavyBall(moved, 0.8), lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.8)),
    "adam": (lambda moved: Adam(moved, 0.7), lambda groups: torch.optim.Adam(groups, betas=(0.7, 0.999), eps=ADAM_EPSILON)),
}


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_steps_equal_those_of_torch(rule: str, decay: float, generator: torch.Generator) -> None:
    ours_of, theirs_of = RULES[rule]
    starts = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    ours, theirs = [start.clone() for start in starts], [start.clone() for start in starts]
    rates = (0.1, 0.01)
    update = ours_of([Moved(tensor, rate, decay) for tensor, rate in zip(ours, rates, strict=True)])
    optimizer = theirs_of([{"params": [t], "lr": rate, "weight_decay": decay} for t, rate in zip(theirs, rates, strict=True)])
    for _ in range(20):
        update.apply([tensor**3 - 0.5 for tensor in ours])  # any smooth gradient
        for tensor in theirs:
            tensor.grad = tensor**3 - 0.5
        optimizer.step()
    for one, other, start in zip(ours, theirs, starts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
        assert float((one - start).abs().max()) > 1e-3
