"""Every criterion that reads text, with one share for all layers and with one threshold, on a real model: better than random removal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regraft.data.text import read_corpus
from regraft.evaluation.loss import evaluate_loss
from regraft.importance import CRITERIA
from regraft.models.load import load, require_tokenizer
from regraft.pipelines.prune.prune import prune
from regraft.settings import PruneSettings

SHARED = Path(__file__).parents[3] / "shared"
MODEL = SHARED / "models" / "stories3M"
STORIES = SHARED / "data" / "tinystories" / "train.txt"

pytestmark = pytest.mark.skipif(not STORIES.is_file(), reason="needs ../shared with models and texts, which only developers have")


@pytest.mark.long
@pytest.mark.parametrize("select", ["uniform", "global"])
def test_every_pair_beats_chance(tmp_path: Path, select: str) -> None:
    """Criteria without text (l1, l2) have no calibration windows to be judged on; they are left out here."""
    loaded = load(MODEL)
    stories = read_corpus(STORIES, "test").documents
    for name, part in (("calibration", stories[:400]), ("held", stories[-12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in part), encoding="utf-8")
    held = read_corpus(tmp_path / "held.jsonl", "test")

    def outcome(criterion: str, select: str) -> tuple[float, tuple[str, ...]]:
        usual = {"ratio": 0.2, "calibration": tmp_path / "calibration.jsonl", "samples": 24, "seq_len": 64, "reconstruct": "none"}
        result = prune(loaded, None, PruneSettings.model_validate(usual | {"criterion": criterion, "select": select, "shape": "per-layer"}))
        assert result.model is not None
        return evaluate_loss(result.model, require_tokenizer(loaded), held).loss_nats, result.notes

    chance, _ = outcome("random", "uniform")
    found = {name: outcome(name, select) for name in sorted(CRITERIA.names()) if _reads_text(name)}
    for name, (loss, notes) in found.items():
        print(f"{select} {name}: {loss:.3f} nats, random {chance:.3f}; {len(notes)} notes")
        assert loss < chance, (name, loss, chance)


def _reads_text(name: str) -> bool:
    return CRITERIA.get(name).needs_text and "ffn" in CRITERIA.get(name).scores
