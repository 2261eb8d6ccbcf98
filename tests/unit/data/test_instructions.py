from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from regraft.data.instructions import IGNORED, encode_record, encode_records, encode_whole, prompt_of, render
from regraft.data.text import Corpus, Record
from regraft.errors import DataError, InputError

Make = Callable[..., PreTrainedTokenizerFast]
PLAIN = Record("Say hello.", "", "Hello to you.")
WITH_INPUT = Record("Add the numbers.", "1, 2", "3")


def test_the_prompt_has_the_sections_of_the_alpaca_format() -> None:
    assert prompt_of(PLAIN).endswith("\n\n### Instruction:\nSay hello.\n\n### Response:\n")
    assert prompt_of(WITH_INPUT).endswith("\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n1, 2\n\n### Response:\n")
    assert render(WITH_INPUT) == prompt_of(WITH_INPUT) + "3"


def test_braces_in_a_record_are_text() -> None:
    assert "{input} {0}" in prompt_of(Record("{input} {0}", "{instruction}", "x"))
    assert "{instruction}" in prompt_of(Record("{input} {0}", "{instruction}", "x"))


@pytest.mark.parametrize("record", [PLAIN, WITH_INPUT])
@pytest.mark.parametrize("bos", [True, False])
def test_labels_are_the_response_and_eos_alone(make_tokenizer: Make, record: Record, bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    ids, labels = encode_record(record, tokenizer, 4096)
    assert len(ids) == len(labels)
    assert ids[:-1] == tokenizer(render(record))["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    kept = [label for label in labels if label != IGNORED]
    assert kept == [*tokenizer(record.output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert labels[-len(kept) :] == kept


def test_a_token_that_joins_prompt_and_response_counts_as_response(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(merges=((":", "\n"), ("\n", "H")))
    tokenizer_with_join = make_tokenizer(merges=(("\n", "H"),))
    plain = encode_whole(Corpus("r", "all", records=(PLAIN,)), tokenizer)[0]
    joined = encode_whole(Corpus("r", "all", records=(PLAIN,)), tokenizer_with_join)[0]
    assert tokenizer.convert_ids_to_tokens(plain.input_ids[plain.prompt_tokens]) == "H"
    assert tokenizer_with_join.convert_ids_to_tokens(joined.input_ids[joined.prompt_tokens]) == "\nH"


def test_long_records_are_cut_on_the_right_and_dropped_without_room(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    long_prompt = Record("x" * 500, "", "y")
    corpus = Corpus("r.json", "all", records=(PLAIN, long_prompt))
    prompt_tokens = encode_whole(corpus, tokenizer)[0].prompt_tokens
    pairs = encode_records(corpus, tokenizer, prompt_tokens + 5)
    assert len(pairs) == 1
    ids, labels = pairs[0]
    assert len(ids) == len(labels) == prompt_tokens + 5
    assert labels[-5:] == tokenizer("Hello", add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match=rf"no record of 'r.json'.*in 10 tokens.*takes {prompt_tokens}"):
        encode_records(corpus, tokenizer, 10)
    with pytest.raises(InputError, match="1 tokens"):
        encode_records(corpus, tokenizer, 1)
