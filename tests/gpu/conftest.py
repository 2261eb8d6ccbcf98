"""Folders of tiny models, and the device. Without a GPU all of these tests are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import random_model
from folders import tiny_tokenizer

TEXT = "Pack my box with five dozen liquor jugs; the quick brown fox jumps over 13 lazy dogs, and 7 sphinxes of quartz judge my vow.\n"


@pytest.fixture
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return "cuda"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{number}. {TEXT[number % 60 :]}{TEXT[: number % 60]}" for number in range(80)), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "llama"
    random_model("llama").save_pretrained(path, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(path)
    return path
