"""What can be switched on beside plain LoRA: each against what it must equal, or what it must change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.data.text import Corpus
from regraft.errors import InputError
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject
from regraft.training import job as job_module
from regraft.training import recover as module
from regraft.training.batches import Example, RecordFormat, collate, is_blind_to_neighbours, make_examples, pack_records
from regraft.training.callbacks import log_csv
from regraft.training.losses import summed_loss
from regraft.training.optimizer import make_optimizer, parameter_groups
from regraft.training.recover import recover

CPU = torch.device("cpu")
Make = Callable[..., LlamaForCausalLM]
Quick = Callable[..., RecoverSettings]
Corpora = tuple[Corpus, Corpus]


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def stopping(make_tiny: Make, tokenizer: PreTrainedTokenizerFast, train: Corpus, quick: Quick, work: Path, **more: Any) -> Any:
    """A run whose held-out loss rises from the start: what it trains on is nothing like what it is judged by."""
    others = Corpus("others", "held-out", ("STUVWXYZ" * 12,) * 6)
    model = make_tiny()
    recover(model, tokenizer, others, others, quick(steps=30), seed=0, work=work / "first")
    settings = quick(steps=40, eval_every=3, schedule="constant", warmup=0.0, patience=2)
    return recover(model, tokenizer, train, others, settings, seed=0, work=work / "second", **more)


@pytest.mark.long
def test_training_stops_when_patience_is_out_and_stays_stopped(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stopping(make_tiny, tokenizer, repeating[0], quick, tmp_path)
    assert first.best_step == 0
    assert first.log[-1].step == 6  # the looks at 3 and 6 found nothing better
    steps: list[int] = []
    original = module.Pace.on_step_begin
    monkeypatch.setattr(module.Pace, "on_step_begin", lambda *a, **k: (steps.append(1), original(*a, **k))[1])
    model = make_tiny()
    others = Corpus("others", "held-out", ("STUVWXYZ" * 12,) * 6)
    recover(model, tokenizer, others, others, quick(steps=30), seed=0, work=tmp_path / "first", resume=True)
    settings = quick(steps=40, eval_every=3, schedule="constant", warmup=0.0, patience=2)
    again = recover(model, tokenizer, repeating[0], others, settings, seed=0, work=tmp_path / "second", resume=True)
    assert steps == []
    assert log_csv(again.log) == log_csv(first.log)
    for name, value in tensors(first.model).items():
        assert torch.equal(again.model.state_dict()[name], value)


@pytest.mark.long
def test_checkpointed_activations_change_nothing(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    found = []
    for on in (False, True):
        calls: list[int] = []
        model = make_tiny()
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *parts, calls=calls: calls.append(1) if parts[0].training else None)
        settings = quick(steps=4, eval_every=4, dropout=0.3, gradient_checkpointing=on)
        recover(model, tokenizer, *repeating, settings, seed=0, work=tmp_path / str(on))
        found.append(tensors(model))
        assert len(calls) == (8 if on else 4)  # once more in the backward pass
        assert not model.is_activation_checkpointing
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


def test_lora_plus_trains_b_faster(make_tiny: Make, quick: Quick) -> None:
    injected = inject(make_tiny(), quick(), None, 0)
    groups = parameter_groups(injected, quick(lr=2e-3, lr_ratio=8.0))
    names = {id(parameter): name for name, parameter in injected.module.named_parameters()}
    assert [group.lr for group in groups] == [2e-3, 1.6e-2]
    assert all("lora_A" in names[id(parameter)] for parameter in groups[0].parameters)
    assert all("lora_B" in names[id(parameter)] for parameter in groups[1].parameters)
    trained = [parameter for parameter in injected.module.parameters() if parameter.requires_grad]
    assert sum(len(group.parameters) for group in groups) == len(trained) == 28
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = make_optimizer(groups)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # the first step of Adam is the learning rate, whatever the gradient
    for parameter, old in zip(trained, before, strict=True):
        lr = 1.6e-2 if "lora_B" in names[id(parameter)] else 2e-3
        torch.testing.assert_close(old - parameter.detach(), torch.full_like(old, lr), rtol=1e-3, atol=1e-6)


def test_lora_plus_needs_a_matrix_b(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    model = make_tiny()
    before = tensors(model)
    with pytest.raises(InputError, match=r"`lr_ratio=4.0` belongs to LoRA\+") as raised:
        recover(model, tokenizer, *repeating, quick(adapter="lora_xs", lr_ratio=4.0), seed=0, work=tmp_path / "w")
    assert "\n" not in str(raised.value)
    assert tensors(model).keys() == before.keys()


@pytest.mark.slow
def test_packed_records_are_read_as_if_alone(
    make_tiny: Make, records: Corpora, tokenizer: PreTrainedTokenizerFast, quick: Quick, tmp_path: Path
) -> None:
    alone = make_examples(records[0], tokenizer, 400, wanted=100, seed=0)
    packed = make_examples(records[0], tokenizer, 400, wanted=100, seed=0, records=RecordFormat(packing=True))
    assert len(packed) < len(alone) / 1.5
    assert sum(len(row.input_ids) for row in packed) == sum(len(row.input_ids) for row in alone)
    assert max(len(row.input_ids) for row in packed) <= 400
    model = make_tiny()
    assert is_blind_to_neighbours(model)
    model.config.use_cache = False  # as the Trainer sets it; with a cache transformers does not look for packed rows
    (nats, tokens), (wanted, count) = (summed_loss(model, [collate(rows, 2)], CPU) for rows in (packed, alone))
    assert tokens == count
    assert nats == pytest.approx(wanted, rel=1e-5)
    # The negative control: without positions the same rows see their neighbours.
    blended, _ = summed_loss(model, [collate([Example(row.input_ids, row.labels) for row in packed], 2)], CPU)
    assert abs(blended - wanted) > 1e-4 * wanted
    # A step of training on all of them has their mean as its loss.
    settings = quick(batch=len(packed), steps=1, eval_every=1, seq_len=400, packing=True, dropout=0.0)
    done = recover(make_tiny(), tokenizer, *records, settings, seed=0, work=tmp_path)
    assert done.log[-1].train_loss_nats == pytest.approx(wanted / count, rel=1e-5)


def test_records_are_packed_where_least_room_is_left() -> None:
    rows = [Example(torch.arange(length), torch.arange(length)) for length in (6, 3, 5, 2, 4)]
    packed = pack_records(rows, 8)
    assert [row.position_ids.tolist() for row in packed if row.position_ids is not None] == [
        [*range(6), 0, 1],
        [0, 1, 2, *range(5)],
        [*range(4)],
    ]
    assert [row.labels.tolist() for row in packed][1] == [-100, 1, 2, -100, 1, 2, 3, 4]


@pytest.mark.long
def test_a_model_that_reads_on_over_the_border_is_not_packed(
    records: Corpora, tokenizer: PreTrainedTokenizerFast, quick: Quick, tmp_path: Path, make_tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without positions of its own cannot be told where a record begins; its rows are padded instead."""
    assert is_blind_to_neighbours(GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=64, n_embd=16, n_layer=1, n_head=2)))
    found = []
    for packing, blind in ((False, True), (True, False), (True, True)):
        monkeypatch.setattr(job_module, "is_blind_to_neighbours", lambda model, blind=blind: blind)
        settings = quick(steps=2, eval_every=2, seq_len=400, packing=packing)
        model = make_tiny()
        recover(model, tokenizer, *records, settings, seed=0, work=tmp_path / f"{packing}{blind}")
        found.append(tensors(model))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    assert any(not torch.equal(found[2][name], value) for name, value in found[0].items())
