"""Loss of two real models on a text that nobody here wrote, against what others measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regraft.data.text import Corpus, read_corpus
from regraft.data.tokens import calibration_windows
from regraft.evaluation.loss import evaluate_loss
from regraft.evaluation.sample import continue_text
from regraft.pipelines.evaluate import evaluate_model
from regraft.settings import EvaluateSettings, SampleSettings

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "data" / "tinystories" / "train.txt"

pytestmark = pytest.mark.skipif(not STORIES.is_file(), reason="needs ../shared with models and texts, which only developers have")


def first_stories(count: int) -> Corpus:
    corpus = read_corpus(STORIES, "test")
    return Corpus(corpus.name, corpus.split, documents=corpus.documents[:count])


# stories260K: the published figure stops at the 512 tokens of its context; to the end of the long stories it is 1.505.
@pytest.mark.long
@pytest.mark.parametrize(("name", "published", "tolerance"), [("stories3M", 1.689, 0.001), ("stories260K", 1.500, 0.006)])
def test_dense_losses_are_those_that_were_published(name: str, published: float, tolerance: float) -> None:
    folder = SHARED / "models" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    report = evaluate_loss(model, tokenizer, first_stories(300))
    assert report.loss_nats == pytest.approx(published, abs=tolerance)
    assert (report.window_tokens, report.stride_tokens, report.documents, report.bos) == (512, 256, 300, True)
    assert report.bytes == sum(len(text.encode()) for text in first_stories(300).documents)


def test_a_story_s_loss_is_what_transformers_says() -> None:
    folder = SHARED / "models" / "stories3M"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    corpus = first_stories(5)
    total, tokens = 0.0, 0
    for text in corpus.documents:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    report = evaluate_loss(model, tokenizer, corpus)
    assert report.tokens == tokens
    assert report.loss_nats == pytest.approx(total / tokens, abs=1e-5)
    shorter = evaluate_loss(model, tokenizer, corpus, EvaluateSettings(window=64))
    assert shorter.loss_nats > report.loss_nats
    backwards = Corpus("backwards", "all", documents=tuple(" ".join(text.split()[::-1]) for text in corpus.documents))
    assert evaluate_loss(model, tokenizer, backwards).loss_nats > report.loss_nats + 2


def test_a_long_document_is_read_to_its_end() -> None:
    settings = EvaluateSettings(text=SHARED / "data" / "wikitext2" / "valid.txt", max_tokens=3000, window=256)
    measured = evaluate_model(SHARED / "models" / "stories260K", settings)
    assert (measured.loss.tokens, measured.loss.documents) == (3000, 1)
    assert math.isfinite(measured.loss.loss_nats)
    assert measured.loss.loss_nats > 2
    assert measured.size.parameters == 260_032


def test_instructions_are_measured_on_their_responses(tmp_path: Path) -> None:
    records = json.loads((SHARED / "data" / "dolly" / "dolly_3k.json").read_text())[:4]
    file = tmp_path / "dolly.json"
    file.write_text(json.dumps(records))
    measured = evaluate_model(SHARED / "models" / "stories3M", EvaluateSettings(text=file))
    assert measured.loss.documents == 4
    assert measured.loss.bytes == sum(len(record["output"].encode()) for record in records)
    assert "responses only" in measured.loss.text


def test_a_sample_is_the_one_that_is_known() -> None:
    folder = SHARED / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sample = continue_text(model, tokenizer, SampleSettings(tokens=48))
    assert sample.startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize("text", ["tinystories/train.txt", "wikitext2/valid.txt", "dolly/dolly_3k.json", "arc_easy/test.json"])
def test_calibration_windows_come_from_every_kind_of_file(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories3M")
    corpus = read_corpus(SHARED / "data" / text, "validation")
    windows = calibration_windows(corpus, tokenizer, 16, 128, seed=0)
    assert windows.shape == (16, 128)
    assert len({tuple(row) for row in windows.tolist()}) == 16
