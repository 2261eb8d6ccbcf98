"""Text that every Python installation contains, split so that no text is in both training and test.

There are three kinds of document: the help topics of :mod:`pydoc_data.topics`, the source files of the standard library, and the
docstrings of the modules written in C. A SHA-256 of the topic's name, or of the *family* of a module, decides the split of a document.
The family is the first component of the path without underscores and suffix. So ``datetime.py``, ``_pydatetime.py`` and the docstrings
of ``_datetime`` are in one split, and so are ``pathlib.py`` of one Python version and ``pathlib/_local.py`` of the next. The rule does
not depend on the installation: on any Python from 3.11, a module that the shipped model was trained on is never a test document.

Topics and modules also quote one another. Therefore a run of three lines that occurs in a more protected split is removed from the less
protected ones (most protected: test, then validation, then train).
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

# Folders with tests, other packages or build products; also the folder of the help topics, which are read separately.
_SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "_bundled", "lib-dynload", "pydoc_data"]
)
# Generated tables, and settings of one build or one system.
_SKIPPED_FAMILIES = frozenset(["encodings", "sysconfigdata", "sitecustomize", "usercustomize", "phello__", "msilib"])

# Modules whose text moved to another file between Python versions: one file's name, then the family to use for it.
_FAMILY_OF = {
    "sre_compile": "re",
    "sre_constants": "re",
    "sre_parse": "re",
    "ast_unparse": "ast",
    "weakrefset": "weakref",
    "collections_abc": "collections",
}

# Modules written in C that are safe to import anywhere; those that an installation lacks are skipped.
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
        path: Name of the document, equal on every machine: ``Lib/json/decoder.py``, ``topics/LAMBDAS`` or ``docstrings/math``.
        text: Contents of the document, with line ends ``\n``.
    """

    path: str
    text: str


def family_of(path: str) -> str:
    """Returns the topic or the module family of a path, which decides its split.

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
    """Returns the split of a path. The SHA-256 of its family falls into one of 100 parts: 5 are test, the next 5 validation.

    >>> split_of("Lib/pathlib.py") == split_of("Lib/pathlib/_local.py")
    True
    """
    digest = hashlib.sha256(f"{_SALT}:{family_of(path)}".encode()).digest()
    part = int.from_bytes(digest[:8], "big") % 100
    if part < TEST_PERCENT:
        return "test"
    return "validation" if part < TEST_PERCENT + VALIDATION_PERCENT else "train"


def documents(split: Split, *, limit_chars: int | None = None) -> list[Document]:
    """Returns the documents of a split, in a fixed order that mixes the kinds.

    The order is that of a hash of the paths, so that the first few documents are a fair sample. ``"train"`` takes a second or two.

    Args:
        split: ``"train"``, ``"validation"`` (for calibration, recovery and the choice of checkpoints) or ``"test"`` (only for
            measuring).
        limit_chars: Largest number of characters; the last document is cut at a line end. ``None`` for all.

    Returns:
        At least one document.

    Raises:
        InputError: The split is none of the three, or the limit is below 1.
        DataError: This Python has no source files of its standard library.
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
    """Returns documents up to the limit, the last one cut at a line end."""
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
    """Yields the documents without their protected runs of lines, and equal contents only once."""
    seen: set[str] = set()
    for document in texts:
        text = _without(document.text, protected)
        content = hashlib.sha256("".join(text.split()).encode()).hexdigest()
        if content in seen or len(text) < _MIN_DOCUMENT_CHARS:
            continue
        seen.add(content)
        yield Document(document.path, text)


def _windows(lines: list[str]) -> dict[tuple[int, ...], int]:
    """Returns a fingerprint of each run of three non-blank lines, by the numbers of these lines.

    White space is ignored, so that indented text is still recognised.
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
    # The removal may bring other lines together and so form another protected run; hence the recursion below.
    if not dropped:
        return text
    return _without("\n".join(line for number, line in enumerate(lines) if number not in dropped), protected)


def _raw_documents(split: Split) -> Iterator[Document]:
    """Yields the unfiltered documents of a split, in the order of a hash of their paths, and reads each one only then."""
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
    except ImportError:  # some systems leave this module out of their minimal Python
        return {}
    return {f"topics/{name}": partial(str, text) for name, text in module.topics.items()}


def _sources() -> dict[str, _Reader]:
    root = _stdlib_root()
    files = {str(PurePosixPath("Lib", *file.relative_to(root).parts)): file for file in _source_files(root)}
    return {path: partial(_source, file) for path, file in files.items()}


def _source(file: Path) -> str | None:
    try:
        with tokenize.open(file) as stream:  # uses the encoding that the file declares
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None  # unreadable, or not text in the declared encoding


def _source_files(root: Path) -> Iterator[Path]:
    """Yields the source files of the standard library, and no other files of its folder."""
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
    """Returns the docstrings of a module written in C, or None if this Python lacks the module."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # another platform, or a Python built without this module
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
    """Returns the text with uniform line ends, without form feeds and trailing blanks, and with one line end at its end."""
    lines = re.split(r"\r\n|\r|\n", text.replace("\f", ""))
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"
