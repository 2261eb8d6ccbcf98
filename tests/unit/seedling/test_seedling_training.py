"""The script that makes seedling: it goes on after a kill, and measures what it says."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_seedling
from seedling.batches import PackedWindows
from seedling.measure import model_nats
from seedling.training import Batches, Settings, Trainer, initial_model, learning_rate

TINY = Settings(
    hidden=16,
    ffn=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    vocabulary_tokens=300,
    window_tokens=32,
    short_window_tokens=16,
    batch_tokens=96,
    steps=6,
    warmup_steps=2,
    decay_steps=2,
)


def tiny_batches(settings: Settings = TINY) -> Batches:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 300, size).astype(np.uint16) for size in (50, 400, 7, 300, 150)]
    return Batches(documents, settings)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.slow
def test_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole = Trainer(TINY, tiny_batches())
    losses = [whole.advance() for _ in range(6)]
    first = Trainer(TINY, tiny_batches())
    for _ in range(3):
        first.advance()
    first.save(tmp_path / "checkpoint.safetensors")
    first.advance()  # what comes after the last checkpoint is lost by a kill
    second = Trainer(TINY, tiny_batches())
    second.load(tmp_path / "checkpoint.safetensors")
    assert [second.advance() for _ in range(3)] == losses[3:]
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())
    assert not all(torch.equal(value, weights(first)[name]) for name, value in weights(whole).items())


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_workers() -> None:
    ends = []
    for workers in (1, 3):
        trainer = Trainer(TINY, tiny_batches(), workers)
        for _ in range(3):
            trainer.advance()
        ends.append(weights(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_step_is_that_of_plain_adamw_on_the_whole_batch() -> None:
    settings = Settings(**{**TINY.__dict__, "bf16_autocast": False})
    trainer = Trainer(settings, tiny_batches(settings))
    model = initial_model(settings)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.ndim == 2 else 0.0} for p in model.parameters()], betas=(0.9, 0.98)
    )
    for step in range(2):
        loss = trainer.advance()
        ids_BT = tiny_batches(settings).batch(step)
        expected = model(input_ids=ids_BT, labels=ids_BT).loss
        expected.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_lr * (step + 1) / 2
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights(trainer)[name], parameter.detach(), rtol=1e-3, atol=1e-5)


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_batches())
    trainer.save(tmp_path / "checkpoint.safetensors")
    other = Trainer(Settings(**{**TINY.__dict__, "seed": 21}), tiny_batches())
    with pytest.raises(ValueError, match="written under other settings"):
        other.load(tmp_path / "checkpoint.safetensors")


@pytest.mark.slow
def test_number_of_steps_may_change_until_the_decay_and_not_after(tmp_path: Path) -> None:
    longer = Settings(**{**TINY.__dict__, "steps": 8})
    whole = Trainer(longer, tiny_batches(longer))
    losses = [whole.advance() for _ in range(8)]
    trainer = Trainer(TINY, tiny_batches())
    for _ in range(4):
        trainer.advance()
    trainer.save(tmp_path / "checkpoint.safetensors")
    other = Trainer(longer, tiny_batches(longer))
    other.load(tmp_path / "checkpoint.safetensors")
    assert [other.advance() for _ in range(4)] == losses[4:]
    trainer.advance()
    trainer.save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="written under other settings"):
        Trainer(longer, tiny_batches(longer)).load(tmp_path / "checkpoint.safetensors")


def test_windows_are_short_up_to_the_decay_and_whole_from_there() -> None:
    shapes = [tuple(tiny_batches().batch(step).shape) for step in range(6)]
    assert shapes == [(6, 16)] * 4 + [(3, 32)] * 2


def test_learning_rate_warms_up_stays_level_and_ends_at_its_final_share() -> None:
    rates = [learning_rate(step, TINY) for step in range(TINY.steps + 1)]
    assert rates[0] == TINY.peak_lr / 2
    assert rates[1:5] == [TINY.peak_lr] * 4
    assert rates[-1] == pytest.approx(TINY.final_lr_share * TINY.peak_lr)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_windows_of_an_epoch_cover_the_text_once_and_epochs_differ() -> None:
    documents = [np.arange(start, start + 100, dtype=np.uint16) for start in (0, 100, 200)]
    windows = PackedWindows(documents, 10, 2, seed=1)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * windows.batches_per_epoch, (epoch + 1) * windows.batches_per_epoch)
        epochs.append(np.concatenate([windows.batch(step) for step in steps]))
    for epoch in epochs:
        assert len(np.unique(epoch)) == epoch.size > 250  # nothing twice, little left out
    assert not np.array_equal(epochs[0], epochs[1])
    with pytest.raises(ValueError, match="do not fill a batch"):
        PackedWindows(documents, 200, 2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 31), (24, 8)])
def test_measured_losses_are_those_of_each_token_with_its_stated_context(window: int, stride: int) -> None:
    model = initial_model(TINY).double()
    model.set_attn_implementation("sdpa")  # the eager one rounds its softmax to fp32
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():  # a model that looks at its context
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    documents = [torch.randint(0, 300, (size,), generator=generator).numpy().astype(np.uint16) for size in (5, 75, 32, 33)]
    expected = []
    for document in documents:
        for position in range(1, len(document)):
            start = 0
            while position >= start + window:  # the first window that holds the token scores it
                start += stride
            context = torch.from_numpy(document[start : position + 1].astype(np.int64))[None]
            logits = model(input_ids=context[:, :-1]).logits[0, -1]
            expected.append(-logits.log_softmax(-1)[context[0, -1]].item())
    np.testing.assert_allclose(model_nats(model, documents, window, stride), expected, rtol=1e-9)


def test_a_stride_without_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stride 32 has to lie in 1\.\.31"):
        model_nats(initial_model(TINY), [np.zeros(50, dtype=np.uint16)], 32, 32)


@pytest.mark.long
def test_smoke_run_that_was_stopped_exports_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(work: str, output: str, *more: str) -> str:
        arguments = ["--smoke", "--work", str(tmp_path / work), "--output", str(tmp_path / output), *more]
        monkeypatch.setattr(sys, "argv", ["train_seedling.py", *arguments])
        train_seedling.main()
        return capsys.readouterr().out

    run("whole", "a")
    run("parts", "b", "--stop-at", "4")
    assert not (tmp_path / "b").exists()
    assert "going on from step 4" in run("parts", "b")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    model_files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "a").iterdir()} == model_files | {"README.md", "held_out.json", "training_log.csv"}
    assert load_file(tmp_path / "a" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
