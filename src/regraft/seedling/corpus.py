"""Text that every Python installation carries, split so that training and test never meet.

Three kinds of document: the help topics of :mod:`pydoc_data.topics`, the source files of the standard library (with their
docstrings where they stand), and the docstrings of the modules that are written in C. Each belongs to one split for good, by a
SHA-256 of its path: of the topic's name, or of the *family* of a module. A family is the first component of the path without
underscores and suffix, so that ``datetime.py``, ``_pydatetime.py`` and the docstrings of ``_datetime`` stay together, and
``pathlib.py`` of one Python and ``pathlib/_local.py`` of the next get the same answer. The rule knows nothing of the
installation: on any Python from 3.11, a module that the shipped model was trained on is never a test document.

The rule alone would still let equal text through, since topics quote one another and modules borrow from one another. Hence a run
of three lines that stands in a more protected split is taken out of the less protected ones (test, then validation, then train).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Literal, get_args

from regraft.errors import DataError, InputError

Split = Literal["train", "validation", "test"]

TEST_PERCENT = 5
VALIDATION_PERCENT = 5

_SALT = "regraft-seedling/1"
_PROTECTED_FIRST: tuple[Split, ...] = ("test", "validation", "train")

# Folders that hold tests, other people's packages or build products; the topics, which are documents of their own.
_SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "_bundled", "lib-dynload", "pydoc_data"]
)
# Generated tables, settings of one build or of one system.
_SKIPPED_FAMILIES = frozenset(["encodings", "sysconfigdata", "sitecustomize", "usercustomize", "phello__", "msilib"])

# Modules whose text changed its file between Python versions: the new name follows the old.
_FAMILY_OF = {
    "sre_compile": "re",
    "sre_constants": "re",
    "sre_parse": "re",
    "ast_unparse": "ast",
    "weakrefset": "weakref",
    "collections_abc": "collections",
}

# Written in C and safe to import anywhere; those that an installation lacks are passed over.
# fmt: off
_C_MODULES = (
    "_asyncio", "_bisect", "_bz2", "_codecs", "_collections", "_csv", "_ctypes", "_datetime",
    "_decimal", "_elementtree", "_functools", "_heapq", "_io", "_json", "_lzma", "_operator", "_pickle",
    "_random", "_signal", "_sqlite3", "_ssl", "_socket", "_struct", "_thread", "_tracemalloc",
    "_warnings", "_weakref", "array", "atexit", "binascii", "builtins", "cmath", "errno",
    "faulthandler", "gc", "itertools", "marshal", "math", "mmap", "posix", "pyexpat", "select", "sys",
    "time", "unicodedata", "zlib",
)
# fmt: on

_Reader = Callable[[], str | None]

_WINDOW_LINES = 3
_WINDOW_MIN_CHARS = 48
_MIN_DOCUMENT_CHARS = 200


@dataclass(frozen=True, slots=True)
class Document:
    r"""One text of the corpus.

    Attributes:
        path: Its name: ``Lib/json/decoder.py``, ``topics/LAMBDAS`` or ``docstrings/math``; equal on every machine.
        text: What it says, with ``\n`` at line ends.
    """

    path: str
    text: str


def family_of(path: str) -> str:
    """Returns what decides the split of a path: a topic, or the family of a module.

    >>> [family_of(p) for p in ("Lib/pathlib.py", "Lib/pathlib/_local.py", "Lib/_pydatetime.py", "docstrings/_datetime")]
    ['pathlib', 'pathlib', 'datetime', 'datetime']
    >>> family_of("topics/LAMBDAS")
    'topics/LAMBDAS'
    """
    parts = PurePosixPath(path).parts
    if len(parts) < 2 or parts[0] not in ("Lib", "topics", "docstrings"):
        raise InputError(f"{path!r} is no path of the corpus: it has to begin with Lib/, topics/ or docstrings/")
    if parts[0] == "topics":
        return f"topics/{parts[1]}"
    name = re.sub(r"^_+(py_?(?=[a-z]))?", "", parts[1].removesuffix(".py"))
    return _FAMILY_OF.get(name, name)


def split_of(path: str) -> Split:
    """Returns the split of a path: a SHA-256 of its family in 100 parts, 5 of them test and the next 5 validation.

    >>> split_of("Lib/pathlib.py") == split_of("Lib/pathlib/_local.py")
    True
    """
    digest = hashlib.sha256(f"{_SALT}:{family_of(path)}".encode()).digest()
    part = int.from_bytes(digest[:8], "big") % 100
    if part < TEST_PERCENT:
        return "test"
    return "validation" if part < TEST_PERCENT + VALIDATION_PERCENT else "train"


def documents(split: Split, *, limit_chars: int | None = None) -> list[Document]:
    """Returns the documents of a split, in an order that is fixed and mixes the kinds.

    The order is that of a hash of the paths, so that the first few are a fair sample. It takes a second or two for ``"train"``.

    Args:
        split: ``"train"``, ``"validation"`` (for calibration, recovery and the choice of checkpoints) or ``"test"`` (for
            measuring, nothing else).
        limit_chars: Stop after this many characters; the last document is cut at a line end. ``None`` for all.

    Returns:
        At least one document.

    Raises:
        InputError: The split is none of the three, or the limit is below 1.
        DataError: This Python keeps no source files of its standard library.
    """
    if split not in get_args(Split):
        raise InputError(f"split {split!r} is not known: choose one of {', '.join(get_args(Split))}")
    if limit_chars is not None and limit_chars < 1:
        raise InputError(f"limit_chars is {limit_chars}: it has to be 1 or more, or None for all")
    protected: set[int] = set()
    for other in _PROTECTED_FIRST[: _PROTECTED_FIRST.index(split)]:
        for document in _raw_documents(other):
            protected.update(_windows(document.text.split("\n")).values())
    chosen = _limited(_distinct(_raw_documents(split), protected), limit_chars)
    if not chosen:
        raise DataError(
            f"no {split} text: the standard library at {_stdlib_root()} holds no .py files; "
            "use a Python that is installed with its sources, or give a text file of your own"
        )
    return chosen


def _limited(texts: Iterator[Document], limit_chars: int | None) -> list[Document]:
    """Takes documents until the limit, cutting the last one at a line end."""
    chosen: list[Document] = []
    left = limit_chars
    for document in texts:
        if left is not None and len(document.text) >= left:
            head = document.text[:left]
            chosen.append(Document(document.path, head[: head.rfind("\n") + 1] or head))
            break
        chosen.append(document)
        if left is not None:
            left -= len(document.text)
    return chosen


def _distinct(texts: Iterable[Document], protected: set[int]) -> Iterator[Document]:
    """Yields the documents without protected runs of lines, each content once."""
    seen: set[str] = set()
    for document in texts:
        text = _without(document.text, protected)
        content = hashlib.sha256("".join(text.split()).encode()).hexdigest()
        if content in seen or len(text) < _MIN_DOCUMENT_CHARS:
            continue
        seen.add(content)
        yield Document(document.path, text)


def _windows(lines: list[str]) -> dict[tuple[int, ...], int]:
    """Returns a fingerprint for each run of three lines that say something, by the numbers of those lines.

    White space does not count, so that text that was indented or wrapped into a paragraph of its own is still known again.
    """
    said = [(number, "".join(line.split())) for number, line in enumerate(lines)]
    said = [(number, text) for number, text in said if text]
    found: dict[tuple[int, ...], int] = {}
    for start in range(len(said) - _WINDOW_LINES + 1):
        run = said[start : start + _WINDOW_LINES]
        joined = "\n".join(text for _, text in run)
        if len(joined) >= _WINDOW_MIN_CHARS:
            digest = hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            found[tuple(number for number, _ in run)] = int.from_bytes(digest, "big")
    return found


def _without(text: str, protected: set[int]) -> str:
    """Returns the text without the lines of protected runs."""
    if not protected:
        return text
    lines = text.split("\n")
    dropped = {number for run, digest in _windows(lines).items() if digest in protected for number in run}
    # What is left may bring lines together that were apart, and so make a protected run anew.
    if not dropped:
        return text
    return _without("\n".join(line for number, line in enumerate(lines) if number not in dropped), protected)


def _raw_documents(split: Split) -> Iterator[Document]:
    """Yields the documents of a split as they stand, ordered by a hash of their paths, each read when its turn comes."""
    found = {**_topics(), **_sources(), **_docstrings()}
    chosen = [path for path in found if split_of(path) == split]
    for path in sorted(chosen, key=lambda path: hashlib.sha256(path.encode()).digest()):
        text = found[path]()
        if text is not None:
            yield Document(path, _clean(text))


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics() -> dict[str, _Reader]:
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError:  # some systems leave it out of their smallest Python
        return {}
    return {f"topics/{name}": partial(str, text) for name, text in module.topics.items()}


def _sources() -> dict[str, _Reader]:
    root = _stdlib_root()
    files = {str(PurePosixPath("Lib", *file.relative_to(root).parts)): file for file in _source_files(root)}
    return {path: partial(_source, file) for path, file in files.items()}


def _source(file: Path) -> str | None:
    try:
        with tokenize.open(file) as stream:  # honours the coding line of the file
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None  # unreadable, or not text in the encoding that it names


def _source_files(root: Path) -> Iterator[Path]:
    """Yields the source files of the standard library alone, whatever else lies in its folder."""
    for entry in sorted(root.iterdir() if root.is_dir() else ()):
        name = entry.name.removesuffix(".py")
        if name not in sys.stdlib_module_names or family_of(f"Lib/{name}") in _SKIPPED_FAMILIES:
            continue
        files = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]
        for file in files:
            if file.suffix == ".py" and not _SKIPPED_FOLDERS.intersection(file.relative_to(root).parts):
                yield file


def _docstrings() -> dict[str, _Reader]:
    return {f"docstrings/{name}": partial(_docstrings_of, name) for name in _C_MODULES}


def _docstrings_of(name: str) -> str | None:
    """Returns what a module written in C says of itself, or None where there is no such module."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # another platform, or built without it
        return None
    return "\n\n".join(_described(module))


def _described(module: ModuleType) -> Iterator[str]:
    """Yields the docstrings of a module, of its functions and classes, and of their methods."""
    yield _entry(module.__name__, module)
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(member) or inspect.isbuiltin(member)):
            continue
        yield _entry(name, member)
        if inspect.isclass(member) and member.__module__ in (module.__name__, module.__name__.lstrip("_")):
            for method, value in sorted(vars(member).items()):
                if not method.startswith("_") and inspect.isroutine(value):
                    yield _entry(f"{name}.{method}", value)


def _entry(name: str, described: object) -> str:
    doc = getattr(described, "__doc__", None)
    return f"{name}\n{inspect.cleandoc(doc)}" if isinstance(doc, str) and doc else name


def _clean(text: str) -> str:
    """Returns the text with one kind of line end, without form feeds and trailing blanks, ending in one line end."""
    lines = re.split(r"\r\n|\r|\n", text.replace("\f", ""))
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"
