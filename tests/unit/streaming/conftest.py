"""Tiny checkpoints in several shards, with a tokenizer and a text to calibrate on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from folders import tiny_tokenizer
from regraft.settings import PruneSettings

# Enough for any tiny model; what the test process itself holds is not counted beyond 0.7 GB.
PLENTY = "2GB"
TEXT = "Pack my box with five dozen liquor jugs; the quick brown fox jumps over 13 lazy dogs, and 7 sphinxes of quartz judge my vow.\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{number}. {TEXT[number % 60 :]}{TEXT[: number % 60]}" for number in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def make_folder(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Callable[..., Path]:
    """Returns ``make(family, dtype, shard_size, **config)``: the folder of a random model, saved by transformers."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, shard_size: str = "60KB", **config: Any) -> Path:
        path = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        make_model(family, **config).to(dtype).save_pretrained(path, max_shard_size=shard_size)
        tiny_tokenizer().save_pretrained(path)
        return path

    return make


@pytest.fixture
def settings(text: Path) -> Callable[..., PruneSettings]:
    """Returns ``settings(**changes)``: few short windows of the text, 20 % by Taylor with one threshold, least squares."""

    def make(**changes: Any) -> PruneSettings:
        usual = {
            "ratio": 0.2,
            "criterion": "taylor",
            "select": "global",
            "shape": "per-layer",
            "calibration": text,
            "samples": 11,
            "seq_len": 24,
            "align": 2,
        }
        return PruneSettings(**usual | {"reconstruct": "least_squares"} | changes)

    return make
