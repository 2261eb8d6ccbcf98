"""A model that one call made is taken by the next with its record, as if it had been saved between them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import regraft
from folders import tiny_tokenizer
from regraft.models import live
from regraft.models.live import lineage, remember

TEXTS = [f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(40)]
PRUNE: dict[str, Any] = {"criterion": "l2", "reconstruct": "none", "shape": "per-layer", "layers": "0:2", "ratio": 0.12, "align": 1}
TRAIN: dict[str, Any] = {"data": TEXTS, "max_steps": 2, "per_device_train_batch_size": 2, "max_length": 24, "eval_steps": 2, "quiet": True}


@pytest.mark.long
def test_a_chain_in_memory_is_the_chain_of_folders(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    small = regraft.prune(make_model("llama"), tokenizer=tokenizer, **PRUNE)
    small.save_pretrained(tmp_path / "small")
    plans, trained = [], []
    assert small.model is not None
    models: list[PreTrainedModel | Path] = [small.model, tmp_path / "small"]
    for model in models:
        found = regraft.allocate_ranks(model, tokenizer=tokenizer, data=TEXTS, method="proportional", budget="r=4", confirm_seeds=0)
        plans.append((found.plan.ranks, [slot.features for slot in found.search.space.slots]))
        trained.append(regraft.recover(model, tokenizer=tokenizer, rank=4, **TRAIN))
    assert plans[0] == plans[1]
    assert "share_pruned" in plans[0][1][0]
    assert [done.recovered.ranks.method for done in trained] == ["proportional"] * 2
    assert trained[0].recovered.ranks == trained[1].recovered.ranks
    first, second = (done.model.state_dict() for done in trained)
    assert all(torch.equal(first[name], value) for name, value in second.items())
    made = trained[0].save_pretrained(tmp_path / "trained")
    assert [parent["plan"]["cuts"] for parent in made.parents] == [parent["plan"]["cuts"] for parent in trained[1].record.parents]
    again = regraft.recover(trained[0].model, tokenizer=tokenizer, rank=4, **TRAIN)
    assert len(again.record.parents) == 2  # what was trained is remembered as well


def test_the_record_goes_with_the_object(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    made = regraft.prune(model, tokenizer=tiny_tokenizer(), **PRUNE)
    assert made.model is not None
    assert lineage(made.model).provenance == made.provenance
    assert lineage(model).provenance is None
    assert lineage(copy.deepcopy(made.model)).provenance is None  # another object, of which anything may become
    assert remember(model, None) is model
    again = regraft.prune(model, tokenizer=tiny_tokenizer(), in_place=True, **PRUNE)
    assert again.model is model
    assert lineage(model).provenance == again.provenance
    kept = len(live._MADE)
    del made
    gc.collect()
    assert len(live._MADE) < kept
