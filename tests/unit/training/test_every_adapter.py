"""Every adapter of the registry recovers a model whose layers differ in size, by its own rates, and ends as plain weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.adapters import ADAPTERS
from regraft.data.text import Corpus
from regraft.settings import RecoverSettings
from regraft.training.batches import make_examples, spread
from regraft.training.recover import recover

IDS = torch.arange(3, 43).reshape(2, 20)
FASTER = {"mora": 1e-2, "deep_lora": 3e-2, "adalora": 1e-2}  # than their own rates, which are for longer runs


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.long
@pytest.mark.parametrize("name", ADAPTERS.names())
def test_it_lowers_the_loss_and_merges(
    name: str,
    make_tiny: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    repeating: tuple[Corpus, Corpus],
    quick: Callable[..., RecoverSettings],
    tmp_path: Path,
) -> None:
    model: Any = make_tiny()
    mlp = model.model.layers[1].mlp
    for part, shape in (("gate_proj", (28, 32)), ("up_proj", (28, 32)), ("down_proj", (32, 28))):
        narrow = nn.Linear(shape[1], shape[0], bias=False)
        narrow.weight.data.copy_(getattr(mlp, part).weight[: shape[0], : shape[1]].detach())
        setattr(mlp, part, narrow)
    before, names = logits(model), set(model.state_dict())
    settings = quick(adapter=name, lr=FASTER.get(name), dropout=0.0, schedule="constant", warmup=0.0)
    rows = spread(
        make_examples(repeating[1], tokenizer, settings.seq_len, wanted=settings.held_out_windows, seed=0), settings.held_out_windows
    )
    with torch.no_grad():
        total = sum(float(model(row.input_ids[None], labels=row.labels[None]).loss) * (len(row.labels) - 1) for row in rows)
    alone = total / sum(len(row.labels) - 1 for row in rows)
    done = recover(model, tokenizer, *repeating, settings, seed=0, work=tmp_path / "work")
    assert done.first_loss == pytest.approx(alone, abs=1e-3)  # of the text alone: AdaLoRA adds to the loss that it trains on
    assert done.best_loss < done.first_loss - 0.1
    assert done.best_step > 0
    assert set(done.model.state_dict()) == names
    assert type(done.model.get_submodule("model.layers.1.mlp.up_proj")) is nn.Linear
    assert float((logits(done.model) - before).abs().max()) > 0.1
