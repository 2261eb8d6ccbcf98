"""Calibration from several sources through the whole of pruning."""

from __future__ import annotations

from pathlib import Path

import pytest

from regraft.errors import DataError, InputError
from regraft.pipelines.prune.prune import prune
from regraft.settings import PruneSettings

SMALL = {"samples": 6, "seq_len": 16, "ratio": 0.1, "criterion": "wanda", "select": "uniform", "reconstruct": "least_squares"}


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


def test_sources_that_are_missing_or_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.txt' does not exist"):
        prune("seedling", settings=PruneSettings(calibration=Path("self,missing.txt"), **SMALL))
    with pytest.raises(InputError, match=r"add up to 0\.6"):
        prune("seedling", settings=PruneSettings(calibration=Path("self=0.3,built-in=0.3"), **SMALL))
    with pytest.raises(InputError, match="`memory` takes one calibration file"):
        prune("seedling", tmp_path / "out", settings=PruneSettings(calibration=Path("self"), memory="1GB", **SMALL))
