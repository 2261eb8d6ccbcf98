"""The split never lets training and test meet, on this Python or another."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from regraft.errors import DataError, InputError
from regraft.seedling import corpus
from regraft.seedling.corpus import Document, documents, family_of, split_of

SPLITS = ("train", "validation", "test")

# Written down once: a change here means that the shipped model may be measured on what it was trained on.
PLANTED = {
    "Lib/subprocess.py": "test",
    "Lib/unittest/case.py": "test",
    "topics/comparisons": "test",
    "docstrings/itertools": "test",
    "Lib/email/message.py": "validation",
    "Lib/datetime.py": "validation",
    "docstrings/_datetime": "validation",
    "topics/assignment": "validation",
    "Lib/asyncio/tasks.py": "train",
    "Lib/pathlib.py": "train",
    "topics/compound": "train",
    "docstrings/builtins": "train",
}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Document]]:
    return {split: documents(split) for split in SPLITS}


@pytest.mark.parametrize(("path", "split"), PLANTED.items())
def test_planted_paths_keep_their_split(path: str, split: str) -> None:
    assert split_of(path) == split


@pytest.mark.parametrize("path", ["Lib/subprocess.py", "Lib/datetime.py", "Lib/json/decoder.py"])
def test_split_follows_the_stated_rule(path: str) -> None:
    family = path.split("/")[1].removesuffix(".py")
    digest = hashlib.sha256(f"regraft-seedling/1:{family}".encode()).hexdigest()
    part = int(digest[:16], 16) % 100
    assert split_of(path) == ("test" if part < 5 else "validation" if part < 10 else "train")


@pytest.mark.parametrize(
    "names",
    [
        ("Lib/pathlib.py", "Lib/pathlib/__init__.py", "Lib/pathlib/_local.py"),
        ("Lib/datetime.py", "Lib/_pydatetime.py", "docstrings/_datetime"),
        ("Lib/io.py", "Lib/_pyio.py", "docstrings/_io"),
        ("Lib/sre_parse.py", "Lib/re/_parser.py", "Lib/re.py"),
        ("Lib/abc.py", "Lib/_py_abc.py"),
    ],
)
def test_a_module_keeps_its_family_over_versions_and_twins(names: tuple[str, ...]) -> None:
    assert len({family_of(name) for name in names}) == 1


def test_modules_whose_names_begin_with_py_are_not_mistaken_for_twins() -> None:
    assert family_of("Lib/pydoc.py") == "pydoc"
    assert family_of("Lib/pyclbr.py") == "pyclbr"


@pytest.mark.long
def test_every_document_lies_in_the_split_of_its_path_and_in_no_other(splits: dict[str, list[Document]]) -> None:
    paths = [document.path for split in SPLITS for document in splits[split]]
    assert len(paths) == len(set(paths))
    assert all(split_of(document.path) == split for split in SPLITS for document in splits[split])


@pytest.mark.slow
def test_shares_of_the_splits_are_usable(splits: dict[str, list[Document]]) -> None:
    chars = {split: sum(len(document.text) for document in splits[split]) for split in SPLITS}
    assert chars["train"] > 0.75 * sum(chars.values())
    assert min(chars["validation"], chars["test"]) > 200_000


def test_every_kind_of_document_is_in_train(splits: dict[str, list[Document]]) -> None:
    assert {document.path.split("/")[0] for document in splits["train"]} == {"Lib", "topics", "docstrings"}


def line_runs(texts: list[Document]) -> set[tuple[str, ...]]:
    """Three lines in a row without their white space, written without the corpus's own code."""
    runs = set()
    for document in texts:
        said = ["".join(line.split()) for line in document.text.splitlines() if line.strip()]
        runs.update(zip(said, said[1:], said[2:], strict=False))
    return {run for run in runs if sum(map(len, run)) >= 60}


@pytest.mark.slow
def test_no_run_of_three_lines_stands_in_two_splits(splits: dict[str, list[Document]]) -> None:
    runs = {split: line_runs(splits[split]) for split in SPLITS}
    assert len(runs["test"]) > 5_000
    assert not runs["train"] & runs["test"]
    assert not runs["validation"] & runs["test"]
    assert not runs["train"] & runs["validation"]


def test_no_text_stands_twice_in_a_split(splits: dict[str, list[Document]]) -> None:
    for split in SPLITS:
        contents = ["".join(document.text.split()) for document in splits[split]]
        assert len(contents) == len(set(contents))


def test_tests_tables_and_build_settings_are_left_out(splits: dict[str, list[Document]]) -> None:
    paths = [document.path for split in SPLITS for document in splits[split]]
    assert not [path for path in paths if "/test/" in path or "/tests/" in path or "/idle_test/" in path]
    assert not [path for path in paths if "site-packages" in path or "sysconfigdata" in path or "/encodings/" in path]
    assert "Lib/pydoc_data/topics.py" not in paths


