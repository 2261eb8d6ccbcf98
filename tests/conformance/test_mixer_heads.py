"""Heads of linear attention and of Mamba-2: a key head with its value heads is removed as if it wrote nothing.

What is removed is silenced beside it, by zeros in the columns that read the value heads, which this file knows from the papers alone: value
head h reads the state of key head h // (value heads / key heads).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from families_grid import DELTA_NET, FULL, LINEAR, MODELS, OTHERS, SIZES
from folders import text_file, tiny_tokenizer
from fresh_logits import logits_in_a_fresh_process
from regraft.cli.app import run
from regraft.errors import PlanError
from regraft.groups.discover import discover
from regraft.groups.mixer_heads import mixer_head_groups
from regraft.models.build import declared_sizes
from regraft.models.view import ModelView, parameter_count
from regraft.plans import Cut, Groups, PrunePlan
from regraft.surgery.cut import cut, parameters_after
from zeroing import random_model

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
LAYERS = {"layer_types": [LINEAR, FULL, LINEAR], "num_hidden_layers": 3}
HEADS = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
# Config; the matrix that reads the value heads; config keys of key heads and value heads.
COUNTS = ("linear_num_key_heads", "linear_num_value_heads")
FAMILIES: dict[str, tuple[dict[str, Any], str, tuple[str, str]]] = {
    "qwen3_5_text": ({**DELTA_NET, **LAYERS, **HEADS}, "linear_attn.out_proj", COUNTS),
    "qwen3_next": ({**DELTA_NET, **LAYERS, **HEADS, "mlp_only_layers": [0, 1, 2]}, "linear_attn.out_proj", COUNTS),
    "olmo_hybrid": ({**DELTA_NET, **LAYERS, **HEADS}, "linear_attn.o_proj", COUNTS),
    "nemotron_h": (
        {**SIZES, "layers_block_type": [LINEAR, FULL, LINEAR, "mlp"], "mamba_num_heads": 6, "mamba_head_dim": 12, "n_groups": 3,
         "ssm_state_size": 16, "use_bias": True},
        "mixer.out_proj", ("n_groups", "mamba_num_heads"),
    ),
}  # fmt: skip
PER_HEAD = 24  # channels of the two value heads of a key head
EVEN, UNEVEN = {0: [1], 2: [0]}, {0: [2], 2: [0, 1]}


@cache
def subject(family: str) -> tuple[PreTrainedModel, Groups]:
    model = random_model(family, FAMILIES[family][0])
    return model, discover(model, ("mixer_heads",))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def silenced(family: str, lost: dict[int, list[int]]) -> Tensor:
    model, _ = subject(family)
    weights = {layer: model.get_parameter(f"model.layers.{layer}.{FAMILIES[family][1]}.weight") for layer in lost}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    with torch.no_grad():
        for layer, heads in lost.items():
            for head in heads:
                weights[layer][:, PER_HEAD * head : PER_HEAD * (head + 1)] = 0.0
        found = logits(model)
        for layer, weight in weights.items():
            weight.copy_(before[layer])
    return found


def pruned_by(family: str, lost: dict[int, list[int]]) -> PreTrainedModel:
    model, groups = subject(family)
    cuts = tuple(Cut(f"layers.{layer}.mixer_heads", tuple(head for head in range(3) if head not in heads)) for layer, heads in lost.items())
    after = parameters_after(groups.shapes, groups, cuts)
    plan = PrunePlan(groups.fingerprint, "planted", "planted", "per-layer", 0.1, 1, groups.parameters, after, cuts)
    pruned = cut(model, groups, plan)
    gone = sum(len(heads) * groups.named()[f"layers.{layer}.mixer_heads"].unit_parameters for layer, heads in lost.items())
    assert parameter_count(pruned) == after == groups.parameters - gone
    return pruned


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_removing_is_silencing_and_equal_counts_stay_in_the_stock_class(family: str) -> None:
    model, groups = subject(family)
    assert [(group.layer, group.units) for group in groups.groups] == [(0, 3), (2, 3)]
    dense = logits(model)
    for lost in (EVEN, UNEVEN):
        pruned = pruned_by(family, lost)
        want = silenced(family, lost)
        assert (want - dense).abs().max() > 1e-3, "silencing does something"
        assert (logits(pruned) - want).abs().max() <= 1e-5
        view = ModelView(pruned)
        assert tuple(view.sizes(layer) for layer in range(len(view.layers))) == declared_sizes(pruned.config)
        if lost is EVEN:
            assert type(pruned) is type(model)
            assert [getattr(pruned.config, key) for key in FAMILIES[family][2]] == [2, 4]
            assert [group.units for group in discover(pruned, ("mixer_heads",)).groups] == [2, 2], "it can be pruned again"


@pytest.mark.long
def test_saved_loaded_in_a_fresh_process_and_generated(tmp_path: Path) -> None:
    folders: dict[str, str] = {}
    want: dict[str, Tensor] = {}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for family in FAMILIES:
        for name, lost in ((family, EVEN), (f"{family}-uneven", UNEVEN)):
            pruned: Any = pruned_by(family, lost)
            pruned.save_pretrained(tmp_path / name)
            folders[name], want[name] = str(tmp_path / name), logits(pruned)
            with_cache, without = (pruned.generate(IDS[:1, :5], use_cache=use, **settings) for use in (True, False))
            assert torch.equal(with_cache, without), name
    got = logits_in_a_fresh_process(folders, IDS, tmp_path)
    for name, logits_there in want.items():
        assert (got[name] - logits_there).abs().max() <= 1e-5, name


@pytest.mark.long
def test_the_commands_find_a_head_that_writes_nothing_in_memory_and_layer_by_layer(tmp_path: Path, capsys: Any) -> None:
    model, _ = subject("qwen3_5_text")
    dead = {0: 1, 2: 2}
    weights = {layer: model.get_parameter(f"model.layers.{layer}.linear_attn.out_proj.weight") for layer in dead}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    with torch.no_grad():
        for layer, head in dead.items():
            weights[layer][:, PER_HEAD * head : PER_HEAD * (head + 1)] *= 1e-4
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    dense = logits(model)
    with torch.no_grad():
        for layer, weight in weights.items():
            weight.copy_(before[layer])
    unit = discover(model, ("mixer_heads",)).groups[0].unit_parameters
    common = ["prune", str(tmp_path / "model"), "--targets", "mixer_heads", "--ratio", str(2 * unit / model.num_parameters())]
    common += ["--calibration", str(text_file()), "--samples", "4", "--seq-len", "32", "--effort", "quick"]
    for name, more in (("whole", []), ("layers", ["--memory", "3GB"]), ("again", ["--criterion", "l2"])):
        assert run([*common, *more, "-o", str(tmp_path / name)]) == 0, capsys.readouterr().err
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert type(pruned).__name__ == "Qwen3_5ForCausalLM"
        if name != "again":  # the norm of weights sees what writes the heads too
            assert (logits(pruned) - dense).abs().max() < 1e-2 * dense.abs().max()
    capsys.readouterr()
    assert run(["prune", str(tmp_path / "model"), "--targets", "mixer_heads", "--ratio", "0.9", "-o", str(tmp_path / "none")]) == 2
    assert "at most 0." in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_mixers_whose_heads_are_not_known_are_named_in_one_line(tmp_path: Path, capsys: Any) -> None:
    kind, values = MODELS["Granite 4"]
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    asked = ["--targets", "mixer_heads", "--ratio", "0.1", "--criterion", "l2"]
    assert run(["prune", str(tmp_path / "model"), *asked, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert "'model.layers.0.mamba' (GraniteMoeHybridMambaLayer) is none of the mixers whose heads are known here" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_value_head_of_every_group_goes_where_no_norm_runs_over_them(tmp_path: Path) -> None:
    groups_of_heads, per_group, size = 2, 4, 8
    sizes = {"mamba_n_groups": groups_of_heads, "mamba_n_heads": 8, "mamba_d_ssm": 64, "ssm_multipliers": [0.5, 0.7, 1.3, 0.9, 1.1]}
    model: Any = random_model("falcon_h1", {**OTHERS["Falcon-H1"][1], **sizes})
    groups = discover(model, ("mixer_heads",))
    assert [group.units for group in groups.groups] == [per_group, per_group]
    lost = {0: (1, 3), 1: (0, 2)}
    cuts = tuple(Cut(f"layers.{layer}.mixer_heads", tuple(unit for unit in range(4) if unit not in gone)) for layer, gone in lost.items())
    plan = PrunePlan(groups.fingerprint, "planted", "planted", "uniform", 0.1, 1, groups.parameters, groups.parameters, cuts)
    pruned: Any = cut(model, groups, plan)
    assert type(pruned) is type(model)
    assert (pruned.config.mamba_n_groups, pruned.config.mamba_n_heads, pruned.config.mamba_d_ssm) == (2, 4, 32)
    assert parameter_count(pruned) == groups.parameters - 2 * sum(group.unit_parameters for group in groups.groups)
    dense = logits(model)
    with torch.no_grad():
        for layer, gone in lost.items():
            heads = [per_group * group + unit for group in range(groups_of_heads) for unit in gone]
            columns = [size * head + channel for head in heads for channel in range(size)]
            model.get_parameter(f"model.layers.{layer}.mamba.out_proj.weight")[:, columns] = 0.0
    want = logits(model)
    assert (want - dense).abs().max() > 1e-2
    assert (logits(pruned) - want).abs().max() <= 1e-5
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache, without = (pruned.generate(IDS[:1, :5], use_cache=use, **settings) for use in (True, False))
    assert torch.equal(with_cache, without)
    pruned.save_pretrained(tmp_path / "pruned")
    there = logits_in_a_fresh_process({"pruned": str(tmp_path / "pruned")}, IDS, tmp_path)["pruned"]
    assert (there - want).abs().max() <= 1e-5
    with pytest.raises(PlanError, match=r"6 to 8 mixer heads, and family 'falcon_h1' computes with one number for all layers"):
        cut(model, groups, replace(plan, cuts=(Cut("layers.0.mixer_heads", (0, 1, 2)),)))


def test_heads_of_a_mixer_with_a_norm_over_its_groups_stay() -> None:
    config = CONFIG_MAPPING["falcon_h1"](**{**OTHERS["Falcon-H1"][1], "mamba_rms_norm": True})
    found, refused = mixer_head_groups(ModelView(AutoModelForCausalLM.from_config(config)))
    assert not found
    assert "is none of the mixers whose heads are known here" in refused[0].reason
