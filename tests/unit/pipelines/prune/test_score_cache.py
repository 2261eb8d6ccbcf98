"""Scores that are kept: another ratio needs no new calibration, and nothing else is ever taken for the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from folders import tiny_tokenizer
from regraft.errors import OutputError
from regraft.importance import CRITERIA, Criterion, Evidence, score
from regraft.models.layerwise import Layerwise
from regraft.pipelines.prune import planning
from regraft.pipelines.prune.prune import prune
from regraft.settings import PruneSettings

TEXT = "\n\n".join(f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(40))


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Path:
    path = tmp_path / "model"
    make_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went through the model: a line for each backward pass and for each layer's forward pass."""
    seen: list[str] = []
    grad, call, backward = torch.autograd.grad, Layerwise.call, torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **kw: (seen.append("backward"), grad(*a, **kw))[1])
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **kw: (seen.append("backward"), backward(*a, **kw))[1])
    monkeypatch.setattr(Layerwise, "call", lambda *a, **kw: (seen.append("forward"), call(*a, **kw))[1])
    return seen


def settings(folder: Path, **changes: Any) -> PruneSettings:
    usual = {"calibration": folder.parent / "text.txt", "samples": 10, "seq_len": 20, "align": 2, "cache": folder.parent / "cache"}
    return PruneSettings(**usual | changes)


def plan(folder: Path, **changes: Any):
    return prune(folder, None, settings(folder, **changes), dry_run=True).plan


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, "2GB"], ids=["whole", "streamed"])
@pytest.mark.parametrize("given", [{"criterion": "taylor", "select": "global"}, {"criterion": "surgeon", "select": "global"}])
def test_a_second_ratio_does_not_touch_the_model(folder, passes, memory, given):
    plan(folder, ratio=0.2, memory=memory, **given)
    assert passes
    assert ("backward" in passes) == (given["criterion"] == "taylor")
    passes.clear()
    again = plan(folder, ratio=0.35, memory=memory, **given)
    assert passes == []
    assert again == plan(folder, ratio=0.35, memory=memory, cache=None, **given), "and gives what scoring again gives"


@pytest.mark.slow
def test_measured_curves_are_kept_too(folder, passes):
    # Curves that are predicted are measured near the widths of each ratio, and whole answers for equal layers are compared at each.
    usual = {"criterion": "surgeon", "shape": "per-layer"}
    plan(folder, ratio=0.2, **usual)
    passes.clear()
    again = plan(folder, ratio=0.3, **usual)
    assert passes == []
    assert again.selection == "knapsack"
    assert again == plan(folder, ratio=0.3, cache=None, **usual)


@pytest.mark.slow
def test_streaming_and_memory_share_their_scores_in_single_precision(folder, passes):
    plan(folder, criterion="taylor", select="global", memory="2GB")
    passes.clear()
    plan(folder, criterion="taylor", select="global", ratio=0.4)
    assert passes == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"order": "mixed"}, {"granularity": "vector"}, {"reduce": "max"}, {"samples": 9}, {"seq_len": 19}, {"criterion": "energy"}],
)
def test_other_settings_are_other_scores(folder, passes, change):
    usual = {"criterion": "taylor", "select": "global"}
    plan(folder, **usual)
    passes.clear()
    assert plan(folder, **usual | change) == plan(folder, **usual | change | {"cache": None})
    assert passes


@pytest.mark.slow
def test_another_model_and_another_seed_are_other_scores(folder, tmp_path, make_model, passes):
    usual = {"criterion": "taylor", "select": "global"}
    plan(folder, **usual)
    passes.clear()
    prune(folder, None, settings(folder, **usual), seed=1, dry_run=True)
    assert passes, "the seed draws other windows"
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    passes.clear()
    prune(tmp_path / "other", None, settings(folder, **usual), dry_run=True)
    assert passes


@pytest.mark.slow
def test_random_scores_depend_on_the_seed(folder):
    first, second = (prune(folder, None, settings(folder, criterion="random"), seed=seed, dry_run=True).plan for seed in (0, 1))
    assert first.cuts != second.cuts


@pytest.mark.slow
def test_a_damaged_file_is_made_again(folder, passes):
    usual = {"criterion": "taylor", "select": "global"}
    wanted = plan(folder, **usual)
    (path,) = (folder.parent / "cache").iterdir()
    whole = path.read_text()
    entry = json.loads(whole)
    for text in ("", whole[: len(whole) // 2], json.dumps(entry | {"made_from": {}}), json.dumps(entry | {"value": {"values": 1}})):
        path.write_text(text)
        passes.clear()
        assert plan(folder, **usual) == wanted
        assert passes
        assert path.read_text() == whole


def test_a_file_in_the_place_of_the_folder_is_refused(folder):
    with pytest.raises(OutputError, match="is a file; name a folder"):
        plan(folder, cache=folder.parent / "text.txt")


@pytest.mark.slow
def test_rounds_are_scored_anew(folder, monkeypatch):
    scored: list[str] = []
    score = planning.score
    monkeypatch.setattr(planning, "score", lambda name, evidence: (scored.append(evidence.groups.fingerprint), score(name, evidence))[1])
    plan(folder, criterion="taylor", select="global", rounds=2)
    assert len(set(scored)) == 2


@pytest.mark.slow
def test_a_criterion_that_declares_nothing_is_cached_by_every_field(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that forgets ``reads`` gets no wrong hit, whichever field of the evidence it looks at."""

    def counted(evidence: Evidence) -> dict[str, torch.Tensor]:
        base = evidence.consecutive + 10 * evidence.seed + 100 * (evidence.order == "mixed")
        return {group.name: torch.arange(base, base + group.units, dtype=torch.float64) for group in evidence.groups.groups}

    monkeypatch.setitem(CRITERIA._values, "counted", Criterion("counted", needs_text=False, units=counted))
    found = []
    for seed, order, ratio in ((0, "first", 0.2), (1, "first", 0.2), (0, "mixed", 0.2), (0, "first", 0.45)):
        changed = settings(folder, criterion="counted", targets=("heads", "ffn"), order=order, ratio=ratio, select="uniform")
        evidences: list[Evidence] = []
        monkeypatch.setattr(planning, "score", lambda name, evidence, kept=evidences: (kept.append(evidence), score(name, evidence))[1])
        prune(folder, None, changed, seed=seed, dry_run=True)
        found.append(len(evidences))
    assert found == [1, 1, 1, 0], "each change of a field is scored anew; the ratio alone is not"
