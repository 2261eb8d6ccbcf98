"""Writes the finished model folder: weights, tokenizer, training log, held-out figures, model card."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from regraft.seedling.corpus import TEST_PERCENT, VALIDATION_PERCENT, Document, documents
from seedling.card import card
from seedling.measure import baselines, figure, model_nats
from seedling.tokenizer import encode_documents, save_tokenizer
from seedling.training import VALIDATION_WINDOWS, LogRow, Trainer


def export(
    trainer: Trainer,
    tokenizer: Tokenizer,
    train: Sequence[Document],
    train_ids: Sequence[NDArray[np.uint16]],
    output: Path,
    limit_chars: int | None = None,
) -> None:
    """Writes the model as it stands, measures what was written, and moves the files to the output folder.

    Args:
        trainer: Holds the weights and the log.
        tokenizer: The one that the windows were encoded with.
        train: Documents of the training split.
        train_ids: Their tokens, (n_tokens,) uint16 each, for the baselines.
        output: Folder of the model; other files in it stay.
        limit_chars: Measure on this many characters of the test split; None for all.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings = trainer.settings
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as name:
        folder = Path(name)
        save_tokenizer(tokenizer, folder, settings.window_tokens)
        _save_model(trainer.model, folder)
        _write_log(trainer.log, folder / "training_log.csv")
        test = documents("test", limit_chars=limit_chars)
        held_out: dict[str, Any] = {
            "split": _split_record(test),
            "measured": _measured(folder, tokenizer, train_ids, test),
            "training": _training_record(trainer, train, train_ids),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy")},
            },
            "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "workers": trainer.workers},
        }
        (folder / "held_out.json").write_text(json.dumps(held_out, indent=1) + "\n", encoding="utf-8")
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        (folder / "README.md").write_text(card(held_out, parameters), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)
            os.replace(file, output / file.name)
    print(json.dumps(held_out["measured"], indent=1), flush=True)


def _save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes a bf16 copy of the model in the Hugging Face format."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    copy.bfloat16().save_pretrained(str(folder))


def _write_log(log: Sequence[LogRow], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(LogRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in log)


def _measured(folder: Path, tokenizer: Tokenizer, train_ids: Sequence[NDArray[np.uint16]], test: Sequence[Document]) -> dict[str, Any]:
    """Measures the written files, not the weights in memory: bf16 weights, computed in fp32."""
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    window_tokens = model.config.max_position_embeddings
    stride_tokens = window_tokens // 2
    # EOS is for training: nothing in the text stands for it, so it is not scored.
    test_ids = [ids[:-1] for ids in encode_documents(tokenizer, (document.text for document in test))]
    text_bytes = sum(len(document.text.encode()) for document in test)
    nats = model_nats(model, test_ids, window_tokens, stride_tokens)
    return {
        "window_tokens": window_tokens,
        "stride_tokens": stride_tokens,
        "documents": len(test),
        "tokens_scored": len(nats),
        "text_bytes": text_bytes,
        "seedling": figure(nats, text_bytes),
        **baselines([ids[:-1] for ids in train_ids], test_ids, test, model.config.vocab_size),
    }


def _split_record(test: Sequence[Document]) -> dict[str, Any]:
    """Says which documents are held out, with what they said on the machine of the training."""
    return {
        "rule": "sha256 of 'regraft-seedling/1:' and the family of the path, first 8 bytes, big-endian, modulo 100",
        "test": f"below {TEST_PERCENT}",
        "validation": f"from {TEST_PERCENT} to below {TEST_PERCENT + VALIDATION_PERCENT}",
        "test_documents": {
            document.path: hashlib.sha256(document.text.encode()).hexdigest()
            for document in sorted(test, key=lambda document: document.path)
        },
    }


def _training_record(trainer: Trainer, train: Sequence[Document], train_ids: Sequence[NDArray[np.uint16]]) -> dict[str, Any]:
    settings = trainer.settings
    return {
        **asdict(settings),
        "documents": len(train),
        "document_bytes": sum(len(document.text.encode()) for document in train),
        "document_tokens": sum(len(ids) for ids in train_ids),
        "steps_done": trainer.step,
        "tokens_seen": trainer.step * settings.batch_tokens,
        "seconds": round(trainer.seconds),
        "validation_windows": VALIDATION_WINDOWS,
    }


def _cpu_model() -> str:
    """Returns the name of the processor as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
