"""Train seedling, the embedded default model of regraft, and write it where the package carries it.

    python scripts/train_seedling.py --work runs/seedling                 # about an hour on two cores; kill it, call it again
    python scripts/train_seedling.py --work runs/seedling --export-only   # the model of the last checkpoint, as it is
    python scripts/train_seedling.py --work runs/smoke --output runs/smoke/model --smoke   # a tiny model, in seconds

It needs nothing but regraft's own dependencies and the standard library of the Python it runs in.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from regraft.seedling.corpus import Document, documents
from seedling.export import export
from seedling.tokenizer import encode_documents, save_tokenizer, train_tokenizer
from seedling.training import VALIDATION_WINDOWS, Batches, LogRow, Settings, Trainer, learning_rate

CHECKPOINT = "checkpoint.safetensors"
SMOKE = Settings(
    hidden=32,
    ffn=64,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=16,
    vocabulary_tokens=384,
    window_tokens=64,
    short_window_tokens=32,
    batch_tokens=128,
    steps=8,
    warmup_steps=2,
    decay_steps=2,
    bf16_autocast=False,
)


def main() -> None:
    """Runs the stages in turn: corpus, tokenizer, training, export with the held-out figures."""
    options = _arguments()
    settings = SMOKE if options.smoke else Settings()
    settings = replace(settings, steps=options.steps or settings.steps, seed=options.seed)
    limit_chars = 60_000 if options.smoke else None
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)

    train = documents("train", limit_chars=limit_chars)
    tokenizer = _tokenizer(work, train, settings)
    train_ids = encode_documents(tokenizer, (document.text for document in train))
    train_tokens = sum(len(ids) for ids in train_ids)
    print(f"{len(train)} documents, {sum(len(d.text) for d in train):,} characters, {train_tokens:,} tokens", flush=True)
    trainer = Trainer(settings, Batches(train_ids, settings), options.workers)
    if (work / CHECKPOINT).is_file():
        trainer.load(work / CHECKPOINT)
        print(f"going on from step {trainer.step}", flush=True)
    if not options.export_only:
        log_every = 2 if options.smoke else 25
        stop_at = min(options.stop_at or settings.steps, settings.steps)
        _train(trainer, _validation_windows(tokenizer, settings, limit_chars), work, log_every, stop_at)
    if options.export_only or trainer.step == settings.steps:
        export(trainer, tokenizer, train, train_ids, Path(options.output), limit_chars)


def _arguments() -> argparse.Namespace:
    package = Path(__file__).resolve().parents[1] / "src" / "regraft" / "seedling"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", required=True, help="folder of the checkpoint and the tokenizer; a run goes on from there")
    parser.add_argument("--output", default=str(package), help="folder of the finished model (default: the package)")
    parser.add_argument("--steps", type=int, default=0, help=f"training steps (default: {Settings.steps})")
    parser.add_argument("--stop-at", type=int, default=0, help="stop after this step, with a checkpoint and no export")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--workers", type=int, default=2, help="threads that compute; the weights do not depend on it")
    parser.add_argument("--export-only", action="store_true", help="write the model of the last checkpoint and stop")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a little text, in seconds")
    return parser.parse_args()


def _tokenizer(work: Path, train: list[Document], settings: Settings) -> Tokenizer:
    """Returns the tokenizer of the work folder, trained first where there is none."""
    if not (work / "tokenizer" / "tokenizer.json").is_file():
        aside = work / "tokenizer.partial"
        save_tokenizer(
            train_tokenizer((document.text for document in train), settings.vocabulary_tokens),
            aside,
            settings.window_tokens,
        )
        os.replace(aside, work / "tokenizer")
    return Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))


def _validation_windows(tokenizer: Tokenizer, settings: Settings, limit_chars: int | None) -> torch.Tensor:
    """Returns windows spread evenly over the validation split: (n_windows, window_tokens) int64."""
    texts = (document.text for document in documents("validation", limit_chars=limit_chars))
    stream = np.concatenate(encode_documents(tokenizer, texts)).astype(np.int64)
    count = len(stream) // settings.window_tokens
    cut = stream[: count * settings.window_tokens].reshape(count, settings.window_tokens)
    picked = np.linspace(0, count - 1, min(VALIDATION_WINDOWS, count)).astype(int)
    return torch.from_numpy(cut[picked])


def _train(trainer: Trainer, held_out_BT: torch.Tensor, work: Path, log_every: int, stop_at: int) -> None:
    """Steps to the end; a log line every ``log_every`` steps, and every fourth time the held-out loss and a checkpoint."""
    settings = trainer.settings
    losses: list[float] = []
    while trainer.step < stop_at:
        losses.append(trainer.advance())
        last = trainer.step == stop_at
        if trainer.step % log_every and not last:
            continue
        measured = trainer.step % (4 * log_every) == 0 or last
        row = LogRow(
            step=trainer.step,
            tokens=trainer.step * settings.batch_tokens,
            lr=round(learning_rate(trainer.step - 1, settings), 8),
            train_loss_nats=round(float(np.mean(losses)), 4),
            held_out_loss_nats=round(trainer.held_out_loss(held_out_BT), 4) if measured else None,
            seconds=round(trainer.seconds, 1),
        )
        losses.clear()
        trainer.log.append(row)
        print(asdict(row), flush=True)
        if measured:
            trainer.save(work / CHECKPOINT)


if __name__ == "__main__":
    sys.exit(main())
