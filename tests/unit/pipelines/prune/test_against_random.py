"""A planted choice that is worse than chance says so with every selector and when it is replayed; the opposite choice says nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from conftest import random_model
from folders import tiny_tokenizer
from regraft.importance import CRITERIA, Criterion, Evidence
from regraft.pipelines.prune.against_random import Chosen, worse_than_random
from regraft.pipelines.prune.prune import prune, replay
from regraft.selection import SELECTORS
from regraft.settings import PruneSettings

QUICK = {"reconstruct": "none", "samples": 10, "seq_len": 20, "align": 1, "targets": ("ffn",), "ratio": 0.12}
WORSE = "worse than random removal of the same size"


@pytest.fixture(scope="module")
def half_used() -> tuple[PreTrainedModel, list[str]]:
    """A model that was trained with the odd channels of its feed-forward networks alone, and its text."""
    model = random_model("llama")
    downs = [layer.mlp.down_proj.weight for layer in model.model.layers]
    with torch.no_grad():
        for down in downs:
            down[:, 0::2] = 0.0
            down[:, 1::2] *= 10.0
    text = torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        for down in downs:
            down.grad[:, 0::2] = 0.0
        optimiser.step()
    return model.eval(), tiny_tokenizer().batch_decode(text.repeat(6, 1))


@pytest.mark.slow
@pytest.mark.parametrize("select", [name for name in SELECTORS.names() if not SELECTORS.get(name).learned])  # which mends a bad order
def test_a_choice_that_is_worse_than_chance_says_so(
    half_used: tuple[PreTrainedModel, list[str]], monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    model, sentences = half_used
    for sign, warned in ((-1.0, True), (1.0, False)):

        def units(evidence: Evidence, sign: float = sign) -> dict[str, torch.Tensor]:
            return {group.name: sign * (torch.arange(group.units) % 2).double() for group in evidence.groups.groups}

        monkeypatch.setitem(CRITERIA._values, "planted", Criterion("planted", needs_text=True, units=units))
        shape = "uniform" if select == "knapsack" else "per-layer"  # it measures, and so finds the layer that can do without a bad order
        asked = PruneSettings.model_validate(QUICK | {"criterion": "planted", "select": select, "shape": shape})
        chosen = prune(model, None, asked, tokenizer=tiny_tokenizer(), calibration=sentences)
        again = replay(model, chosen.plan, tokenizer=tiny_tokenizer(), calibration=sentences)
        for notes in (chosen.notes, again.notes):
            assert any(WORSE in note for note in notes) == warned, notes


@pytest.mark.slow
def test_nothing_is_said_of_the_baseline_or_where_chance_does_no_harm(half_used: tuple[PreTrainedModel, list[str]]) -> None:
    model, sentences = half_used
    for text in (sentences, None):
        asked = PruneSettings.model_validate(QUICK | {"criterion": "random", "select": "uniform"})
        assert not any("random removal" in note for note in prune(model, None, asked, tokenizer=tiny_tokenizer(), calibration=text).notes)
    untrained = random_model("llama")
    chosen = prune(untrained, None, PruneSettings(criterion="l2"), tokenizer=tiny_tokenizer())
    assert chosen.model is not None
    noise = torch.randint(3, 60, (16, 20), generator=torch.Generator().manual_seed(2))
    assert worse_than_random(Chosen(untrained, chosen.groups, chosen.plan, chosen.model, noise, 0)) == ()
