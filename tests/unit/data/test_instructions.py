from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from regraft.data import instructions
from regraft.data.instructions import (
    IGNORED,
    EncodedRecord,
    Truncation,
    encode_record,
    encode_records,
    encode_whole,
    format_of,
    prompt_of,
    render,
    texts_of,
)
from regraft.data.records import Record
from regraft.data.text import Corpus
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
    pairs, counts = encode_records(corpus, tokenizer, prompt_tokens + 5)
    assert (counts.records, counts.dropped, counts.cut) == (2, 1, 1)
    assert len(pairs) == 1
    ids, labels = pairs[0]
    assert len(ids) == len(labels) == prompt_tokens + 5
    assert labels[-5:] == tokenizer("Hello", add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match=rf"no record of 'r.json'.*in 10 tokens.*takes {prompt_tokens}"):
        encode_records(corpus, tokenizer, 10)
    with pytest.raises(InputError, match="1 tokens"):
        encode_records(corpus, tokenizer, 1)


CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}.\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% generation %}{{ m['content'] }}.\n{% endgeneration %}"
    "{% else %}<{{ m['role'] }}>{{ m['content'] }}.\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
LONG = Record("q2", "", "a2", "be kind", (("q1", "a1"),))


def learned(encoded: EncodedRecord, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(encoded.input_ids[start:end])) for start, end in encoded.answers]


def chat_tokenizer(make_tokenizer: Make, template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{role}>" for role in ("system", "user", "assistant")])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(make_tokenizer: Make, template: str) -> None:
    tokenizer = chat_tokenizer(make_tokenizer, template)
    (encoded,) = encode_whole(Corpus("c", "all", records=(LONG,)), tokenizer)
    text = "<system>be kind.\n<user>q1.\n<assistant>a1.\n<user>q2.\n<assistant>a2.\n"
    assert list(encoded.input_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert learned(encoded, tokenizer) == ["a1.\n", "a2.\n"]
    assert [label for label in encoded.labels if label != IGNORED] == tokenizer("a1.\na2.\n", add_special_tokens=False)["input_ids"]


def test_a_template_without_system_messages_gets_them_in_the_first_question(make_tokenizer: Make) -> None:
    tokenizer = chat_tokenizer(make_tokenizer, NO_SYSTEM)
    (encoded,) = encode_whole(Corpus("c", "all", records=(LONG,)), tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.input_ids)).startswith("<user>be kind\n\nq1.")
    tokenizer.chat_template = "{{ raise_exception('never\nat all') }}"
    with pytest.raises(DataError, match=r"'c', record 1 is refused by the chat template \(never\)"):
        encode_whole(Corpus("c", "all", records=(LONG,)), tokenizer)


def test_a_template_that_rewrites_earlier_turns_still_teaches_the_last(make_tokenizer: Make) -> None:
    forgetful = (
        "{% for m in messages %}<{{ m['role'] }}>{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}.\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = chat_tokenizer(make_tokenizer, forgetful)
    (encoded,) = encode_whole(Corpus("c", "all", records=(Record("q2", "", "a2", "", (("q1", "a1"),)),)), tokenizer)
    assert learned(encoded, tokenizer)[-1] == "a2.\n"
    assert not any("a1" in part for part in learned(encoded, tokenizer))


def test_the_format_is_the_models_own_unless_another_is_asked_for(make_tokenizer: Make) -> None:
    plain, chat = make_tokenizer(), chat_tokenizer(make_tokenizer, CHATML)
    assert (format_of(plain, "auto"), format_of(chat, "auto"), format_of(chat, "alpaca")) == ("alpaca", "chat", "alpaca")
    with pytest.raises(InputError, match="no chat template"):
        format_of(plain, "chat")
    assert texts_of(Corpus("c", "all", records=(PLAIN,)), chat) == ("<user>Say hello..\n<assistant>Hello to you..\n",)
    assert texts_of(Corpus("c", "all", records=(PLAIN,)), plain) == (render(PLAIN),)


def test_several_turns_in_the_alpaca_format_all_carry_loss(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    (encoded,) = encode_whole(Corpus("c", "all", records=(LONG,)), tokenizer)
    assert learned(encoded, tokenizer) == ["a1", "a2</s>"]
    asked = prompt_of(LONG)
    assert asked.count("### Response:\n") == 2
    assert "### Instruction:\nbe kind\n\nq1\n" in asked


@pytest.mark.parametrize(("truncation", "kept", "dropped", "cut"), [("right", 5, 0, 1), ("left", 5, 0, 1), ("drop", 0, 1, 0)])
def test_what_is_cut_is_chosen_and_counted(make_tokenizer: Make, truncation: Truncation, kept: int, dropped: int, cut: int) -> None:
    tokenizer = chat_tokenizer(make_tokenizer, CHATML)
    short, longer = Record("q", "", "a"), Record("q", "", "abcdefgh")
    whole = encode_whole(Corpus("c", "all", records=(longer,)), tokenizer)[0].input_ids
    rows, counts = encode_records(Corpus("c", "all", records=(short, longer)), tokenizer, len(whole) - 4, truncation=truncation)
    assert (counts.records, counts.dropped, counts.cut, counts.prompt) == (2, dropped, cut, "chat")
    assert counts.share_lost == 0.5
    assert "1 cut" in str(counts) or "1 dropped" in str(counts)
    if kept:
        ids = rows[1][0]
        assert tuple(ids) == (whole[:-4] if truncation == "right" else whole[4:])


@pytest.mark.slow
@pytest.mark.parametrize("truncation", ["right", "drop"])
def test_a_row_of_megabytes_is_cut_before_it_is_encoded(
    make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch, truncation: Truncation
) -> None:
    """The same tokens as when all of it is encoded, and no tokenizer sees more than the window needs."""
    tokenizer = make_tokenizer(bos=True)
    story = "Once upon a time there was a little girl. " * 5000
    records = (Record("Tell a story.", "", story), Record(story, "", "Yes."), Record("Short?", "", "Yes."))
    corpus = Corpus("rows", "all", records=records)
    whole = encode_whole(corpus, tokenizer)
    seen: list[int] = []
    plain = instructions.plain_ids
    monkeypatch.setattr(instructions, "plain_ids", lambda texts, t: (seen.extend(map(len, texts)), plain(texts, t))[1])
    rows, counts = encode_records(corpus, tokenizer, 256, truncation=truncation)
    assert max(seen) <= 1 << 16 < len(story)
    kept = [whole[2]] if truncation == "drop" else [whole[0], whole[2]]
    assert rows == [(list(one.input_ids[:256]), one.labels[:256]) for one in kept]
    assert (counts.dropped, counts.cut) == ((2, 0) if truncation == "drop" else (1, 1))
