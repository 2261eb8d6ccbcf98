from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from regraft.data.text import Corpus
from regraft.errors import DataError, InputError
from regraft.settings import RecoverSettings
from regraft.training.batches import Example, Ordered, collate, digest, make_examples, shuffled, spread


def example(*ids: int) -> Example:
    return Example(torch.tensor(ids), torch.tensor(ids))


def text_of(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> str:
    return "".join(tokenizer.decode(one.input_ids) for one in examples)


def test_text_is_packed_with_eos_between_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus("t", "train", ("abcde", "fgh", "ijklmn"))
    examples = make_examples(corpus, tokenizer, 4, wanted=100, seed=0)
    assert [len(one.input_ids) for one in examples] == [4] * 4
    joined = torch.cat([one.input_ids for one in examples])
    assert Counter(joined.tolist())[2] == 2
    found = [part.replace(" ", "") for part in tokenizer.decode(joined).split("</s>")]
    assert sorted(found) == sorted(["abcde", "fgh", "ijklmn"])
    assert all(bool((one.labels == one.input_ids).all()) for one in examples)


def test_a_short_text_is_one_short_row(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = make_examples(Corpus("t", "train", ("abc", "de")), tokenizer, 64, wanted=4, seed=0)
    assert len(row.input_ids) == 6
    with pytest.raises(DataError, match="'t' holds 1 tokens"):
        make_examples(Corpus("t", "train", ("a",)), tokenizer, 64, wanted=4, seed=0)
    with pytest.raises(InputError, match="`seq_len=1` leaves no token to predict; use at least 2"):
        make_examples(Corpus("t", "train", ("abc",)), tokenizer, 1, wanted=4, seed=0)


def test_a_long_text_is_drawn_from_not_read_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = Corpus("t", "train", tuple(chr(97 + index % 26) * 20 for index in range(4000)))
    few = make_examples(corpus, tokenizer, 16, wanted=8, seed=0)
    assert 4 * 8 <= len(few) < 200
    assert len(set(text_of(few, tokenizer)) & set("abcdefghijklmnopqrstuvwxyz")) > 13
    assert digest(few) == digest(make_examples(corpus, tokenizer, 16, wanted=8, seed=0))
    assert digest(few) != digest(make_examples(corpus, tokenizer, 16, wanted=8, seed=1))


def test_records_are_learned_on_the_response_only(records: tuple[Corpus, Corpus], tokenizer: PreTrainedTokenizerFast) -> None:
    examples = make_examples(records[0], tokenizer, 400, wanted=100, seed=0)
    learned = {tokenizer.decode(one.labels[one.labels != -100]).replace(" ", "") for one in examples}
    assert learned == {record.output + "</s>" for record in records[0].records}
    assert all("Say" in tokenizer.decode(one.input_ids).replace(" ", "") for one in examples)


def test_rows_are_padded_on_the_right_and_masked() -> None:
    batch = collate([example(5, 6, 7), example(8)], padding=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in collate([example(5, 6), example(7, 8)], padding=2)


def test_every_row_comes_once_before_any_comes_twice() -> None:
    order = shuffled(10, 35, seed=0)
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert len(order) == 35
    assert order[:10] != order[10:20]
    assert order == shuffled(10, 35, seed=0) != shuffled(10, 35, seed=1)
    assert shuffled(10, 12, seed=0) == order[:12]


def test_spread_is_even() -> None:
    rows = [example(index, index) for index in range(10)]
    assert [int(one.input_ids[0]) for one in spread(rows, 5)] == [0, 2, 4, 6, 8]
    assert spread(rows, 11) == rows


def test_less_than_one_batch_is_refused() -> None:
    settings = RecoverSettings(batch=4, steps=3, accumulate=2, seq_len=8)
    assert len(Ordered([example(1, 2)] * 4, settings, 0, "t")) == 24
    with pytest.raises(DataError, match=r"'t' gives 3 training windows of up to 8 tokens, fewer than one batch of 4; .*`batch`"):
        Ordered([example(1, 2)] * 3, settings, 0, "t")
