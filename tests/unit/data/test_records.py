"""Rows of data sets: every usual form of an instruction or a chat, bad rows, and data sets that are no text files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regraft.data.records import Record, entry_of
from regraft.data.text import read_corpus
from regraft.errors import DataError

CHAT = Record("And 2 and 2?", "", "4", "Be brief.", (("Add 1 and 1.", "2"),))


def openai(*said: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in said]


TURNS = (("system", "Be brief."), ("user", "Add 1 and 1."), ("assistant", "2"), ("user", "And 2 and 2?"), ("assistant", "4"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": openai(*TURNS)},
        {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]} for role, text in TURNS
            ]
        },
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS]},
        {"prompt": openai(*TURNS[:-1]), "completion": openai(TURNS[-1])},
        {"prompt": openai(*TURNS[:-1]), "completion": "4"},
        {"messages": openai(*TURNS, ("user", "a question that nobody answered"))},
    ],
    ids=["messages", "parts", "sharegpt", "trl", "trl-text", "unanswered"],
)
def test_a_chat_is_the_same_record_in_every_form(row: dict[str, Any]) -> None:
    assert entry_of("here", row) == CHAT


def test_the_messages_of_a_record_read_back_to_it() -> None:
    assert entry_of("here", {"messages": CHAT.messages()}) == CHAT
    assert Record("Add.", "1 and 2", "3").messages() == openai(("user", "Add.\n\n1 and 2"), ("assistant", "3"))


def test_neighbours_of_one_role_are_one_message() -> None:
    found = entry_of("here", {"messages": openai(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"))})
    assert found == Record("a\n\nb", "", "c\n\nd")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": openai(("assistant", "hello"))}, "begins with the assistant"),
        ({"messages": openai(("user", "a"), ("tool", "b"))}, "message 2 has the role 'tool'"),
        ({"messages": openai(("user", "a"), ("system", "b"), ("assistant", "c"))}, "system message after the first turn"),
        ({"messages": openai(("user", "a"), ("assistant", None))}, "message 2 has 'content' of type NoneType"),
        ({"messages": openai(("user", [{"type": "image", "url": "x"}]), ("assistant", "c"))}, "part of kind 'image'"),
        ({"messages": "hello"}, "'messages' of type str"),
        ({"messages": [3]}, "message 1 is an int"),
        ({"conversations": openai(("user", "a"), ("assistant", " "))}, "empty answer"),
        ({"messages": openai(("user", " "), ("assistant", "b"))}, "empty message of the user"),
        ({"messages": openai(("user", "\ud800"), ("assistant", "b"))}, "half a surrogate pair"),
    ],
)
def test_a_chat_that_cannot_be_learnt_is_refused_in_one_line(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as raised:
        entry_of("here", row)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": }\n{"words": 1}\n{"text": 3}\n{"tex": 4}\n{"text": "two"}', ("line 2", "line 3", "line 4")),
        ("a.json", '[{"text": "one"}, 7, {"text": "two"}]', ("record 2",)),
        ("a.csv", "id,text\n1,one\n2\n3,two\n", ("line 3",)),
    ],
)
def test_bad_rows_are_refused_or_skipped_and_counted(tmp_path: Path, name: str, text: str, places: tuple[str, ...]) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=places[0]):
        read_corpus(path, "train")
    corpus = read_corpus(path, "train", skip_bad=True)
    assert corpus.documents == ("one", "two")
    assert corpus.skipped.rows == (4 if name == "a.jsonl" else 1)
    assert [place in line for place, line in zip(places, corpus.skipped.first, strict=True)] == [True] * len(places)


def test_a_file_of_bad_rows_alone_says_what_was_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": 1}\n{"words": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no row that can be read \(2 skipped, the first: .*line 1"):
        read_corpus(path, "train", skip_bad=True)


ROWS = [{"messages": openai(*TURNS)}, {"messages": openai(("user", "Say hello."), ("assistant", "Hello."))}]


def test_parquet_and_saved_data_sets_give_the_records_of_the_same_json(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra [data] is not installed")
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    expected = read_corpus(tmp_path / "a.json", "train").records
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"test": made}).save_to_disk(str(tmp_path / "other"))
    for name in ("a.parquet", "saved", "splits"):
        assert read_corpus(tmp_path / name, "train").records == expected
    with pytest.raises(DataError, match="none is 'train'"):
        read_corpus(tmp_path / "other", "train")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"b.parquet' cannot be read as a data set") as raised:
        read_corpus(tmp_path / "b.parquet", "train")
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="does not exist"):
        read_corpus(tmp_path / "c.parquet", "train")
