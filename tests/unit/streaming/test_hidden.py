"""Hidden states in memory and on disk give back what was put."""

from __future__ import annotations

import pytest
import torch

from regraft.errors import OutputError
from regraft.streaming.hidden import InMemory, OnDisk, room_for

SHAPE = (5, 4, 3)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_slots_keep_what_was_put(tmp_path, where):
    path = tmp_path / "hidden"
    states = {slot: torch.randn(SHAPE) for slot in (0, 3, 1)}
    with InMemory(SHAPE) if where == "memory" else OnDisk(path, SHAPE) as hidden:
        for slot, values in states.items():
            hidden.put(slot, 0, values[:2])
            hidden.put(slot, 2, values[2:])
        hidden.put(3, 4, states[1][4:])
        states[3][4] = states[1][4]
        hidden.drop(1)
        for slot in (0, 3):
            assert torch.equal(hidden.get(slot, 0, 5), states[slot])
            assert torch.equal(hidden.get(slot, 3, 2), states[slot][3:])
        assert path.exists() == (where == "disk")
    assert not path.exists()


def test_what_the_disk_has_no_room_for_is_refused(tmp_path):
    room_for(tmp_path, 1)
    with pytest.raises(OutputError, match=r"need 1000000000\.00 GB on the disk of .* free; free some space, or use fewer `samples`"):
        room_for(tmp_path, 10**18)
