from __future__ import annotations

import pytest
import torch
from torch import nn

from regraft.models.trainable import replaced_forwards


def test_every_module_has_its_own_forward_again_also_after_an_error() -> None:
    plain, patched = nn.Linear(2, 2), nn.Linear(2, 2)
    rows = torch.ones(1, 2)
    patched.__dict__["forward"] = lambda x: x + 1
    before = plain(rows), patched(rows)

    def fail_inside() -> None:
        with replaced_forwards({plain: lambda x: 2 * x, patched: lambda x: 3 * x}):
            assert torch.equal(plain(rows), 2 * rows)
            assert torch.equal(patched(rows), 3 * rows)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(plain(rows), before[0])
    assert torch.equal(patched(rows), rows + 1)
    assert "forward" not in plain.__dict__
