"""Ranks of a recovery without a plan, beside the share that pruning took, counted from the matrices themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import regraft
from regraft.errors import PlanError, RegraftError
from regraft.models.load import Loaded, load
from regraft.pipelines.ranks.pattern import pattern_of
from regraft.pipelines.recover import recover_model
from regraft.settings import RecoverSettings


@pytest.fixture
def pruned(make_tiny: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Any, Any]]:
    """Returns a dense model of four layers, and its result of pruning."""

    def make(**settings: Any) -> tuple[Any, Any]:
        dense = make_tiny(num_hidden_layers=4, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4)
        given: dict[str, Any] = {"ratio": 0.3, "criterion": "l2", "reconstruct": "none", "align": 1} | settings
        return dense, regraft.prune(dense, tokenizer=tokenizer, **given)

    return make


def shares(dense: Any, small: Any) -> list[float]:
    """Returns the share of the numbers in the projections that each layer lost."""
    found: list[float] = []
    for before, after in zip(dense.model.layers, small.model.layers, strict=True):
        counts = [sum(weight.numel() for name, weight in layer.named_parameters() if "proj" in name) for layer in (before, after)]
        found.append(1.0 - counts[1] / counts[0])
    return found


@pytest.mark.slow
def test_layers_that_lost_more_get_higher_ranks_for_the_same_parameters(pruned: Callable[..., tuple[Any, Any]], tmp_path: Path) -> None:
    dense, result = pruned(shape="per-layer", layers="0:2", ratio=0.12)
    result.save_pretrained(tmp_path / "pruned")
    lost = shares(dense, result.model)
    assert max(lost[:2]) > max(lost[2:]) + 0.1
    text = tmp_path / "data.txt"
    text.write_text("<|endoftext|>".join(["abcdefgh" * 12] * 12))
    short: dict[str, Any] = {"data": text, "held_out": 0.2, "steps": 2, "batch": 2, "seq_len": 16, "eval_every": 2, "lr": 1e-3}
    done = recover_model(tmp_path / "pruned", tmp_path / "adapter", merge=False, rank=8, **short).recovered
    uniform = recover_model(tmp_path / "pruned", None, merge=False, rank=8, rank_pattern="uniform", **short).recovered
    assert uniform.ranks is None
    assert done.ranks is not None
    assert done.ranks.method == "proportional"
    ranks = [done.ranks.ranks[f"model.layers.{layer}.mlp.down_proj"] for layer in range(4)]
    assert min(ranks[:2]) >= max(ranks[2:])
    assert max(ranks) > min(ranks)
    assert 0.9 * uniform.trainable_parameters < done.trainable_parameters <= uniform.trainable_parameters
    again = recover_model(tmp_path / "pruned", tmp_path / "adapter", merge=False, rank=8, resume=True, **short)
    assert again.finished_before  # what was decided is part of the record


OTHERS: tuple[dict[str, Any], ...] = (
    {"adapter": "deep_lora"},
    {"alpha": 4.0},
    {"targets": ("q_proj",)},
    {"rank": 1},
    {"rank_pattern": "uniform"},
)


@pytest.mark.slow
@pytest.mark.parametrize("others", OTHERS)
def test_one_rank_stands_elsewhere(pruned: Callable[..., tuple[Any, Any]], others: dict[str, Any], tmp_path: Path) -> None:
    _, result = pruned(shape="per-layer", layers="0:2", ratio=0.2)
    loaded = loaded_of(result, tmp_path / "pruned")
    assert pattern_of(RecoverSettings(rank=8), loaded) is not None
    assert pattern_of(RecoverSettings.model_validate({"rank": 8} | others), loaded) is None


@pytest.mark.slow
def test_equal_shares_keep_one_rank_and_an_unpruned_model_has_no_proportion(
    pruned: Callable[..., tuple[Any, Any]], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense, result = pruned(shape="uniform")
    assert max(shares(dense, result.model)) - min(shares(dense, result.model)) < 1e-6
    assert pattern_of(RecoverSettings(rank=8), loaded_of(result, tmp_path / "pruned")) is None
    with pytest.raises(PlanError, match="prune it first"):
        regraft.recover(dense, tokenizer=tokenizer, data=["abc def"] * 64, rank_pattern="proportional", max_steps=1, max_length=8)


def test_a_plan_and_a_pattern_contradict(tmp_path: Path) -> None:
    with pytest.raises((ValidationError, RegraftError), match="give either ranks or rank_pattern"):
        RecoverSettings(ranks=tmp_path / "ranks.json", rank_pattern="proportional")


def loaded_of(result: Any, folder: Path) -> Loaded:
    """Saves and loads a model; its folder holds the record of what pruning took."""
    result.save_pretrained(folder)
    return load(str(folder))
