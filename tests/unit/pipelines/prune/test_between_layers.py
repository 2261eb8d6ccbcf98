"""One threshold over layers whose scores are in different units: no layer is emptied, and a choice worse than chance says so."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from folders import tiny_tokenizer
from regraft.groups.discover import discover
from regraft.importance import CRITERIA, Criterion, Evidence
from regraft.models.view import ModelView
from regraft.pipelines.prune.prune import prune
from regraft.plans import Scores
from regraft.selection.global_threshold import as_shares
from regraft.settings import PruneSettings

TEXTS = [f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(40)]
QUICK = {"select": "global", "shape": "per-layer", "reconstruct": "none", "samples": 10, "seq_len": 20, "align": 1, "targets": ("ffn",)}
APART = [name for name in sorted(CRITERIA.names()) if "ffn" in CRITERIA.get(name).scores and not CRITERIA.get(name).between_layers]


def removed(model: PreTrainedModel, criterion: str, **given: object) -> dict[str, int]:
    """Returns how many channels go by group, where a quarter of a feed-forward network's share goes."""
    asked = PruneSettings.model_validate(QUICK | {"criterion": criterion, "ratio": 0.12} | given)
    result = prune(model, None, asked, tokenizer=tiny_tokenizer(), calibration=TEXTS, dry_run=True)
    kept = {entry.group: len(entry.kept) for entry in result.plan.cuts}
    return {group.name: group.units - kept.get(group.name, group.units) for group in result.groups.groups if group.kind == "ffn"}


@pytest.mark.parametrize("criterion", APART)
def test_a_layer_of_another_scale_loses_no_more_than_before(make_model: Callable[..., PreTrainedModel], criterion: str) -> None:
    """Each feed-forward network is scaled after its channels, where scores grow by 1e3 or 1e6 and their order within the layer stays."""
    plain = make_model("llama")
    before = removed(plain, criterion)
    scaled = make_model("llama")
    with torch.no_grad():
        for projection in ("gate_proj", "up_proj", "down_proj"):
            scaled.get_parameter(f"model.layers.0.mlp.{projection}.weight").mul_(10.0)
    after = removed(scaled, criterion)
    units = scaled.config.intermediate_size
    assert sum(after.values()) == pytest.approx(sum(before.values()), abs=1)
    assert all(0 < count < 0.8 * units for count in after.values()), (before, after)


def test_without_the_standard_scores_the_small_layer_is_emptied(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: a criterion that claims to compare, and does not."""

    def units(evidence: Evidence) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(0)
        scale = {group.name: 1e3 if group.layer == 0 else 1.0 for group in evidence.groups.groups}
        return {group.name: scale[group.name] * (1 + torch.rand(group.units, generator=noise).double()) for group in evidence.groups.groups}

    for compares in (True, False):
        monkeypatch.setitem(CRITERIA._values, "planted", Criterion("planted", needs_text=False, units=units, between_layers=compares))
        gone = removed(make_model("llama"), "planted")
        assert (gone["layers.0.ffn"] == 0) == compares


def test_shares_keep_the_order_and_have_one_sum(make_model: Callable[..., PreTrainedModel]) -> None:
    groups = discover(ModelView(make_model("llama")), ("heads", "ffn", "residual", "layer"))
    raw = {group.name: torch.rand(group.units, generator=torch.Generator().manual_seed(place)) for place, group in enumerate(groups.groups)}
    scores = Scores(groups.fingerprint, "planted", {name: tuple(value.tolist()) for name, value in raw.items()})
    found = as_shares(groups, scores)
    for group in groups.groups:
        values = torch.tensor(found.values[group.name])
        factor = {"layer": 1.0, "residual": 2 * groups.layers / float(raw[group.name].sum())}.get(
            group.kind, 1.0 / float(raw[group.name].sum())
        )
        torch.testing.assert_close(values, raw[group.name] * factor)
    flat = Scores(groups.fingerprint, "flat", {name: (0.0,) * len(values) for name, values in raw.items()})
    assert as_shares(groups, flat) == flat


def stories(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    names, verbs, things = ("Ann", "Bob", "Cy", "Dan"), ("sees", "likes", "hits"), ("dog", "cup", "sun", "hat", "fox")
    said = [(draw.choice(names), draw.choice(verbs), draw.choice(things), draw.choice(names)) for _ in range(count)]
    return [f"{one} {verb} {thing} {other}. {other} {verb} {thing} {one}." for one, verb, thing, other in said]


@pytest.mark.long
def test_a_small_trained_model_loses_less_than_by_chance(make_model: Callable[..., PreTrainedModel]) -> None:
    """Numbers of heads are small beside those of channels, so that compared as they are they cost every layer a third of its attention."""
    model, tokenizer = make_model("llama").float(), tiny_tokenizer()
    ids, unseen = (tokenizer("".join(stories(seed, 600)), return_tensors="pt").input_ids[0] for seed in (1, 2))
    optimiser, draw = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = torch.stack([ids[start : start + 48] for start in torch.randint(0, len(ids) - 48, (16,), generator=draw).tolist()])
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    model.eval()
    held = unseen[: 40 * 48].view(40, 48)

    def loss(criterion: str, select: str, shape: str = "uniform", seed: int = 0) -> float:
        asked = {
            "criterion": criterion,
            "select": select,
            "shape": shape,
            "ratio": 0.3,
            "reconstruct": "none",
            "samples": 16,
            "seq_len": 32,
        }
        settings = PruneSettings.model_validate(asked | {"align": 1})
        pruned = prune(model, None, settings, tokenizer=tokenizer, calibration=stories(3, 300), seed=seed).model
        assert pruned is not None
        with torch.no_grad():
            return float(pruned(input_ids=held, labels=held).loss)

    with torch.no_grad():
        dense = float(model(input_ids=held, labels=held).loss)
    chance = sum(loss("random", "uniform", seed=seed) for seed in range(3)) / 3
    pairs = (
        ("energy", "global", "uniform"),
        ("energy", "knapsack", "uniform"),
        ("flap", "global", "uniform"),
        ("energy", "global", "per-layer"),
    )
    for pair in pairs:
        assert loss(*pair) < dense + 0.5 * (chance - dense), pair
