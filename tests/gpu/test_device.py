"""The same answers on a GPU as on the CPU, within rounding, and what only a GPU has: bf16 autocast and device memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from regraft.completion.estimator import CompressedMatrixCompletion
from regraft.data.text import read_corpus, split_corpus
from regraft.models.load import load, require_tokenizer
from regraft.numerics import counter
from regraft.pipelines.evaluate import evaluate_model
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.recover import recover_model
from regraft.settings import EvaluateSettings, LoadSettings, PruneSettings, RecoverSettings
from regraft.training.batches import collate, make_examples, spread
from regraft.training.losses import mean_loss

QUICK = {"ratio": 0.2, "samples": 8, "seq_len": 24, "align": 2, "shape": "per-layer"}


@pytest.mark.parametrize("criterion", ["taylor", "wanda", "surgeon"])
def test_the_same_channels_are_cut(folder: Path, text: Path, device: str, criterion: str) -> None:
    """Scores differ by rounding only: of random weights no two units are that close."""
    settings = PruneSettings(criterion=criterion, select="global", reconstruct="least_squares", calibration=text, **QUICK)
    here = prune(folder, None, settings)
    there = prune(folder, None, settings, load=LoadSettings(device=device))
    assert there.plan.cuts == here.plan.cuts
    assert {parameter.device.type for parameter in there.model.parameters()} == {device}
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = there.model(ids.to(device)).logits.cpu() - here.model(ids).logits
    assert float(apart.abs().max()) <= 1e-3


def test_streamed_is_in_memory(folder: Path, text: Path, tmp_path: Path, device: str) -> None:
    usual = {"criterion": "taylor", "select": "global", "reconstruct": "least_squares", "calibration": text} | QUICK
    on_device = LoadSettings(device=device)
    whole = prune(folder, tmp_path / "whole", PruneSettings(**usual), load=on_device)
    streamed = prune(folder, tmp_path / "streamed", PruneSettings(memory="4GB", **usual), load=on_device)
    assert streamed.plan.cuts == whole.plan.cuts
    wanted, found = (load(tmp_path / name).model.state_dict() for name in ("whole", "streamed"))
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


def test_recovery_in_bfloat16_learns_and_saves_what_it_measured(folder: Path, text: Path, tmp_path: Path, device: str) -> None:
    settings = RecoverSettings(data=text, steps=30, batch=8, seq_len=48, eval_every=10, lr=1e-2, held_out=0.2, quiet=True)
    result = recover_model(folder, tmp_path / "recovered", settings, load=LoadSettings(device=device), seed=0)
    assert result.recovered.best_loss < result.recovered.first_loss - 0.1
    loaded = load(tmp_path / "recovered")
    _, held_out = split_corpus(read_corpus(text, "train"), settings.held_out, 0)
    rows = make_examples(held_out, require_tokenizer(loaded), settings.seq_len, wanted=settings.held_out_windows, seed=0)
    saved = mean_loss(loaded.model, [collate(spread(rows, settings.held_out_windows), 2)], torch.device("cpu"))
    assert saved == pytest.approx(result.recovered.best_loss, abs=0.05)  # in float32, here; the training measured in bfloat16


def test_speed_reports_the_memory_of_the_device(folder: Path, text: Path, device: str) -> None:
    settings = EvaluateSettings(text=text, window=32, stride=16, speed=True)
    here = evaluate_model(folder, settings.model_copy(update={"speed": False}))
    there = evaluate_model(folder, settings, load=LoadSettings(device=device))
    assert math.isclose(there.loss.loss_nats, here.loss.loss_nats, abs_tol=1e-4)
    assert there.speed is not None
    assert 0 < there.speed.peak_memory_bytes < 2**31


def test_numbers_by_counting_are_equal_to_the_bit(device: str) -> None:
    here, there = (counter.uniform(2**63 + 11, 7, 100_003, where) for where in ("cpu", device))
    assert torch.equal(here, there.cpu())


def test_completion(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(60, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    rows, columns = torch.nonzero(torch.rand(60, 60, generator=generator) < 0.5, as_tuple=True)
    matrix = left @ right.T
    model = CompressedMatrixCompletion(rank=3, device=device, random_state=0)
    model.fit(rows.numpy(), columns.numpy(), matrix[rows, columns].numpy(), shape=(60, 60))
    everywhere = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    found = torch.from_numpy(model.predict(everywhere[:, 0].numpy(), everywhere[:, 1].numpy())).reshape(60, 60)
    assert float((found - matrix).norm() / matrix.norm()) <= 1e-3
