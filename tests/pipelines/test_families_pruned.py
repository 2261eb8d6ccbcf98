"""Families that are built differently from Llama, through the commands: pruned, saved, loaded, measured; in memory and streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_model
from folders import text_file, tiny_tokenizer
from regraft.cli.app import run
from regraft.models.load import load
from regraft.models.view import parameter_count
from regraft.pipelines.prune.prune import prune
from regraft.plans import Groups, PrunePlan
from regraft.settings import LoadSettings, PruneSettings
from zeroing import Gone, zeroed

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
SMALL = ["--shape", "per-layer", "--samples", "4", "--seq-len", "16", "--calibration", str(text_file())]
QUICK = {"samples": 4, "seq_len": 16, "calibration": text_file()}
# Weights stored (in, out) and fused; interleaved heads; fused halves, grouped; four norms and soft caps; slopes and tuples.
DIFFERENT = ("gpt2", "gpt_neox", "phi3", "gemma2", "bloom")


@pytest.fixture(scope="module", params=DIFFERENT)
def folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("families") / request.param
    random_model(request.param).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def gone(groups: Groups, plan: PrunePlan) -> Gone:
    lost = {entry.group: set(range(groups.named()[entry.group].units)) - set(entry.kept) for entry in plan.cuts}
    layers = range(groups.layers)
    return Gone(
        heads={layer: sorted(lost[name]) for layer in layers if (name := f"layers.{layer}.heads") in lost},
        ffn={layer: sorted(lost[name]) for layer in layers if (name := f"layers.{layer}.ffn") in lost},
    )


@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
def test_what_the_criterion_takes_is_cut_exactly(folder, criterion):
    """Without re-fitting the pruned model is the dense one with the plan's units silenced, by code that knows no plan."""
    done = prune(
        folder, None, PruneSettings(criterion=criterion, select="global", shape="per-layer", reconstruct="none", ratio=0.2, **QUICK)
    )
    assert abs(done.plan.achieved - 0.2) <= 0.01
    dense, family = done.loaded.model, folder.name
    groups, repeats = (3, 2) if family in ("phi3", "gemma2") else (6, 1)
    lost = gone(done.groups, done.plan)
    assert lost.heads or lost.ffn
    with torch.no_grad(), zeroed(dense, family, lost, groups=groups, repeats=repeats, dim=8):
        want = dense(IDS).logits
    with torch.no_grad():
        assert (done.model(IDS).logits - want).abs().max() <= 1e-5


@pytest.mark.long
def test_the_command_prunes_saves_and_measures(folder, tmp_path):
    """By default settings: scores, measured widths and re-fitting."""
    out = tmp_path / "pruned"
    assert run(["prune", str(folder), "-o", str(out), "--ratio", "0.2", *SMALL]) == 0
    record = json.loads((out / "regraft.json").read_text(encoding="utf-8"))
    assert "surgeon" in record["plan"]["criterion"]
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert parameter_count(loaded) == record["plan"]["parameters_after"] < record["plan"]["parameters_before"]
    with torch.no_grad():  # as transformers loads it, and as we do
        assert torch.equal(loaded(IDS).logits, load(out).model(IDS).logits)
    assert run(["evaluate", str(out), "--text", str(text_file("test")), "--max-tokens", "64", "--window", "32"]) == 0


@pytest.mark.long
def test_streamed_is_the_same_to_rounding(folder, tmp_path):
    if folder.name not in ("gpt2", "gpt_neox", "bloom"):
        pytest.skip("stored and called like Llama, which tests/unit/streaming has")
    settings = PruneSettings(criterion="taylor", select="global", shape="per-layer", ratio=0.2, align=4, **QUICK)
    whole = prune(folder, tmp_path / "whole", settings)
    streamed = prune(folder, tmp_path / "streamed", settings.model_copy(update={"memory": 3_000_000_000}))
    assert streamed.plan.cuts == whole.plan.cuts
    first, second = (load(tmp_path / name).model.state_dict() for name in ("whole", "streamed"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0)


def test_streaming_refuses_norms_over_all_heads_in_one_line(tmp_path, capsys):
    random_model("olmo2").save_pretrained(tmp_path / "olmo2")
    tiny_tokenizer().save_pretrained(tmp_path / "olmo2")
    assert run(["prune", str(tmp_path / "olmo2"), "-o", str(tmp_path / "out"), "--criterion", "l1", "--memory", "3GB"]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert "q_norm" in error
    assert "--targets ffn" in error


@pytest.mark.long
@pytest.mark.parametrize("budget", ["parameters", "bytes"])
def test_weights_of_fewer_bits_are_computed_with_in_float32(tmp_path, budget):
    """The choice is that of the same weights held in float32; what is re-fitted differs by rounding alone, and nothing else does."""
    model = random_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = PruneSettings(ratio=0.3, align=1, budget=budget, reconstruct="least_squares", **QUICK)
    narrow = prune(tmp_path / "model", None, settings)
    wide = prune(tmp_path / "model", None, settings, load=LoadSettings(dtype="float32"))
    assert narrow.plan.cuts == wide.plan.cuts
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in narrow.loaded.model.state_dict().items())
    exact = wide.model.state_dict()
    for name, tensor in narrow.model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert (tensor.float() - exact[name]).abs().max() <= 0.03 * exact[name].abs().max(), name