@pytest.mark.slow
def test_order_is_fixed_and_a_limit_takes_its_beginning(splits: dict[str, list[Document]]) -> None:
    assert documents("validation") == splits["validation"]
    limited = documents("validation", limit_chars=100_000)
    assert limited[:-1] == splits["validation"][: len(limited) - 1]
    last = splits["validation"][len(limited) - 1]
    assert limited[-1].path == last.path
    assert last.text.startswith(limited[-1].text)
    assert limited[-1].text.endswith("\n")
    assert 90_000 < sum(len(document.text) for document in limited) <= 100_000


def test_texts_are_clean(splits: dict[str, list[Document]]) -> None:
    for document in splits["test"] + splits["validation"]:
        assert document.text.endswith("\n")
        assert not document.text.endswith("\n\n")
        assert "\r" not in document.text
        document.text.encode("utf-8")


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own in place of this Python's, without topics and C modules."""
    monkeypatch.setattr(corpus, "_stdlib_root", lambda: tmp_path)
    monkeypatch.setattr(corpus, "_C_MODULES", ())
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    return tmp_path


COMMON = "def shared(value):\n    return first_of_all(value) and second_of_all(value)\n    # and a third line\n"


def own(word: str) -> str:
    return "".join(f"{word}_{number} = {number} * {word}\n" for number in range(40))


def test_text_that_a_test_module_shares_is_taken_out_of_train(fake_library: Path) -> None:
    (fake_library / "subprocess.py").write_text(own("apple") + COMMON, encoding="utf-8")
    indented = "".join(f"    {line}\n" for line in COMMON.splitlines())
    (fake_library / "shutil.py").write_text(own("pear") + indented + own("plum"), encoding="utf-8")
    (train,) = documents("train")
    (test,) = documents("test")
    assert "shared" in test.text
    assert "shared" not in train.text
    assert train.text == own("pear") + own("plum")


def test_lines_that_removal_brings_together_are_no_way_round(fake_library: Path) -> None:
    outer = ["outer_line_number_one = 11111", "outer_line_number_two = 22222", "outer_line_number_three = 33333"]
    inner = ["inner_line_number_one = 11111", "inner_line_number_two = 22222", "inner_line_number_three = 33333"]
    (fake_library / "subprocess.py").write_text("\n".join([*outer, *own("x").splitlines(), *inner]) + "\n", encoding="utf-8")
    nested = [outer[0], *inner, *outer[1:]]
    (fake_library / "shutil.py").write_text(own("pear") + "\n".join(nested) + "\n", encoding="utf-8")
    (train,) = documents("train")
    assert train.text == own("pear")


def test_a_copy_is_taken_once_and_undecodable_files_are_passed_over(fake_library: Path) -> None:
    (fake_library / "shutil.py").write_text(own("pear"), encoding="utf-8")
    (fake_library / "tarfile.py").write_text(own("pear").replace("\n", "  \r\n"), encoding="utf-8", newline="")
    (fake_library / "locale.py").write_bytes(b"# broken \xff\xfe\n" + own("plum").encode())
    (fake_library / "turtle.py").write_bytes(b"# -*- coding: no-such-code -*-\n" + own("plum").encode())
    (fake_library / "inspect.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1") + own("fig").encode())
    texts = [document.text for document in documents("train")]
    assert sorted(texts) == sorted([own("pear"), "# -*- coding: latin-1 -*-\n# é\n" + own("fig")])


def test_other_things_in_the_folder_of_the_library_are_left_alone(fake_library: Path) -> None:
    (fake_library / "shutil.py").write_text(own("pear"), encoding="utf-8")
    (fake_library / "mymodule.py").write_text(own("plum"), encoding="utf-8")
    (fake_library / "site-packages").mkdir()
    (fake_library / "site-packages" / "shutil.py").write_text(own("fig"), encoding="utf-8")
    (fake_library / "json" / "tests").mkdir(parents=True)
    (fake_library / "json" / "tests" / "big.py").write_text(own("fig"), encoding="utf-8")
    assert [document.path for document in documents("train")] == ["Lib/shutil.py"]


def test_a_python_without_sources_is_one_line_with_the_remedy(fake_library: Path) -> None:
    with pytest.raises(DataError, match=r"no train text: .* holds no .py files; use a Python") as caught:
        documents("train")
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="'dev' is not known: choose one of train, validation, test"):
        documents("dev")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="limit_chars is 0"):
        documents("test", limit_chars=0)
    with pytest.raises(InputError, match="no path of the corpus"):
        split_of("subprocess.py")
