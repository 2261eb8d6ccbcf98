"""Families without a table: what transformers can build is pruned exactly, saved and loaded, or refused in one line.

What is removed is silenced beside it, by code that knows three names of modules of each family and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from folders import text_file, tiny_tokenizer
from regraft.cli.app import run
from regraft.errors import ModelError
from regraft.groups.discover import discover
from regraft.models.family import families, family_of
from regraft.models.inferred import describe
from regraft.models.load import load
from regraft.models.view import parameter_count
from regraft.plans import Cut, Groups, PrunePlan
from regraft.surgery.cut import cut
from verdicts import KINDS
from zeroing import random_model

IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 3, "intermediate_size": 64}
LLAMAS = ("model.layers", "self_attn.o_proj", "mlp.down_proj")

# Config; list of layers, what writes the stream in attention and feed-forward network; what cannot be cut beside the residual width.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, str, str], set[str]]] = {
    "gemma": ({**GROUPED, "head_dim": 8}, LLAMAS, set()),
    "granite": (GROUPED, LLAMAS, set()),
    "cohere": (GROUPED, LLAMAS, set()),
    "olmo": (GROUPED, LLAMAS, set()),
    "olmo3": (GROUPED, LLAMAS, {"heads", "query_heads"}),
    "phi": (GROUPED, ("model.layers", "self_attn.dense", "mlp.fc2"), set()),
    "glm4": ({**GROUPED, "head_dim": 8}, LLAMAS, set()),
    "smollm3": (GROUPED, LLAMAS, set()),
    "gptj": ({**SIZES, "n_inner": 64, "rotary_dim": 4}, ("transformer.h", "attn.out_proj", "mlp.fc_out"), {"query_heads"}),
    "persimmon": (
        {**SIZES, "intermediate_size": 64}, ("model.layers", "self_attn.dense", "mlp.dense_4h_to_h"), {"query_heads"},
    ),
    "helium": ({**GROUPED, "head_dim": 8}, LLAMAS, set()),
    "xglm": (
        {**SIZES, "ffn_dim": 64, "scale_embedding": True}, ("model.layers", "self_attn.out_proj", "fc2"), {"query_heads"},
    ),
    "apertus": (GROUPED, LLAMAS, set()),
    "codegen": (
        {**SIZES, "num_attention_heads": 4, "n_inner": 64, "rotary_dim": 4}, ("transformer.h", "attn.out_proj", "mlp.fc_out"),
        {"heads", "query_heads"},
    ),
    "bitnet": (GROUPED, LLAMAS, {"heads", "query_heads", "ffn"}),
    "nemotron": (GROUPED, ("model.layers", "self_attn.o_proj", "mlp.down_proj"), set()),
}  # fmt: skip


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@contextmanager
def silenced(model: PreTrainedModel, family: str, lost: dict[str, list[int]], groups: Groups) -> Iterator[None]:
    """Takes away what the lost units write: by zeros in what enters or leaves a matrix, and a layer by handing on what entered it."""
    layers, attention, mlp = FAMILIES[family][1]
    kv_heads = 3 if "num_key_value_heads" in FAMILIES[family][0] else 6
    handles = []

    def zeros(channels: list[int]) -> Callable[..., Any]:
        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows = inputs[0].clone()
            rows[..., channels] = 0.0
            return (rows,)

        return before

    def handed_on(_module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> Any:
        entering = given[0] if given else named["hidden_states"]
        return (entering, *output[1:]) if isinstance(output, tuple) else entering

    for name, units in lost.items():
        _, index, kind = name.split(".")
        layer = model.get_submodule(f"{layers}.{index}")
        repeats = 6 // kv_heads
        heads = [unit * repeats + query for unit in units for query in range(repeats)]
        if kind == "query_heads":
            heads = [group * repeats + unit for unit in units for group in range(kv_heads)]
        if kind in ("heads", "query_heads"):
            channels = [8 * head + channel for head in heads for channel in range(8)]
            handles.append(layer.get_submodule(attention).register_forward_pre_hook(zeros(channels)))
        elif kind == "ffn":
            handles.append(layer.get_submodule(mlp).register_forward_pre_hook(zeros(units)))
        elif kind == "layer":
            handles.append(layer.register_forward_hook(handed_on, with_kwargs=True))
        else:
            part = layer.get_submodule(attention if kind == "attention" else mlp)
            handles.append(part.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


LOST: dict[str, dict[str, list[int]]] = {
    "heads": {"layers.0.heads": [1], "layers.2.heads": [0, 2]},
    "query_heads": {"layers.0.query_heads": [1]},
    "ffn": {"layers.0.ffn": list(range(1, 64, 2)), "layers.2.ffn": [5, 17]},
    "attention": {"layers.1.attention": [0]},
    "mlp": {"layers.0.mlp": [0]},
    "layer": {"layers.1.layer": [0]},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_removing_is_silencing_in_every_mode_and_together(family, tmp_path):
    assert family not in families()
    model = random_model(family, FAMILIES[family][0])
    groups = discover(model, KINDS)
    there = {group.kind for group in groups.groups}
    assert set(KINDS) - there == {"residual"} | FAMILIES[family][2]
    named = groups.named()
    modes = [lost for kind, lost in LOST.items() if kind in there]
    modes.append({name: units for mode in ("heads", "ffn", "layer") if mode in there for name, units in LOST[mode].items()})
    for lost in modes:
        cuts = tuple(Cut(name, tuple(unit for unit in range(named[name].units) if unit not in units)) for name, units in lost.items())
        plan = PrunePlan(groups.fingerprint, "planted", "planted", "per-layer", 0.1, 1, groups.parameters, groups.parameters, cuts)
        pruned = cut(model, groups, plan)
        assert parameter_count(pruned) < parameter_count(model)
        with silenced(model, family, lost, groups):
            want = logits(model)
        assert (logits(model) - want).abs().max() > 1e-3, "silencing does something"
        assert (logits(pruned) - want).abs().max() <= 2e-5, lost
    pruned.save_pretrained(tmp_path / family)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    assert torch.equal(logits(again), logits(pruned))


def saved(family: str, folder) -> str:
    random_model(family, FAMILIES[family][0]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gptj"])
def test_the_commands_take_it_by_default_settings_and_streamed(family, tmp_path):
    model = saved(family, tmp_path / "model")
    quick = ["--ratio", "0.2", "--samples", "4", "--seq-len", "16", "--align", "1", "--calibration", str(text_file())]
    assert run(["prune", model, "-o", str(tmp_path / "plain"), *quick]) == 0
    record = load(tmp_path / "plain").provenance
    assert record is not None
    assert record.plan is not None
    assert record.plan.achieved == pytest.approx(0.2, abs=0.01)
    assert parameter_count(load(tmp_path / "plain").model) == record.plan.parameters_after
    assert run(["evaluate", str(tmp_path / "plain"), "--text", str(text_file("test")), "--max-tokens", "64", "--window", "32"]) == 0
    quick += ["--criterion", "taylor", "--select", "global", "--reconstruct", "least_squares"]
    assert run(["prune", model, "-o", str(tmp_path / "whole"), *quick]) == 0
    assert run(["prune", model, "-o", str(tmp_path / "streamed"), *quick, "--memory", "3GB"]) == 0
    whole, streamed = (load(tmp_path / name).model.state_dict() for name in ("whole", "streamed"))
    assert whole.keys() == streamed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(streamed[name], tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("llama4", r"its language model lies beside others, .*prune it by `tower=text`"),  # at once: 400 billion parameters are never made
        ("dots3_note_text", r"even a small model of it has 41 million parameters"),
        ("recurrent_gemma", r"its feed-forward network has another width than its config says"),
        ("openai-gpt", r"a layer \(Block\) is not made from a config and its number"),
        ("mamba", r"'backbone\.layers\.0\.mixer\.conv1d' \(Conv1d\) is no matrix"),
        ("bert", r"depend on later tokens"),
        ("t5", r"no causal language model of type 't5'"),
        ("mamba3x", r"no causal language model of type 'mamba3x'"),
    ],
)
def test_what_is_not_of_the_kind_is_refused_with_the_reason(family, why):
    words = rf"^model family '{family}' is not known \(.*({why}).*\); known by tables: bloom, .*llama"
    with pytest.raises(ModelError, match=words) as refused:
        family_of(family)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_what_cannot_be_cut_is_left_out_with_a_word(tmp_path, capsys):
    model = saved("apertus", tmp_path / "model")
    common = ["prune", model, "--criterion", "l2", "--align", "1", "--targets", "residual,ffn", "--ratio", "0.1"]
    for more in (["--dry-run"], ["--output", str(tmp_path / "out"), "--memory", "3GB"]):
        assert run([*common, *more]) == 0
        said = capsys.readouterr().out
        assert "--targets residual is left out: the norms of a family without a table cannot be rescaled with certainty" in said


@pytest.mark.slow
def test_a_computation_that_cannot_be_exported_is_refused_in_one_line(capfd):
    """A rotary embedding of half of five channels: the model itself cannot be run."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["phi"](**{**GROUPED, "hidden_size": 60}))
    capfd.readouterr()
    with pytest.raises(ModelError, match="the computation of PhiForCausalLM cannot be exported") as refused:
        discover(model)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_looking_at_a_family_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    describe("granite")
    assert torch.equal(torch.get_rng_state(), before)
