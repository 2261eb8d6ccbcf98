from __future__ import annotations

import json
from pathlib import Path

import pytest

from regraft.data.records import Record
from regraft.data.text import BUILT_IN, Corpus, read_corpus, split_corpus
from regraft.errors import DataError, InputError

STORIES = "One day a cat sat.\n<|endoftext|>\nTwo dogs ran.\nThey were happy.\n<|endoftext|>\n"


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def records(path: Path, entries: object, lines: bool = False) -> Path:
    text = "\n".join(json.dumps(entry) for entry in entries) if lines else json.dumps(entries)  # type: ignore[union-attr]
    return write(path, text)


def test_separators_divide_documents_and_blank_ones_vanish(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path / "a.txt", STORIES + "<|endoftext|>\n \n"), "train")
    assert corpus.documents == ("One day a cat sat.", "Two dogs ran.\nThey were happy.")
    assert corpus.split == "all"
    assert corpus.name.endswith("a.txt")
    assert corpus.n_bytes == sum(map(len, corpus.documents))


def test_a_text_without_separators_is_one_document_as_it_stands(tmp_path: Path) -> None:
    text = " \n = Title = \n\n Words , words .\n"
    assert read_corpus(write(tmp_path / "a.TXT", text), "train").documents == (text,)


def test_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path: Path) -> None:
    plain = read_corpus(write(tmp_path / "a.txt", STORIES), "train").documents
    windows = read_corpus(write(tmp_path / "b.txt", b"\xef\xbb\xbf" + STORIES.replace("\n", "\r\n").encode()), "train").documents
    assert windows == plain


def test_json_lines_and_json_give_the_same_corpus(tmp_path: Path) -> None:
    entries = [{"text": "été \u2028 one", "meta": 3}, {"text": ""}, {"text": "two"}]
    lines = read_corpus(records(tmp_path / "a.jsonl", entries, lines=True), "train")
    array = read_corpus(records(tmp_path / "a.json", entries), "train")
    assert lines.documents == array.documents == ("été \u2028 one", "two")
    assert lines.n_bytes == len("été \u2028 one".encode()) + 3
    assert read_corpus(records(tmp_path / "one.json", entries[0]), "train").documents == ("été \u2028 one",)


def test_records_may_leave_out_the_input_and_carry_other_keys(tmp_path: Path) -> None:
    entries = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "category": "sums", "text": "rendered elsewhere"},
        {"instruction": "Say hello.", "output": "Hello."},
        {"instruction": "Say bye.", "input": None, "output": "Bye."},
    ]
    corpus = read_corpus(records(tmp_path / "a.json", entries), "train")
    assert corpus.records == (Record("Add.", "1 and 2", "3"), Record("Say hello.", "", "Hello."), Record("Say bye.", "", "Bye."))
    assert corpus.documents == ()
    assert len(corpus) == 3


SUMS = (Record("Add.", "1 and 2", "3"), Record("Say hello.", "", "Hello."))
SAID = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", 'instruction,input,output\nAdd.,1 and 2,3\n"Say hello.",,Hello.\n', SUMS),
        ("a.tsv", "prompt\tcontext\tcompletion\nAdd.\t1 and 2\t3\nSay hello.\t\tHello.\n", SUMS),
        (
            "a.jsonl",
            '{"instruction": "Add.", "context": "1 and 2", "response": "3"}\n{"question": "Say hello.", "answer": "Hello.", "id": 1}',
            SUMS,
        ),
        ("a.json", json.dumps([{"prompt": "elsewhere", "messages": SAID}]), (Record("Add.", "", "3"),)),
        ("a.json", json.dumps([{"messages": [{"role": "system", "content": "Be kind."}, *SAID]}]), (Record("Add.", "", "3", "Be kind."),)),
    ],
)
def test_records_are_read_under_their_usual_names(tmp_path: Path, name: str, text: str, expected: tuple[Record, ...]) -> None:
    assert read_corpus(write(tmp_path / name, text), "train").records == expected


