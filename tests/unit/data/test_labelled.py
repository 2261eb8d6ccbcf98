"""Labelled texts: what each kind of file gives, and one line for everything that is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regraft.data.labelled import read_labelled, split_labelled
from regraft.errors import DataError

PAIRS = 'sentence1,sentence2,score\nA cat.,"A dog, big.",2.5\nSun.,Moon.,0\n'


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_table_of_pairs_and_numbers(tmp_path: Path) -> None:
    rows = read_labelled(written(tmp_path, "a.csv", PAIRS), "regression")
    assert rows.texts == (("A cat.", "A dog, big."), ("Sun.", "Moon."))
    assert rows.labels == (2.5, 0.0)
    assert rows.classes == ()
    assert rows.task == "regression"


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_tabs_and_quotes_as_they_stand(tmp_path: Path, name: str) -> None:
    text = 'text\tlabel\nHe said "no\tneg\n"Fine", yes\tpos\nno\tneg\n'
    rows = read_labelled(written(tmp_path, name, text), "classification")
    assert rows.texts == (('He said "no',), ('"Fine", yes',), ("no",))
    assert rows.classes == ("neg", "pos")
    assert rows.labels == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_objects_and_columns_of_other_names(tmp_path: Path, name: str) -> None:
    values = [{"q": f"text {index}", "kind": index % 3 + 9, "rest": None} for index in range(9)]
    text = json.dumps(values) if name == "a.json" else "\n".join(map(json.dumps, values))
    rows = read_labelled(written(tmp_path, name, text), "classification", ("q",), "kind")
    assert rows.classes == ("9", "10", "11")  # as numbers, not as words
    assert rows.labels == (0.0, 1.0, 2.0) * 3
    assert rows.texts[4] == ("text 4",)


def test_the_split_follows_the_seed_and_loses_nothing(tmp_path: Path) -> None:
    text = "text,label\n" + "".join(f"row {index},{index % 2}\n" for index in range(40))
    rows = read_labelled(written(tmp_path, "a.csv", text), "classification")
    train, held = split_labelled(rows, 0.25, 3)
    assert (len(train), len(held)) == (30, 10)
    assert sorted(train.texts + held.texts) == sorted(rows.texts)
    assert all(
        label == float(texts[0].split()[1]) % 2 for part in (train, held) for texts, label in zip(part.texts, part.labels, strict=True)
    )
    assert split_labelled(rows, 0.25, 3) == (train, held)
    assert split_labelled(rows, 0.25, 4)[1] != held


BAD = {
    "missing": (None, "regression", "does not exist"),
    "a.txt": ("x", "regression", "has the suffix '.txt'; known: .csv, .tsv, .jsonl, .json"),
    "empty.csv": ("", "regression", "holds no rows"),
    "names-only.csv": ("text,label\n", "regression", "holds no rows"),
    "no-text.csv": ("words,label\na,1\n", "regression", "its columns: 'words', 'label': name them with `text_columns`"),
    "no-label.csv": ("text,mark\na,1\n", "regression", "no column 'label' or 'score'"),
    "no-number.csv": ("text,label\na,1\nb,high\n", "regression", "line 3: 'label' is 'high', not a number"),
    "nan.csv": ("text,label\na,nan\n", "regression", "line 2: 'label' is 'nan', not a number"),
    "short.csv": ("text,label\na,1\nb\n", "regression", "line 3 has 1 columns, the first line 2"),
    "long.csv": ("text,label\na,1\nb,1,2\n", "regression", "line 3 has 3 columns, the first line 2"),
    "blank.csv": ("text,label\n ,1\n", "regression", "line 2: 'text' is empty"),
    "one-class.csv": ("text,label\na,1\nb,1\n", "classification", "has the one class '1'"),
    "numbers.csv": ("text,label\n" + "".join(f"a,{i}.5\n" for i in range(9)), "classification", "for numbers use `task=regression`"),
    "no-class.jsonl": ('{"text": "a", "label": null}', "classification", "line 1: 'label' is 'None', not a class"),
    "list.jsonl": ("[1]", "classification", "line 1 is a list, not an object"),
    "typed.jsonl": ('{"text": 3, "label": 1}', "regression", "line 1: 'text' is of type int"),
    "lacks.jsonl": ('{"text": "a", "label": 1}\n{"label": 2}', "regression", "line 2: 'text' is missing"),
    "broken.jsonl": ('{"text": ', "regression", "not valid JSON at line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(tmp_path: Path, name: str) -> None:
    text, task, said = BAD[name]
    path = written(tmp_path, name, text) if text is not None else tmp_path / f"{name}.csv"
    with pytest.raises(DataError) as raised:
        read_labelled(path, task)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "label", "said"),
    [
        (("sentence3",), None, "no column 'sentence3' (`text_columns`); did you mean"),
        (("a", "b", "c"), None, "`text_columns` names 3 columns"),
        ((), "scores", "no column 'scores' (`label_column`); did you mean 'score'"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: tuple[str, ...], label: str | None, said: str) -> None:
    with pytest.raises(DataError) as raised:
        read_labelled(written(tmp_path, "a.csv", PAIRS), "regression", columns, label)
    assert said in str(raised.value)


def test_one_row_cannot_be_divided(tmp_path: Path) -> None:
    rows = read_labelled(written(tmp_path, "a.csv", "text,label\na,1\n"), "regression")
    with pytest.raises(DataError, match="one row"):
        split_labelled(rows, 0.5, 0)
