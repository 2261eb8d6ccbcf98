"""Families with layers of several kinds: a group of a kind exists in the layers that have it, and mixers are kept as they are.

What is removed is silenced beside it, by code that knows the names of a family's modules and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from families_grid import DELTA_NET as SHORT_DELTA_NET
from families_grid import FULL, LINEAR, MODELS, OTHERS, SIZES
from folders import edit_json
from fresh_logits import logits_in_a_fresh_process
from regraft.cli.app import run
from regraft.groups.discover import discover
from regraft.models.build import declared_sizes
from regraft.models.family import families
from regraft.models.view import ModelView, parameter_count
from regraft.plans import Cut, Groups, PrunePlan
from regraft.surgery.cut import cut
from verdicts import KINDS
from zeroing import random_model

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
DELTA_NET = {**SHORT_DELTA_NET, "layer_types": [LINEAR, FULL] * 2, "num_hidden_layers": 4}
LLAMAS = ("self_attn.o_proj", "mlp.down_proj")
EVERY = {"heads", "query_heads", "ffn", "attention", "mlp", "layer"}

# Config; what writes the stream in attention and feed-forward network; kinds of groups; layers with attention.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, str], set[str], set[int]]] = {
    "qwen3_5_text": ({**DELTA_NET, "full_attention_interval": 2}, LLAMAS, EVERY, {1, 3}),
    "qwen3_next": ({**DELTA_NET, "mlp_only_layers": [0, 1, 2, 3]}, LLAMAS, EVERY, {1, 3}),
    "olmo_hybrid": (DELTA_NET, LLAMAS, {"ffn", "layer"}, {1, 3}),
    "lfm2": (
        {**SIZES, "layer_types": ["conv", FULL, "conv", FULL], "num_hidden_layers": 4, "block_auto_adjust_ff_dim": False},
        ("self_attn.out_proj", "feed_forward.w2"), EVERY, {1, 3},
    ),
    "lfm3": (
        {**SIZES, "layer_types": ["conv", FULL, "conv", "sliding_attention"], "num_hidden_layers": 4},
        ("self_attn.o_proj", "feed_forward.w2"), EVERY, {1, 3},
    ),
    "lfm2_moe": (  # dense networks in the first layers, experts in the others
        {**SIZES, "layer_types": ["conv", FULL, "conv", FULL], "num_hidden_layers": 4, "num_dense_layers": 2, "num_experts": 4,
         "moe_intermediate_size": 24, "num_experts_per_tok": 2},
        ("self_attn.out_proj", "feed_forward.w2"), EVERY, {1, 3},
    ),
    "granitemoehybrid": (
        {**SIZES, "layer_types": [LINEAR, FULL, LINEAR, FULL], "num_hidden_layers": 4, "num_local_experts": 0,
         "shared_intermediate_size": 64, "mamba_n_heads": 6, "mamba_d_state": 16, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        ("self_attn.o_proj", "shared_mlp.output_linear"), EVERY, {1, 3},
    ),
    "nemotron_h": (
        {**SIZES, "layers_block_type": [LINEAR, FULL, "mlp", FULL, "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2,
         "ssm_state_size": 16},
        ("mixer.o_proj", "mixer.down_proj"), {"heads", "query_heads", "ffn", "layer"}, {1, 3},
    ),
    # query heads go evenly from each group: heads have several sizes, and the keys and values of two layers serve two others
    "gemma4_text": (  # an embedding that holds a part for each layer
        {**SIZES, "num_hidden_layers": 4, "layer_types": ["sliding_attention", FULL] * 2, "global_head_dim": 16, "num_kv_shared_layers": 2,
         "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97},
        LLAMAS, {"query_heads", "ffn", "layer"}, set(),
    ),
    # four streams, channels kept by mean and deviation in the first layer, an embedding for each layer, keys and values that layers share
    "gemma3n_text": (OTHERS["Gemma 3n"][1], LLAMAS, {"query_heads", "ffn", "layer"}, set()),
    "falcon_h1": (  # attention and Mamba-2 beside each other in every layer, multiplied by vectors that the model puts into its layers
        {**OTHERS["Falcon-H1"][1], "num_hidden_layers": 4, "ssm_multipliers": [0.5, 0.7, 1.3, 0.9, 1.1]},
        ("self_attn.o_proj", "feed_forward.down_proj"), EVERY, {0, 1, 2, 3},
    ),
    "bamba": (
        {**SIZES, "attn_layer_indices": [1, 3], "num_hidden_layers": 4, "mamba_n_heads": 6, "mamba_d_state": 16},
        ("self_attn.o_proj", "feed_forward.down_proj"), EVERY, {1, 3},
    ),
    # latent attention, of which nothing is cut
    "deepseek_v3": (
        {**OTHERS["DeepSeek-V3"][1], "num_hidden_layers": 4, "first_k_dense_replace": 3}, LLAMAS, {"ffn", "layer"}, set(),
    ),
    "granite_swa": ({**SIZES, "num_hidden_layers": 4, "layer_types": ["sliding_attention", FULL] * 2}, LLAMAS, EVERY, {0, 1, 2, 3}),
    "smollm3": ({**SIZES, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]}, LLAMAS, EVERY, {0, 1, 2, 3}),
    "ministral3": ({**SIZES, "num_hidden_layers": 4, "rope_parameters": None}, LLAMAS, EVERY, {0, 1, 2, 3}),
    "arcee": ({**SIZES, "num_hidden_layers": 4}, LLAMAS, EVERY, {0, 1, 2, 3}),
    "hunyuan_v1_dense": ({**SIZES, "num_hidden_layers": 4}, LLAMAS, EVERY, {0, 1, 2, 3}),
    "ernie4_5": ({**SIZES, "num_hidden_layers": 4}, LLAMAS, EVERY, {0, 1, 2, 3}),
}  # fmt: skip


@cache
def subject(family: str) -> tuple[PreTrainedModel, Groups]:
    model = random_model(family, FAMILIES[family][0])
    return model, discover(model, KINDS)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@contextmanager
def silenced(model: PreTrainedModel, family: str, lost: dict[str, list[int]]) -> Iterator[None]:
    """Takes away what the lost units write: by zeros in what enters a matrix, and a layer by handing on what entered it."""
    attention, mlp = FAMILIES[family][1]
    handles = []

    def zeros(channels: list[int]) -> Any:
        def before(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows = inputs[0].clone()
            rows[..., channels] = 0.0
            return (rows,)

        return before

    def handed_on(_module: Any, given: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> Any:
        entering = given[0] if given else named["hidden_states"]
        return (entering, *output[1:]) if isinstance(output, tuple) else entering

    for name, units in lost.items():
        _, index, kind = name.split(".")
        layer = ModelView(model).layers[int(index)]
        if kind == "layer":
            handles.append(layer.register_forward_hook(handed_on, with_kwargs=True))
        elif kind in ("ffn", "mlp"):
            channels = units if kind == "ffn" else list(range(64))
            handles.append(layer.get_submodule(mlp).register_forward_pre_hook(zeros(channels)))
        else:
            heads = {
                "heads": [2 * unit + query for unit in units for query in (0, 1)],
                "query_heads": [2 * group + unit for unit in units for group in range(3)],
            }
            out: Any = layer.get_submodule(attention)
            size = out.in_features // 6
            channels = [size * head + channel for head in heads.get(kind, range(6)) for channel in range(size)]
            handles.append(out.register_forward_pre_hook(zeros(channels)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lost_units(family: str) -> list[dict[str, list[int]]]:
    """What is removed: each kind alone, and all together, where the layer 0 goes."""
    _, groups = subject(family)
    feeding = [group.layer or 0 for group in groups.of("ffn")]
    attending = sorted(FAMILIES[family][3]) or [0]
    first, last = attending[0], attending[-1]
    if family == "gemma4_text":  # alike in all layers; those that others take keys and values from stay, and so does the last
        channels = {f"layers.{layer}.ffn": list(range(layer, layer + 40)) for layer in feeding}
        queries = {f"layers.{layer}.query_heads": [layer % 2] for layer in feeding}
        shorter = {"layers.2.layer": [0]}
        together = {name: units for name, units in (channels | queries).items() if ".2." not in name}
        return [channels, queries, shorter, together | shorter]
    modes: dict[str, dict[str, list[int]]] = {
        "heads": {f"layers.{first}.heads": [1], f"layers.{last}.heads": [0, 2]},
        "query_heads": {f"layers.{first}.query_heads": [1]},
        "ffn": {f"layers.{feeding[0]}.ffn": list(range(1, 64, 2)), f"layers.{feeding[-1]}.ffn": [5, 17]},
        "attention": {f"layers.{first}.attention": [0]},
        "mlp": {f"layers.{feeding[1]}.mlp": [0]},
        "layer": {"layers.0.layer": [0]},
    }
    there = [kind for kind in modes if kind in FAMILIES[family][2]]
    together = {name: units for kind in ("heads", "ffn", "layer") if kind in there for name, units in modes[kind].items()}
    return [modes[kind] for kind in there] + [
        {name: units for name, units in together.items() if not name.startswith("layers.0.") or name.endswith("layer")}
    ]


def pruned_by(family: str, lost: dict[str, list[int]]) -> PreTrainedModel:
    model, groups = subject(family)
    named = groups.named()
    cuts = tuple(Cut(name, tuple(unit for unit in range(named[name].units) if unit not in units)) for name, units in lost.items())
    plan = PrunePlan(groups.fingerprint, "planted", "planted", "per-layer", 0.1, 1, groups.parameters, groups.parameters, cuts)
    return cut(model, groups, plan)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_removing_is_silencing_in_the_layers_that_have_the_part(family: str) -> None:
    assert family not in families()
    model, groups = subject(family)
    assert {group.kind for group in groups.groups} == FAMILIES[family][2]
    if groups.of("heads"):
        assert {group.layer for group in groups.of("heads")} == FAMILIES[family][3]
    pruned = model
    for lost in lost_units(family):
        pruned = pruned_by(family, lost)
        assert parameter_count(pruned) < parameter_count(model)
        with silenced(model, family, lost):
            want = logits(model)
        assert (logits(model) - want).abs().max() > 1e-3, "silencing does something"
        assert (logits(pruned) - want).abs().max() <= 1e-5, lost
        view = ModelView(pruned)
        assert tuple(view.sizes(layer) for layer in range(len(view.layers))) == declared_sizes(pruned.config)
    if "layer" not in FAMILIES[family][2]:
        return
    lists = [value for value in vars(pruned.config).values() if isinstance(value, list) and len(value) == len(ModelView(model).layers)]
    assert not lists, "the lists with an entry for each layer are shorter by one"


@pytest.mark.slow
def test_what_a_config_counts_follows_the_layers() -> None:
    pruned = pruned_by("qwen3_5_text", {"layers.0.layer": [0]})
    assert pruned.config.layer_types == [FULL, LINEAR, FULL]
    assert "full_attention_interval" not in pruned.config.to_dict()
    assert pruned_by("qwen3_next", {"layers.1.layer": [0]}).config.mlp_only_layers == [0, 1, 2]
    assert pruned_by("lfm2_moe", {"layers.0.layer": [0]}).config.num_dense_layers == 1
    assert pruned_by("nemotron_h", {"layers.1.layer": [0]}).config.layers_block_type == [LINEAR, "mlp", FULL, "mlp"]
    shorter = pruned_by("lfm2", {f"layers.{layer}.ffn": list(range(1, 64, 2)) for layer in range(4)})
    assert type(shorter) is type(subject("lfm2")[0])
    assert shorter.config.intermediate_size == 32
    assert shorter.config.block_auto_adjust_ff_dim is False


@pytest.mark.slow
def test_a_sink_goes_with_its_head_in_a_softmax_over_both() -> None:
    model = random_model(*MODELS["gpt-oss"])
    groups = discover(model, ("heads",))
    cuts = tuple(Cut(f"layers.{layer}.heads", (0, 2)) for layer in (0, 1))
    plan = PrunePlan(groups.fingerprint, "planted", "planted", "uniform", 0.1, 1, groups.parameters, groups.parameters, cuts)
    pruned = cut(model, groups, plan)
    dense = logits(model)
    with torch.no_grad():
        for layer in (0, 1):
            model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")[:, 16:32] = 0.0
    assert (logits(model) - dense).abs().max() > 1e-3
    assert (logits(pruned) - logits(model)).abs().max() <= 1e-5
    assert type(pruned) is type(model)
    assert pruned.get_parameter("model.layers.0.self_attn.sinks").shape == (4,)


@pytest.mark.slow
def test_what_is_asked_too_much_or_not_known_is_said_in_one_line(tmp_path: Path, capsys: Any) -> None:
    model, _ = subject("qwen3_5_text")
    model.save_pretrained(tmp_path / "model")
    common = ["prune", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--criterion", "l2", "--align", "1"]
    mixers = sum(parameter.numel() for name, parameter in model.named_parameters() if ".linear_attn." in name)
    assert mixers / model.num_parameters() > 0.1
    capsys.readouterr()
    assert run([*common, "--ratio", "0.9"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"at most 0\.\d+ of the [\d,]+ parameters can go", said)
    left_alone = re.search(r"and (0\.\d+) are embeddings, mixers and others", said)
    assert left_alone is not None
    outside = sum(parameter.numel() for name, parameter in model.named_parameters() if not re.search(r"self_attn\.\w_proj|mlp", name))
    assert float(left_alone[1]) == pytest.approx(outside / model.num_parameters(), abs=0.002)
    edit_json(tmp_path / "model" / "config.json", layer_types=[LINEAR, "quantum_attention", LINEAR, FULL])
    assert run([*common, "--ratio", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "quantum_attention" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.slow
def test_saved_loaded_in_a_fresh_process_and_generated(tmp_path: Path) -> None:
    folders: dict[str, str] = {}
    want: dict[str, Tensor] = {}
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for family in FAMILIES:
        pruned: Any = pruned_by(family, lost_units(family)[-1])
        pruned.save_pretrained(tmp_path / family)
        folders[family], want[family] = str(tmp_path / family), logits(pruned)
        ids = IDS[:1, :5]
        with_cache, without = (pruned.generate(ids, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(with_cache, without), family
    got = logits_in_a_fresh_process(folders, IDS, tmp_path)
    for family, logits_there in want.items():
        assert (got[family] - logits_there).abs().max() <= 1e-5, family
