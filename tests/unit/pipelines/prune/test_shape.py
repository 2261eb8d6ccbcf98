"""The shape of the layers: equal by default, so that stock classes load the result; per-layer where layers cannot be equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from folders import tiny_tokenizer
from regraft.cli.app import run
from regraft.errors import InputError
from regraft.models.view import LayerSizes, ModelView
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.run.recipe import check_recipe
from regraft.settings import PruneSettings

TEXTS = [f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(40)]
Make = Callable[..., PreTrainedModel]


def sizes(model: PreTrainedModel | None) -> list[LayerSizes]:
    assert model is not None
    view = ModelView(model)
    return [view.sizes(index) for index in range(len(view.layers))]


def uneven(make_model: Make) -> PreTrainedModel:
    model = prune(make_model("llama"), None, PruneSettings(criterion="l2", ratio=0.2, shape="per-layer", select="global", align=1)).model
    assert len(set(sizes(model))) > 1
    assert model is not None
    return model


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"criterion": "l2"}, {"samples": 8, "seq_len": 16}])
def test_layers_are_equal_unless_another_shape_is_asked_for(make_model: Make, tmp_path: Path, given: dict[str, Any]) -> None:
    """A stock class loads the folder, in a transformers that knows no other; the default re-fit is the one for text."""
    result = prune(make_model("llama"), tmp_path / "out", PruneSettings(ratio=0.2, **given), tokenizer=tiny_tokenizer(), calibration=TEXTS)
    assert len(set(sizes(result.model))) == 1
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is LlamaForCausalLM
    assert not list((tmp_path / "out").glob("*.py"))
    assert result.plan.shape == "uniform"
    assert result.resolved.settings.reconstruct == ("none" if "criterion" in given else "divergence")
    assert not any("shape" in note for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "stablelm"])
def test_heads_that_a_stock_class_ties_to_the_width_stay_unless_asked_for(make_model: Make, tmp_path: Path, family: str) -> None:
    model = make_model(family)
    stock = type(model)
    result = prune(model, tmp_path / "out", PruneSettings(criterion="l2", ratio=0.1, align=1))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is stock
    assert {size.query_heads for size in sizes(result.model)} == {6}
    assert len(set(sizes(result.model))) == 1
    assert result.plan.achieved == pytest.approx(0.1, abs=0.01)
    assert any(f"targets: ffn, because the stock class of {family}" in note for note in result.notes)
    both = prune(make_model(family), None, PruneSettings(criterion="l2", ratio=0.4, align=1, targets=("heads", "ffn")))
    assert sizes(both.model)[0].query_heads < 6
    assert not any("targets" in note for note in both.notes)


@pytest.mark.slow
def test_heads_go_too_where_the_feed_forward_parts_alone_would_lose_more_than_half(make_model: Make) -> None:
    result = prune(make_model("gpt2"), None, PruneSettings(criterion="l2", ratio=0.45, align=1))
    assert sizes(result.model)[0].query_heads < 6
    assert any("more than 50% of their channels" in note for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"layers": "1:"}, "`layers=1:` prunes some layers and spares others"),
        ({"targets": ("mlp", "ffn")}, "`targets=mlp` is removed in some layers and stays in others"),
    ],
)
def test_what_makes_layers_differ_makes_the_shape_per_layer_and_says_so(make_model: Make, given: dict[str, Any], reason: str) -> None:
    asked: dict[str, Any] = {"criterion": "l2", "ratio": 0.2, "depth": "block_influence", "samples": 8, "seq_len": 16, "align": 1} | given
    ways: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "calibration": TEXTS, "dry_run": True}
    result = prune(make_model("llama"), None, PruneSettings(**asked), **ways)
    assert result.plan.shape == "per-layer"
    assert result.provenance.settings["prune"]["shape"] == "per-layer"
    assert f"shape: per-layer, because {reason}" in result.notes
    with pytest.raises(InputError, match="`shape=per-layer`"):
        prune(make_model("llama"), None, PruneSettings(shape="uniform", **asked), **ways)


@pytest.mark.slow
def test_a_model_whose_layers_differ_already_is_pruned_layer_by_layer(make_model: Make, tmp_path: Path) -> None:
    model = uneven(make_model)
    again = PruneSettings(criterion="l2", ratio=0.1, align=1)
    result = prune(model, None, again)
    assert result.plan.shape == "per-layer"
    assert any("shape: per-layer, because the layers of this model differ already" in note for note in result.notes)
    with pytest.raises(InputError, match=r"`shape=uniform` needs layers of equal size, but the layers.*differ already \(\d+ to \d+ units"):
        prune(model, None, again.model_copy(update={"shape": "uniform"}))
    model.save_pretrained(tmp_path / "uneven")
    streamed = prune(tmp_path / "uneven", tmp_path / "out", again.model_copy(update={"memory": 2_000_000_000}))
    assert streamed.plan.cuts == result.plan.cuts
    assert streamed.resolved.settings.shape == "per-layer"
    assert any("differ already" in note for note in streamed.notes)


def test_a_ratio_that_equal_widths_do_not_meet_is_said(make_model: Make) -> None:
    """Three key-value heads: equal layers lose one of them, or none."""
    asked = PruneSettings(criterion="l2", ratio=0.08, targets=("heads",), select="global")
    result = prune(make_model("llama"), None, asked, dry_run=True)
    missed = result.plan.achieved - 0.08
    assert abs(missed) > 0.01
    assert f"layers of equal widths come no closer to 8.00% than {result.plan.achieved:.2%}; `shape=per-layer` may" in result.notes
    closer = prune(make_model("llama"), None, asked.model_copy(update={"shape": "per-layer"}), dry_run=True)
    assert abs(closer.plan.achieved - 0.08) < abs(missed)
    assert not any("equal widths" in note for note in closer.notes)
    depth = prune(make_model("llama"), None, PruneSettings(criterion="l2", ratio=0.2, targets=("layers",)), dry_run=True)
    assert f"whole layers come no closer to 20.00% than {depth.plan.achieved:.2%}" in depth.notes


def test_a_recipe_spares_layers_without_a_shape_and_not_with_uniform() -> None:
    assert not check_recipe({"model": "x", "prune": {"layers": "1:"}})[1]
    assert check_recipe({"model": "x", "prune": {"layers": "1:", "shape": "uniform"}})[1]


@pytest.mark.slow
def test_the_command_knows_what_was_typed(make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = ["prune", str(tmp_path / "model"), "--criterion", "l2", "--ratio", "0.1", "--align", "1"]
    assert run([*command, "--layers", "1:", "--output", str(tmp_path / "spared")]) == 0
    said = capsys.readouterr().out
    assert "shape: per-layer, because --layers 1: prunes some layers and spares others" in said
    for word in (f"regraft export {tmp_path / 'spared'} --to hf-uniform", "--to gguf", "--shape uniform", "vLLM", "llama.cpp"):
        assert word in said
    assert json.loads((tmp_path / "spared" / "config.json").read_text(encoding="utf-8"))["model_type"].startswith("regraft_")
    assert run([*command, "--layers", "1:", "--shape", "uniform", "--output", str(tmp_path / "refused")]) == 2
    assert "--shape per-layer" in capsys.readouterr().err
    assert run([*command, "--output", str(tmp_path / "even")]) == 0
    assert "hf-uniform" not in capsys.readouterr().out
    assert run(["export", str(tmp_path / "spared"), "--to", "hf-uniform", "--output", str(tmp_path / "stock"), "--no-check"]) == 0
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")) is LlamaForCausalLM


@pytest.mark.slow
def test_equal_layers_that_no_stock_class_holds_are_said_to_be_that(
    make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 derives the size of a head from the width, so that its class has no fewer heads of the same size."""
    make_model("gpt2").save_pretrained(tmp_path / "model")
    assert run(["prune", str(tmp_path / "model"), "--criterion", "l2", "--ratio", "0.2", "--align", "1", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "its layers are equal" in said
    assert "--targets ffn" in said
    assert "hf-uniform" not in said
    narrow = ["--criterion", "l2", "--ratio", "0.1", "--targets", "ffn"]
    assert run(["prune", str(tmp_path / "model"), *narrow, "-o", str(tmp_path / "ffn")]) == 0
    assert "stock" not in capsys.readouterr().out
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ffn")).__name__ == "GPT2LMHeadModel"
