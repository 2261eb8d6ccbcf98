"""What a word of effort decides, and what it rules out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.groups.discover import discover
from regraft.models.view import ModelView
from regraft.pipelines.prune.effort import EFFORTS, forecast, passes_of
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
    assert passes[0] < 0.5 * passes[1] < 0.5 * passes[2]
    line = forecast(view, groups, decided[0], torch.randint(3, 96, (32, 16)))
    assert line.startswith("effort quick: at most about ")
    assert "minutes on this machine" in line
