from __future__ import annotations

import torch

from regraft.numerics.divergence import log_probabilities, mean_divergence


def test_the_mean_is_that_of_the_formula_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    dense, changed = (torch.randn(3, 5, 11, generator=draw, dtype=torch.float64) for _ in range(2))
    p, q = dense.softmax(-1), changed.softmax(-1)
    wanted = float((p * (p / q).log()).sum(-1).mean())
    pairs = [dense[:2], dense[2:]], [changed[:2], changed[2:]]
    found = mean_divergence(pairs[1], [log_probabilities(batch) for batch in pairs[0]])
    assert abs(found - wanted) < 1e-6
    assert found > 0.1
    assert abs(mean_divergence([dense], [log_probabilities(dense)])) < 1e-7
    assert log_probabilities(dense.bfloat16()).dtype == torch.float32
