"""Experts as a target: what is left computes as the whole does when its router never chooses the others; scores are those of the paper."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from folders import text_file, tiny_tokenizer
from fresh_logits import logits_in_a_fresh_process
from regraft.cli.app import run
from regraft.groups.experts import channel_groups, expert_groups, experts_of
from regraft.importance.experts import score_channels, score_experts
from regraft.importance.passes import WholeModel
from regraft.models.load import load
from regraft.pipelines.prune.experts import experts_wanted, plan_by_scores
from regraft.pipelines.prune.prune import prune
from regraft.plans import Scores
from regraft.settings import PruneSettings
from regraft.surgery.experts import cut_experts

IDS = torch.randint(3, 97, (3, 16), generator=torch.Generator().manual_seed(3))
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "moe_intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
# Name of the number of experts; how the router turns logits into weights: over all experts or over the chosen, and whether they sum to one.
FAMILIES = {
    "qwen3_moe": ("num_experts", "all", True),
    "mixtral": ("num_local_experts", "all", True),
    "olmoe": ("num_experts", "all", False),
    "granitemoe": ("num_local_experts", "chosen", True),
    "gpt_oss": ("num_local_experts", "chosen", True),
}


def random_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    values: dict[str, Any] = {**SIZES, FAMILIES[family][0]: 6} | ({"norm_topk_prob": True} if family == "qwen3_moe" else {})
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def router_of(model: PreTrainedModel, name: str) -> Any:
    block = model.get_submodule(name.rpartition(".")[0])
    return next(child for inner, child in block.named_children() if inner in ("gate", "router"))


def routed(family: str, router: Any, hidden: Tensor, never: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The router's formula, without some of the experts: logits, weights and indices of two experts for each token."""
    _, over, normed = FAMILIES[family]
    scores = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T + getattr(router, "bias", torch.zeros(6))
    scores[:, never] = -torch.inf
    if over == "all":
        weights, chosen = scores.softmax(-1).topk(2)
        return scores, weights / weights.sum(-1, keepdim=True) if normed else weights, chosen
    best, chosen = scores.topk(2)
    return scores, best.softmax(-1), chosen


@contextmanager
def never_chosen(family: str, model: PreTrainedModel, gone: dict[int, list[int]]) -> Iterator[None]:
    handles = []
    for experts in experts_of(model):
        never = gone.get(experts.layer, [])

        def instead(router: Any, inputs: tuple[Tensor, ...], _output: Any, never: list[int] = never) -> Any:
            return routed(family, router, inputs[0], never)

        handles.append(router_of(model, experts.name).register_forward_hook(instead))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_removed_experts_are_experts_that_are_never_chosen(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    with never_chosen(family, model, {}):
        assert (logits(model) - (want := logits(model))).abs().max() == 0
    assert (logits(model) - want).abs().max() <= 1e-5, "the test knows this router"
    groups = expert_groups(model)
    gone = {0: [1, 4, 5], 1: [0, 2, 3]}
    values = {f"layers.{layer}.experts": tuple(0.0 if expert in lost else 1.0 for expert in range(6)) for layer, lost in gone.items()}
    wanted = experts_wanted(model, PruneSettings(targets=("experts",), experts=3), 0)
    plan = plan_by_scores(wanted, Scores(groups.fingerprint, "planted", values))
    pruned = cut_experts(model, groups, plan)
    with never_chosen(family, model, gone):
        want = logits(model)
    assert (logits(model) - want).abs().max() > 1e-3, "silencing does something"
    assert (logits(pruned) - want).abs().max() <= 1e-5
    assert type(pruned) is type(model)
    assert pruned.num_parameters() == plan.parameters_after
    pruned.save_pretrained(tmp_path / "model")
    loaded: Any = load(tmp_path / "model").model
    assert torch.equal(logits(loaded), logits(pruned))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS[:1, :4], use_cache=True, **settings), loaded.generate(IDS[:1, :4], use_cache=False, **settings))