def test_a_table_of_texts_is_read_and_a_text_goes_before_other_names(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", 'id,text\n1,"one, and\nmore"\n2,\n3,two\n')
    assert read_corpus(table, "train").documents == ("one, and\nmore", "two")
    assert read_corpus(records(tmp_path / "a.json", [{"text": "whole", "question": "part"}]), "train").documents == ("whole",)


@pytest.mark.slow
def test_the_built_in_splits_do_not_meet() -> None:
    held = {split: read_corpus(None, split) for split in ("validation", "test")}
    assert held["test"].name == BUILT_IN
    assert held["test"].split == "test"
    assert not set(held["test"].documents) & set(held["validation"].documents)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t\r\n", "blank"),
        ("a.txt", b"<|endoftext|>\n<|endoftext|>", "blank"),
        ("a.txt", b"\xef\xbb\xbf", "empty"),
        ("a.txt", b"abc\0def", "NUL byte at offset 3"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8.*byte 3"),
        ("a.txt", "utf sixteen".encode("utf-16"), "binary"),
        ("a.xml", b"a,b", "suffix '.xml'; known: .txt, .jsonl, .json, .csv, .tsv"),
        ("a.csv", b"text\n", "empty"),
        ("a.csv", b"words\nabc\n", "line 2 has neither 'text' nor instruction, input and output nor 'messages'; its keys: 'words'"),
        ("a.csv", b"instruction,output\nabc\n", "line 2 has 1 columns, the first line 2"),
        ("a.jsonl", b'{"prompt": "a", "answer": 3}', "line 1 has 'answer' of type int"),
        ("a.jsonl", b'{"messages": []}', "line 1 has no answer of the assistant in 'messages'"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "no answer of the assistant"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [3]}]}',
            "message 2 has a part of kind 'int'",
        ),
        ("noext", b"a", "no suffix"),
        ("a.json", b"[]", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.json", b'[\n{"text": "a"},\n{"text": }\n]', "line 3"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "rename it to .jsonl"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "line 3"),
        ("a.json", b'["a", "b"]', "record 1 is a str"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}', "line 2 has 'text' of type int"),
        ("a.json", b'[{"words": "a"}]', "record 1 has neither.*'words'"),
        (
            "a.json",
            b'[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "}]',
            "record 2 has an empty 'output'",
        ),
        ("a.json", b'[{"instruction": "a", "input": ""}]', "record 1 has no 'output'"),
        ("a.json", b'[{"instruction": "a", "output": null}]', "record 1 has 'output' of type NoneType"),
        ("a.json", b'[{"instruction": "a", "input": 3, "output": "b"}]', "record 1 has 'input' of type int"),
        ("a.json", b'[{"instruction": "", "output": "b"}]', "record 1 has an empty 'instruction'"),
        ("a.json", b'[{"text": "a"}, {"instruction": "a", "output": "b"}]', "record 1 is a text, record 2 is an instruction"),
        ("a.json", rb'[{"text": "\ud800"}]', "record 1 has half a surrogate pair"),
        ("a.json", b"[" * 200_000, "cannot be read as JSON"),
        ("a.json", b'[{"text": ' + b"9" * 5000 + b"}]", "cannot be read as JSON"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(write(tmp_path / name, data), "train")
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_missing_files_folders_and_refused_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_corpus(tmp_path / "nothing.txt", "train")
    with pytest.raises(DataError, match="is a folder"):
        read_corpus(tmp_path, "train")
    with pytest.raises(DataError, match="cannot be read"):
        read_corpus(tmp_path / ("n" * 300 + ".txt"), "train")


def test_splitting_by_document_loses_and_repeats_nothing() -> None:
    corpus = Corpus("made up", "all", documents=tuple(f"document {number} " * (1 + number % 7) for number in range(200)))
    rest, held = split_corpus(corpus, 0.1, seed=3)
    assert sorted(rest.documents + held.documents) == sorted(corpus.documents)
    assert 0.05 <= held.n_bytes / corpus.n_bytes <= 0.125
    assert (rest.split, held.split) == ("train", "held-out")
    assert split_corpus(corpus, 0.1, seed=3) == (rest, held)
    assert split_corpus(corpus, 0.1, seed=4)[1] != held


def test_a_single_document_is_cut_at_a_line() -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    rest, held = split_corpus(Corpus("one", "all", documents=(text,)), 0.05, seed=0)
    assert rest.documents[0] + held.documents[0] == text
    assert rest.documents[0].endswith("\n")
    assert 0.04 < len(held.documents[0]) / len(text) < 0.06


def test_one_giant_among_few_is_cut_instead_of_taken_whole() -> None:
    giant = "words and words \n" * 5000
    corpus = Corpus("few", "all", documents=("tiny", giant, "small"))
    for seed in range(6):
        rest, held = split_corpus(corpus, 0.05, seed)
        assert 0.03 < held.n_bytes / corpus.n_bytes < 0.07
        assert "".join(rest.documents + held.documents).count("words") == giant.count("words")


def test_records_are_held_out_by_count() -> None:
    corpus = Corpus("r", "all", records=tuple(Record(f"q{number}", "", "a") for number in range(40)))
    rest, held = split_corpus(corpus, 0.05, seed=0)
    assert (len(rest), len(held)) == (38, 2)
    assert set(rest.records) | set(held.records) == set(corpus.records)


def test_too_little_to_divide_and_senseless_shares_are_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        split_corpus(Corpus("r", "all", records=(Record("q", "", "a"),)), 0.5, 0)
    with pytest.raises(DataError, match="too short"):
        split_corpus(Corpus("t", "all", documents=("a",)), 0.5, 0)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="between 0 and 1"):
            split_corpus(Corpus("t", "all", documents=("a b c d",)), share, 0)
