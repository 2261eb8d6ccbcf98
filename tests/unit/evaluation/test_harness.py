from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from regraft.data.text import Corpus
from regraft.evaluation.harness import Subject, flat, measure, measure_together
from regraft.evaluation.loss import evaluate_loss
from regraft.plans import Measurement, from_json, to_json
from regraft.settings import EvaluateSettings

Make = Callable[..., PreTrainedTokenizerFast]
MakeModel = Callable[..., PreTrainedModel]
CORPUS = Corpus("made up", "test", documents=("Once upon a time.", "The end."))
REQUIRED = {"loss_nats", "perplexity", "bits_per_byte", "window_tokens", "stride_tokens", "tokens", "parameters", "text"}


def test_a_measurement_is_flat_json_with_all_that_is_promised(make_model: MakeModel, make_tokenizer: Make, tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.save_pretrained(tmp_path)
    measured = measure("dense", model, tokenizer, CORPUS, folder=tmp_path)
    values = json.loads(json.dumps(flat(measured), allow_nan=False))
    assert values.keys() >= REQUIRED | {"split", "bos", "bytes_on_disk", "macs_per_token", "model"}
    assert not any(isinstance(value, dict | list) for value in values.values())
    assert "prefill_seconds" not in values
    assert values["bytes_on_disk"] == (tmp_path / "model.safetensors").stat().st_size
    assert (values["model"], values["context_tokens"]) == ("dense", values["window_tokens"])
    assert from_json(Measurement, to_json(measured)) == measured


@pytest.mark.slow
def test_models_measured_together_have_the_figures_of_each_alone(make_model: MakeModel, make_tokenizer: Make) -> None:
    tokenizer, settings = make_tokenizer(), EvaluateSettings(speed=True, window=16)
    subjects = {"dense": Subject(make_model("llama"), tokenizer), "other": Subject(make_model("qwen3"), tokenizer)}
    together = measure_together(subjects, CORPUS, settings)
    assert list(together) == ["dense", "other"]
    for label, subject in subjects.items():
        assert together[label].loss == evaluate_loss(subject.model, tokenizer, CORPUS, settings)
        assert together[label].speed is not None
        assert flat(together[label])["peak_memory_bytes"] > 0
