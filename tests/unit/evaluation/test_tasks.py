"""Tasks: what is read, made and scored, each beside a formula written out here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from regraft.data.text import Corpus
from regraft.errors import DataError, InputError
from regraft.evaluation.answers import score_answers
from regraft.evaluation.choices import score_choices
from regraft.evaluation.questions import CONTEXT_WORDS, Item, Task, read_task, task_from_text
from regraft.evaluation.scores import compare, score_of
from regraft.plans import TaskReport, TaskScore, from_json, to_json

Make = Callable[..., PreTrainedTokenizerFast]
MakeModel = Callable[..., PreTrainedModel]

QUESTIONS = [
    {"question": "the sky is", "choices": ["blue", "a long green thing"], "answer": 0},
    {"question": "two and two are", "choices": ["five", "four", "one"], "answer": "B"},
    {"question": "cats say", "choices": ["woof", "meow"], "answer": "meow"},
    {"question": "and then they", "choices": ["went home", "0", "slept"], "answer": "2"},
]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def nats_by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, choice: str) -> float:
    """The likelihood of a choice in float64, one token after the other, each from the tokens before it alone."""
    start = tokenizer(prompt)["input_ids"]
    total = 0.0
    for token in tokenizer(choice, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            row = model(input_ids=torch.tensor([start])).logits[0, -1].double()
        total -= float(row[token] - torch.logsumexp(row, 0))
        start = [*start, token]
    return total


@pytest.mark.slow
def test_choices_are_scored_as_by_hand(make_model: MakeModel, make_tokenizer: Make, tmp_path: Path) -> None:
    model, tokenizer = make_model("llama-bias", max_position_embeddings=128), make_tokenizer()
    task = read_task(written(tmp_path / "q.jsonl", QUESTIONS))
    assert [item.right for item in task.items] == [0, 1, 1, 2]
    sums, means = [], []
    for item in task.items:
        nats = [nats_by_hand(model, tokenizer, item.prompt, choice) for choice in item.choices]
        length = [value / (len(choice) - 1) for value, choice in zip(nats, item.choices, strict=True)]
        sums.append(float(nats.index(min(nats)) == item.right))
        means.append(float(length.index(min(length)) == item.right))
    by_sum, by_length = score_choices(model, tokenizer, task)
    assert (by_sum.outcomes, by_length.outcomes) == (tuple(sums), tuple(means))
    assert (by_sum.metric, by_length.metric, by_sum.items, by_sum.shots) == ("acc", "acc_norm", 4, 0)
    assert by_sum.value == sum(sums) / 4
    assert by_sum.stderr == pytest.approx(torch.tensor(sums).double().std().item() / 2)


def test_a_long_prompt_loses_its_beginning_and_a_long_choice_is_refused(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()  # a context of 64 tokens, one a letter
    tail = "this is the end of it and"
    long, short = (Task("t", (Item(prompt, (" yes", " noo"), 0),)) for prompt in ("x" * 80 + tail, tail))
    # What is left of the long prompt is the last 65 - 4 tokens, without BOS.
    kept = ("x" * 80 + tail)[-61:]
    ids = tokenizer(kept, add_special_tokens=False)["input_ids"]
    nats = []
    for choice in (" yes", " noo"):
        more = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([ids + more[:-1]])).logits[0, len(ids) - 1 :].double().log_softmax(-1)
        nats.append(-sum(float(row[token]) for row, token in zip(rows, more, strict=True)))
    assert score_choices(model, tokenizer, long)[0].outcomes == (float(nats[0] < nats[1]),)
    assert score_choices(model, tokenizer, short)[0].items == 1
    with pytest.raises(DataError, match="longer than the model's context of 64;"):
        score_choices(model, tokenizer, Task("t", (Item("a", (" " + "y" * 90, " b"), 0),)))


def test_examples_stand_before_each_question(tmp_path: Path) -> None:
    task = read_task(written(tmp_path / "q.jsonl", QUESTIONS), shots=1, limit=2)
    assert [item.prompt for item in task.items] == [f"the sky is blue\n\n{row['question']}" for row in QUESTIONS[1:3]]
    table = tmp_path / "q.csv"
    table.write_text('question,choices,answer\none,"[""a"", ""b""]",b\n', encoding="utf-8")
    assert read_task(table).items == (Item("one", (" a", " b"), 1),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a", "b"]}, "line 1 has no 'answer'"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "is none of the 2 choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "is none of the 2 choices"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two texts"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "one text twice"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "no 'question'"),
        ({"question": "q", "answer": {}}, "'answer' is {}"),
    ],
)
def test_a_wrong_item_is_refused_in_one_line(row: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_task(written(tmp_path / "q.jsonl", [row]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_or_mixed_items_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "q.jsonl", QUESTIONS[:2])
    with pytest.raises(DataError, match="are examples; give more, or fewer `shots`"):
        read_task(file, shots=2)
    written(file, [QUESTIONS[0], {"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match="some questions have choices"):
        read_task(file)


def test_continuations_are_what_follows_in_the_text(make_model: MakeModel) -> None:
    words = [f"word{index * index % 997}" for index in range(4000)]
    corpus = Corpus("text", "all", documents=(" ".join(words[:2000]), " ".join(words[2000:])))
    task = task_from_text("continuation", corpus, 20)
    assert task == task_from_text("continuation", corpus, 20)
    text = " ".join(words)
    for item in task.items:
        assert len(set(item.choices)) == 4
        assert [item.prompt + choice in text for choice in item.choices] == [index == item.right for index in range(4)]
        assert len(item.prompt.split()) == CONTEXT_WORDS
    assert {item.right for item in task_from_text("continuation", corpus, 60).items} == {0, 1, 2, 3}
    with pytest.raises(DataError, match="give more text"):
        task_from_text("continuation", Corpus("text", "all", documents=(" ".join(words[:120]),)))
    with pytest.raises(InputError, match="known: continuation, repetition"):
        task_from_text("other", corpus)


def test_answers_in_words_match_or_not(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    ids = tokenizer("once upon a time")["input_ids"]
    for _ in range(5):  # greedy decoding by hand, without a cache
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    text = tokenizer.decode(ids[-5:], skip_special_tokens=True).strip().partition("\n")[0]
    right = Item("once upon a time", answers=("not this", f"  {text.upper()}. "))
    matched, repeated = score_answers(model, tokenizer, Task("t", (right, Item("once upon a time", answers=("not this",)))), 5)
    assert matched.outcomes == (1.0, 0.0)
    assert (matched.metric, repeated.metric, repeated.higher_is_better) == ("exact_match", "repeated_4grams", False)
    # A prompt beyond the context of 64 tokens is cut and not refused; without right answers only repetition is counted.
    (alone,) = score_answers(model, tokenizer, Task("t", (Item("y" * 300),)), 5)
    assert alone.metric == "repeated_4grams"


def test_two_models_are_compared_item_by_item() -> None:
    task = Task("t", tuple(Item(str(number), (" a", " b")) for number in range(40)))
    better = [1.0] * 30 + [0.0] * 10
    worse = [1.0] * 18 + [0.0] * 20 + [1.0] * 2
    first, second = (TaskReport(name, (score_of(task, "acc", values),), (), 1) for name, values in (("a", better), ("b", worse)))
    (paired,) = compare(first, second)
    assert (paired.only_first, paired.only_second, paired.difference) == (12, 2, 10 / 40)
    tail = sum(math.comb(14, count) for count in (0, 1, 2)) / 2**14  # of a fair coin
    assert paired.p_value == pytest.approx(2 * tail)
    assert 0.05 < paired.low < paired.difference < paired.high < 0.45
    (same,) = compare(first, first)
    assert (same.p_value, same.low, same.high) == (1.0, 0.0, 0.0)
    assert from_json(TaskReport, to_json(first)) == first
    short = TaskReport("c", (TaskScore("t", "acc", 1.0, None, 1, 0, "1", outcomes=(1.0,)),), (), 1)
    with pytest.raises(InputError, match="40 items for one model and 1 for the other"):
        compare(first, short)