@torch.no_grad()
def test_scores_are_router_weights_times_norms_of_outputs() -> None:
    """REAP, equation 9, by a loop over tokens in the test."""
    model = random_model("qwen3_moe")
    seen: list[tuple[Any, Tensor]] = []
    handles = [
        model.get_submodule(experts.name.rpartition(".")[0]).register_forward_pre_hook(
            lambda _module, inputs, layer=experts.layer: seen.append((layer, inputs[0].reshape(-1, 32)))
        )
        for experts in experts_of(model)
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    scores = score_experts(WholeModel(model, IDS).walk(), "f")
    for layer, hidden in seen:
        experts = experts_of(model)[layer]
        _, weights, chosen = routed("qwen3_moe", router_of(model, experts.name), hidden, [])
        stacks: Any = experts.module
        found: list[list[float]] = [[] for _ in range(6)]
        for token in range(len(hidden)):
            for weight, expert in zip(weights[token], chosen[token], strict=True):
                gate, up = (stacks.gate_up_proj[expert] @ hidden[token]).chunk(2)
                output = stacks.down_proj[expert] @ (silu(gate) * up)
                found[int(expert)].append(float(weight * output.norm()))
        want = [sum(entries) / len(entries) if entries else 0.0 for entries in found]
        assert scores.values[f"layers.{layer}.experts"] == pytest.approx(want, rel=1e-4)


@pytest.mark.long
def test_the_command_and_what_it_refuses(tmp_path: Path, capsys: Any) -> None:
    random_model("mixtral").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    common = ["prune", str(tmp_path / "model"), "--calibration", str(text_file()), "--samples", "4", "--seq-len", "16"]
    assert run([*common, "-o", str(tmp_path / "out"), "--targets", "experts", "--ratio", "0.3"]) == 0
    smaller = load(tmp_path / "out")
    assert smaller.provenance is not None
    plan = smaller.provenance.plan
    assert plan is not None
    assert plan.criterion == "reap"
    one = plan.achieved / (6 - smaller.model.config.num_local_experts)
    assert abs(plan.achieved - 0.3) <= one / 2, "no other number comes nearer"
    assert run([*common, "-o", str(tmp_path / "heads"), "--targets", "heads", "--ratio", "0.05", "--shape", "uniform"]) == 0
    capsys.readouterr()
    for given, why in (
        (["--targets", "experts", "--experts", "1"], "--experts 1 leaves 1 experts in a layer, and each token is sent to 2"),
        (["--targets", "experts", "--ratio", "0.9"], "--ratio 0.9 leaves"),
        (["--targets", "experts", "--experts", "6"], "6 of 6 experts are all of them"),
        (["--targets", "experts,heads"], "experts are cut by themselves"),
        (["--targets", "expert_ffn", "--ratio", "0.9"], "--ratio 0.9 leaves"),
        (["--targets", "expert_ffn", "--align", "4"], "--align 4 leaves experts that torch does not multiply in one call"),
        (["--targets", "expert_ffn", "--ratio", "0.0001"], "24 of 24 channels are all of them: the smallest step in every expert is"),
        (["--targets", "experts", "--ratio", "0.9", "--shape", "per-layer"], "leaves too few experts in a layer"),
        (["--targets", "experts", "--experts", "3", "--shape", "per-layer"], "--experts keeps the same number of experts in every layer"),
        (["--experts", "4", "--targets", "heads"], "--experts is for --targets experts"),
    ):
        assert run([*common, "-o", str(tmp_path / "refused"), *given]) == 2
        said = capsys.readouterr().err
        assert why in said
        assert len(said.strip().splitlines()) == 1
    assert run(["prune", "seedling", "-o", str(tmp_path / "refused"), "--targets", "experts"]) == 2
    assert "has no experts; choose another target" in capsys.readouterr().err


def silenced_channels(model: PreTrainedModel, family: str, kept: dict[str, tuple[int, ...]]) -> PreTrainedModel:
    """Returns a copy in which nothing reads the channels that are not kept: by the names in transformers' own classes alone."""
    silent = copy.deepcopy(model)
    for experts in experts_of(silent):
        reader: Any = experts.module.get_parameter("down_proj")
        for index in range(experts.count):
            gone = [channel for channel in range(24) if channel not in kept.get(f"layers.{experts.layer}.experts.{index}.ffn", range(24))]
            with torch.no_grad():
                if family == "gpt_oss":
                    reader[index, gone] = 0.0
                else:
                    reader[index, :, gone] = 0.0
    return silent


@pytest.mark.slow
def test_channels_and_counts_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    """Channels of experts alike in all layers stay in the stock class; channels and numbers of experts by layer are ours."""
    folders: dict[str, str] = {}
    want: dict[str, Tensor] = {}
    for family in FAMILIES:
        model = random_model(family)
        scores = score_channels(WholeModel(model, IDS).walk(), channel_groups(model).fingerprint)
        for shape in ("uniform", "per-layer"):
            settings = PruneSettings(targets=("expert_ffn",), ratio=0.2, shape=shape, align=8)
            wanted = experts_wanted(model, settings, 0)
            plan = plan_by_scores(wanted, scores)
            kept = {entry.group: entry.kept for entry in plan.cuts}
            assert len({kept[f"layers.0.experts.{index}.ffn"] for index in range(6)}) > 1, "each expert has channels of its own"
            pruned: Any = cut_experts(model, wanted.groups, plan)
            assert pruned.num_parameters() == plan.parameters_after
            assert abs(plan.achieved - 0.2) < 0.06
            widths = {len(channels) for channels in kept.values()}
            assert (type(pruned) is type(model)) == (len(widths) == 1)
            assert len(widths) == 1 or shape == "per-layer"
            assert (logits(pruned) - logits(silenced_channels(model, family, kept))).abs().max() <= 1e-5, (family, shape)
            assert (logits(pruned) - logits(model)).abs().max() > 1e-3
            folders[f"{family} {shape}"], want[f"{family} {shape}"] = str(tmp_path / f"{family}-{shape}"), logits(pruned)
            pruned.save_pretrained(tmp_path / f"{family}-{shape}")
        groups = expert_groups(model)
        gone = {0: [1], 1: [0, 2, 3]}
        values = {f"layers.{layer}.experts": tuple(0.0 if e in lost else 1.0 for e in range(6)) for layer, lost in gone.items()}
        each = groups.groups[0].unit_parameters
        wanted = experts_wanted(model, PruneSettings(targets=("experts",), ratio=4 * each / groups.parameters, shape="per-layer"), 0)
        uneven: Any = cut_experts(model, groups, plan_by_scores(wanted, Scores(groups.fingerprint, "planted", values)))
        assert [experts.count for experts in experts_of(uneven)] == [5, 3]
        in_one_call, how = logits(uneven), model.config._experts_implementation
        assert how == "grouped_mm"
        for way in (how, "eager"):
            uneven.set_experts_implementation(way)
            modules: list[Any] = [experts.module for experts in experts_of(uneven)]
            assert {module.config._experts_implementation for module in modules} == {way}, "the layers compute as the model says"
            assert (logits(uneven) - in_one_call).abs().max() <= 1e-5
        with never_chosen(family, model, gone):
            assert (logits(uneven) - logits(model)).abs().max() <= 1e-5, family
        settings_of = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with_cache, without = (uneven.generate(IDS[:1, :4], use_cache=use, **settings_of) for use in (True, False))
        assert torch.equal(with_cache, without), family
        folders[f"{family} counts"], want[f"{family} counts"] = str(tmp_path / f"{family}-counts"), logits(uneven)
        uneven.save_pretrained(tmp_path / f"{family}-counts")
    got = logits_in_a_fresh_process(folders, IDS, tmp_path)
    for name, there in want.items():
        assert (got[name] - there).abs().max() <= 1e-5, name


@torch.no_grad()
def test_scores_of_channels_are_the_energy_of_what_they_write() -> None:
    """By a loop over tokens, with the router's formula and the experts' own, in the test."""
    model = random_model("mixtral")
    seen: list[Tensor] = []
    first = experts_of(model)[0]
    handle = model.get_submodule(first.name.rpartition(".")[0]).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    logits(model)
    handle.remove()
    hidden = seen[0].reshape(-1, 32)
    _, weights, chosen = routed("mixtral", router_of(model, first.name), hidden, [])
    stacks: Any = first.module
    want = torch.zeros(6, 24, dtype=torch.float64)
    for token in range(len(hidden)):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            gate, up = (stacks.gate_up_proj[expert] @ hidden[token]).chunk(2)
            written = stacks.down_proj[expert] * (weight * silu(gate) * up)
            want[expert] += written.double().square().sum(0)
    scores = score_channels(WholeModel(model, IDS).walk(), "f")
    for index in range(6):
        assert scores.values[f"layers.0.experts.{index}.ffn"] == pytest.approx(want[index].tolist(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "target", "shape"), [("qwen3_moe", "experts", "uniform"), ("mixtral", "expert_ffn", "per-layer")])
def test_one_layer_at_a_time_gives_the_folder_that_memory_gives(family: str, target: Any, shape: Any, tmp_path: Path) -> None:
    random_model(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    common = {"targets": (target,), "ratio": 0.2, "shape": shape, "samples": 4, "seq_len": 16}
    whole = prune(tmp_path / "model", tmp_path / "whole", PruneSettings(**common), calibration=text_file())
    streamed = prune(tmp_path / "model", tmp_path / "streamed", PruneSettings(**common, memory="3GB"), calibration=text_file())
    assert streamed.plan.cuts == whole.plan.cuts
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "streamed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(load(tmp_path / "streamed").model), logits(load(tmp_path / "whole").model))
