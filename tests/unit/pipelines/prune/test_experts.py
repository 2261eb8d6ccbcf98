"""Experts as a target: what is left computes as the whole does when its router never chooses the others; scores are those of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from folders import text_file, tiny_tokenizer
from regraft.cli.app import run
from regraft.groups.experts import expert_groups, experts_of
from regraft.importance.experts import score_experts
from regraft.models.load import load
from regraft.pipelines.prune.experts import experts_wanted, plan_experts
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
    plan = plan_experts(wanted, Scores(groups.fingerprint, "planted", values))
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
    scores = score_experts(model, "f", IDS, batch=2)
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
        (["--targets", "experts", "--memory", "3GB"], "--memory does not read experts"),
        (["--experts", "4", "--targets", "heads"], "--experts is for --targets experts"),
    ):
        assert run([*common, "-o", str(tmp_path / "refused"), *given]) == 2
        said = capsys.readouterr().err
        assert why in said
        assert len(said.strip().splitlines()) == 1
    assert run(["prune", "seedling", "-o", str(tmp_path / "refused"), "--targets", "experts"]) == 2
    assert "has no experts; choose another target" in capsys.readouterr().err
