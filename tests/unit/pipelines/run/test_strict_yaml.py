from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from regraft.errors import ConfigError
from regraft.pipelines.run.strict_yaml import read_value, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-2", -2),
        ("010", 10),
        ("1:20", "1:20"),
        ("1:-1", "1:-1"),
        ("':'", ":"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("'1'", "1"),
        ("[1, 2.5, x]", [1, 2.5, "x"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_plain_values_are_what_people_mean(text: str, value: Any) -> None:
    read = read_value(text)
    assert read == value
    assert type(read) is type(value)


# Without control characters and rare line ends, which PyYAML does not write faithfully.
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="\ufeff"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(VALUES)
@example({"0E0": None})
@example(["1e5", "no", "1:20", "010", "~"])
def test_what_is_written_is_read_back(value: Any) -> None:
    assert read_value(write_yaml(value)) == value


@pytest.mark.slow
@given(
    st.dictionaries(
        st.text("abc", min_size=1), st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False), min_size=1
    )
)
def test_json_is_yaml(value: dict[str, Any]) -> None:
    assert read_value(json.dumps(value)) == value


@pytest.mark.long
@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        read_yaml(text, "recipe.yaml")
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_every_key_has_its_line() -> None:
    document = read_yaml("# a comment\nmodel: x\nprune:\n  ratio: 0.2\n  targets:\n    - ffn\nseed: 1\n", "recipe.yaml")
    assert document.lines == {"model": 2, "prune": 3, "prune.ratio": 4, "prune.targets": 5, "seed": 7}
    assert document.problems == []


def test_duplicate_keys_are_all_found_with_both_lines() -> None:
    document = read_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 2\n", "recipe.yaml")
    assert document.problems == [
        "b.c (line 4): stands twice, first on line 3; keep one of them",
        "a (line 5): stands twice, first on line 1; keep one of them",
    ]


def test_keys_that_nothing_follows_are_told_from_null() -> None:
    document = read_yaml("a:\nb: null\nc: ''\nd: {}\n", "recipe.yaml")
    assert document.empty == {"a"}
    assert document.values == {"a": None, "b": None, "c": "", "d": {}}


def test_merged_keys_are_no_duplicates() -> None:
    document = read_yaml("base: &base {x: 1, y: 2}\nother: {<<: *base, x: 3}\n", "recipe.yaml")
    assert document.values["other"] == {"x": 3, "y": 2}
    assert document.problems == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: [1", "line 1, column 6"),
        ("a: 1\n\t- b", "line 2, column 1"),
        ("a: b: c", "line 1, column 5"),
        ("a: 1\nb: *nowhere", "line 2, column 4"),
        ("---\na: 1\n---\nb: 2", "line 3, column 1"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]", "line 2, column 4"),
        ("a: 'open", "line 1, column 9"),
    ],
)
def test_what_is_not_yaml_gives_line_and_column(text: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "recipe.yaml")
    assert str(caught.value).startswith(f"recipe.yaml: {where}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{" * 1500, "[" * 1500, "a: " + "[" * 1000 + "]" * 1000, "\x00", "a: !!int x", "? [1, 2]\n: 3", "- &a [*a]\n- b: *c"]
)
def test_hostile_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "recipe.yaml")
    assert "\n" not in str(caught.value)
