"""Completion of the ratings that people gave: the command's report, held to a recomputation from its own predictions."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from regraft.cli.app import run

RATINGS = Path(__file__).parents[3] / "shared" / "data" / "movielens-small" / "ratings.csv"

pytestmark = pytest.mark.skipif(not RATINGS.is_file(), reason="needs ../shared with ratings, which only developers have")


@pytest.mark.long
def test_held_out_ratings_are_predicted_better_than_by_the_baselines(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    given = ["complete", str(RATINGS), "--rank", "10", "--output", str(tmp_path / "out"), "--json", str(report), "--seed", "3"]
    assert run(given) == 0
    found = json.loads(report.read_text())
    with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    with RATINGS.open(newline="") as stream:
        truth = {(row["userId"], row["movieId"]): float(row["rating"]) for row in csv.DictReader(stream)}
    errors = [float(row["prediction"]) - truth[row["userId"], row["itemId"]] for row in rows]
    assert len(rows) == pytest.approx(len(truth) / 10, abs=1)
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) == pytest.approx(found["rmse"], abs=1e-4)
    assert sum(map(abs, errors)) / len(errors) == pytest.approx(found["mae"], abs=1e-4)
    assert found["rmse"] <= 0.87
    assert found["rmse"] <= min(baseline["rmse"] for baseline in found["baselines"].values())
