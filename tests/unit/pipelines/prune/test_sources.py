"""Calibration from several sources through the whole of pruning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from folders import tiny_tokenizer
from regraft.errors import DataError, InputError
from regraft.pipelines.prune.prune import prune, replay
from regraft.settings import PruneSettings

SMALL = {"samples": 6, "seq_len": 16, "ratio": 0.1, "criterion": "wanda", "select": "uniform", "reconstruct": "least_squares"}


@pytest.mark.long
def test_text_of_the_model_itself_and_a_file_calibrate_together(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("def add(a, b):\n    return a + b\n\n" * 40)
    said: list[str] = []
    settings = PruneSettings(calibration=Path(f"self=0.5,{text}=0.5"), **SMALL)
    result = prune("seedling", settings=settings, say=said.append)
    assert "the model writes 3 windows of 16 tokens to calibrate on" in said
    other = prune("seedling", settings=PruneSettings(calibration=text, **SMALL))
    assert result.plan.made_with["windows_sha256"] != other.plan.made_with["windows_sha256"]
    again = prune("seedling", settings=settings)
    assert again.plan == result.plan
    assert result.model is not None
    assert again.model is not None
    assert all(bool((one == two).all()) for one, two in zip(result.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.slow
def test_the_model_writes_beside_a_single_text_if_asked_and_where_there_is_none(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    model_folder = tmp_path / "model"
    make_model("llama").save_pretrained(model_folder)
    tiny_tokenizer().save_pretrained(model_folder)
    text = tmp_path / "notes.txt"
    text.write_text("one two three four five six seven eight nine ten\n\n" * 200)
    quick: dict[str, Any] = {"effort": "quick", "samples": 6, "seq_len": 16, "ratio": 0.1, "shape": "per-layer"}
    said: list[str] = []
    mixed = prune(model_folder, calibration=text, say=said.append, settings=PruneSettings(**quick, own_text=0.5))
    assert any("writes 3 windows of 16 tokens" in line for line in said)
    assert mixed.resolved.settings.own_text == 0.5
    worst = [note for note in mixed.notes if note.startswith("worst of the calibration's sources: ")]
    assert "notes.txt" in worst[0]
    assert "own text" in worst[0]
    assert replay(model_folder, mixed.plan, calibration=text).provenance.plan == mixed.plan
    in_memory = prune(model_folder, calibration=[text.read_text()], settings=PruneSettings(**quick, own_text=0.5))
    assert in_memory.plan.made_with["windows_sha256"] == mixed.plan.made_with["windows_sha256"]
    said.clear()
    alone = prune(model_folder, calibration=text, say=said.append, settings=PruneSettings(**quick))
    assert not any("writes" in line for line in said)
    assert alone.plan.made_with["windows_sha256"] != mixed.plan.made_with["windows_sha256"]
    assert not any(note.startswith("worst") for note in alone.notes)
    prune(model_folder, say=said.append, settings=PruneSettings(**quick))
    assert "the model writes 6 windows of 16 tokens to calibrate on" in said
    with pytest.raises(InputError, match="`own_text` stands beside a single text"):
        prune(model_folder, settings=PruneSettings(calibration=Path(f"{text},self"), own_text=0.3, **quick))


@pytest.mark.slow
def test_sources_that_are_missing_or_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.txt' does not exist"):
        prune("seedling", settings=PruneSettings(calibration=Path("self,missing.txt"), **SMALL))
    with pytest.raises(InputError, match=r"add up to 0\.6"):
        prune("seedling", settings=PruneSettings(calibration=Path("self=0.3,built-in=0.3"), **SMALL))
    with pytest.raises(InputError, match="`memory` takes one calibration file"):
        prune("seedling", tmp_path / "out", settings=PruneSettings(calibration=Path("self"), memory="1GB", **SMALL))
