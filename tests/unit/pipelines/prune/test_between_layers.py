"""One threshold over layers whose scores are in different units: no layer is emptied, and a choice worse than chance says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from folders import tiny_tokenizer
from regraft.importance import CRITERIA, Criterion, Evidence, score
from regraft.pipelines.prune.prune import prune
from regraft.plans import Scores
from regraft.selection.global_threshold import standardised
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


def test_without_the_standard_scores_the_small_layer_is_emptied(make_model: Callable[..., PreTrainedModel], monkeypatch) -> None:
    """The negative control: a criterion that claims to compare, and does not."""

    def units(evidence: Evidence) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(0)
        scale = {group.name: 1e3 if group.layer == 0 else 1.0 for group in evidence.groups.groups}
        return {group.name: scale[group.name] * (1 + torch.rand(group.units, generator=noise).double()) for group in evidence.groups.groups}

    for compares in (True, False):
        monkeypatch.setitem(CRITERIA._values, "planted", Criterion("planted", needs_text=False, units=units, between_layers=compares))
        gone = removed(make_model("llama"), "planted")
        assert (gone["layers.0.ffn"] == 0) == compares


def test_standard_scores_keep_the_order_and_have_one_scale(make_model: Callable[..., PreTrainedModel]) -> None:
    from_model = prune(make_model("llama"), None, PruneSettings(criterion="l2"), dry_run=True)
    groups = from_model.groups
    raw = score("l2", Evidence(from_model.loaded.model, groups, None))
    found = standardised(groups, raw)
    for group in groups.groups:
        values = torch.tensor(found.values[group.name], dtype=torch.float64) / group.unit_parameters
        first = torch.tensor(raw.values[group.name], dtype=torch.float64)
        torch.testing.assert_close(values, (first - first.mean()) / first.std(correction=0))
    flat = Scores(raw.fingerprint, "flat", {name: (3.0,) * len(values) for name, values in raw.values.items()})
    assert all(set(values) == {0.0} for values in standardised(groups, flat).values.values())
