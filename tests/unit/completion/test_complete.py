"""The command: settings are a section like any other, and ratings that teach nothing are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regraft.cli.app import run
from regraft.completion.complete import complete_ratings
from regraft.errors import DataError
from regraft.settings import CompletionSettings


def ratings(path: Path, *, equal: bool = False) -> Path:
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(12, 2, generator=generator) @ torch.randn(2, 10, generator=generator)
    rows = ["userId,movieId,rating"]
    rows += [f"{u},{i},{3.0 if equal else round(float(taste[u, i]), 2)}" for u in range(12) for i in range(10) if (u + i) % 4]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_small_table_is_completed_and_the_report_holds_settings_and_seed(tmp_path: Path) -> None:
    report = complete_ratings(ratings(tmp_path / "r.csv"), None, CompletionSettings(rank=2, recommend=0, threshold=0.2), seed=5)
    flat = report.flat()
    assert flat["seed"] == 5
    assert flat["settings"]["rank"] == 2
    assert flat["rmse"] < flat["baselines"]["mean"]["rmse"]
    assert json.loads(json.dumps(flat)) == flat


def test_equal_ratings_teach_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 90 ratings are 3.*implicit feedback"):
        complete_ratings(ratings(tmp_path / "r.csv", equal=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rank", "two"], "--rank: should be"),
        (["--rank", "0"], "--rank: should be"),
        (["--threshold", "1.5"], "--threshold: should be"),
        (["--held-out", "1"], "--held-out: should be"),
        (["--duplicates", "first"], "--duplicates: should be"),
        (["--gamma", "nan"], "--gamma: should be"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str) -> None:
    assert run(["complete", str(ratings(tmp_path / "r.csv")), *given]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
