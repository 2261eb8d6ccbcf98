"""What a word of effort decides, and what it rules out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.groups.discover import discover
from regraft.models.view import ModelView
from regraft.pipelines.prune.effort import EFFORTS, forecast, passes_of, seconds_of
from regraft.pipelines.prune.prune import cut_to_plan, plan_pruning
from regraft.pipelines.prune.resolved import resolve, resolve_replay
from regraft.settings import PruneSettings


def test_auto_is_decided_by_effort_and_memory() -> None:
    assert resolve(PruneSettings()).settings.criterion == "surgeon_nats"
    assert resolve(PruneSettings(memory="1GB")).settings.criterion == "surgeon"
    quick = resolve(PruneSettings(effort="quick")).settings
    assert (quick.samples, quick.reconstruct, quick.select) == (32, "least_squares", "knapsack")
    assert resolve(PruneSettings(effort="quick", samples=128)).settings.samples == 128
    assert resolve(PruneSettings()).settings.samples == 128
    assert resolve(PruneSettings(criterion="taylor")).settings.criterion == "taylor"


def test_what_was_decided_is_replayed_as_it_was() -> None:
    decided = resolve(PruneSettings(effort="quick")).settings
    again = PruneSettings.model_validate(decided.model_dump())
    assert resolve(again).settings == decided
    assert resolve_replay(again, None, 0).settings.samples == 32


def test_an_effort_that_contradicts_a_re_fit_is_refused() -> None:
    with pytest.raises(InputError, match="`effort=quick` takes no steps"):
        resolve(PruneSettings(effort="quick", reconstruct="divergence"))


def test_more_effort_takes_more_passes_and_is_said_before(make_model: Callable[..., PreTrainedModel]) -> None:
    view = ModelView(make_model())
    groups = discover(view, ("heads", "ffn"))
    decided = [resolve(PruneSettings(effort=word)).settings for word in EFFORTS]
    passes = [passes_of(settings, groups, settings.samples) for settings in decided]
    assert passes == sorted(passes)
    assert passes[0] < 0.6 * passes[1] < 0.4 * passes[2]
    line = forecast(view, groups, decided[0], torch.randint(3, 96, (32, 16)))
    assert line.startswith("effort quick: about ")
    assert "minutes on this machine" in line


class _Operations(TorchDispatchMode):
    """A clock that goes on by one with every floating-point operation of a matrix product inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__.removesuffix("_")
        count = flop_registry.get(getattr(torch.ops.aten, name, None))
        if count is not None:
            self.counted += count(*args, **(kwargs or {}), out_val=result)
        elif name == "cholesky_solve":
            self.counted += 2 * args[0].numel() * args[1].shape[-1]
        elif name == "linalg_cholesky_ex":
            self.counted += args[0].shape[-1] ** 3 // 3
        return result

    def __call__(self) -> float:
        return float(self.counted)


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["quick", "default"])
def test_what_is_said_is_what_it_takes(make_model: Callable[..., PreTrainedModel], effort: str) -> None:
    """By a clock that counts floating-point operations, so that no other work on the machine is felt."""
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 400}
    model = make_model("llama-bias", **sizes)
    view = ModelView(model)
    groups = discover(view, ("heads", "ffn"))
    resolved = resolve(PruneSettings(effort=effort, ratio=0.2, shape="per-layer"), view)
    windows = torch.randint(3, 96, (32, 48), generator=torch.Generator().manual_seed(1))
    with _Operations() as clock:
        said = seconds_of(view, groups, resolved.settings, windows, clock)
    with _Operations() as clock:
        plan = plan_pruning(model, groups, resolved, windows)
        cut_to_plan(model, groups, plan, resolved, windows)
    assert said / 1.5 < clock() < 1.5 * said
