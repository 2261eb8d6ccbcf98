"""Readers of other people's files and arguments: JSON, numbers and paths, each in one place, with its limits.

A file may be a pipe that never ends, a device, a hundred megabytes of brackets, or hold an infinite number where a rank is wanted.
Nothing of that may hang, fill the memory or end in a traceback: :func:`read_bytes` opens ordinary files alone, up to a size;
:func:`parse_json` counts brackets before it parses; :func:`whole_number` and :func:`real_number` say what a number has to be.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from regraft.errors import InputError, RegraftError, kind_of, shown

LARGEST_JSON_BYTES = 1 << 28  # a plan with every unit of a large model takes a few megabytes
DEEPEST_JSON = 100
LONGEST_HEADER_BYTES = 100_000_000  # the limit of the reference reader of safetensors
AGAIN = "copy or download it again"
LARGEST_SEED = 2**63 - 1
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def path_of(value: object, what: str = "path") -> Path:
    """Returns a path that a user has given.

    Raises:
        InputError: It is no text, empty, or cannot be a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{what} is {kind_of(value)}, no path; give a text or a pathlib.Path")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise InputError(f"{what} {shown(repr(value))} is no text; decode it with os.fsdecode")
    if "\0" in text:
        raise InputError(f"{what} '{shown(text)}' has a zero byte, which no file name has; choose another")
    return Path(text)


def check_text(text: str, what: str, error: type[RegraftError] = InputError) -> None:
    """Refuses a text with half of a character, as bytes on a command line that are not UTF-8 become: no tokenizer takes it.

    Raises:
        RegraftError: There is such a half; the exception has the type ``error``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as failure:
        raise error(f"{what} holds {shown(repr(text[failure.start]))} at character {failure.start}, which is no text; give UTF-8") from None


def home_expanded(path: Path) -> Path:
    """Returns a path with ``~`` and ``~user`` replaced; as it is where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def reason_of(error: OSError | ValueError) -> str:
    """Returns why the operating system refused something, in a few words."""
    match error:
        case OSError(strerror=str(reason)) if reason:
            return reason
        case _:
            return str(error)


def is_there(path: Path) -> bool:
    """Returns whether there is something at a path; where that cannot be told, as below a closed folder, nothing is."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Returns whether there is an ordinary file at a path; where that cannot be told, there is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Returns whether there is a folder at a path; where that cannot be told, there is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def check_ordinary(path: Path, error: type[RegraftError] = InputError) -> int:
    """Refuses what is no ordinary file: a folder, a pipe or a device would be read without end.

    Returns:
        Its size in bytes.

    Raises:
        RegraftError: The value or file is not as described; the exception has the type ``error``.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as failure:
        raise error(f"'{shown(path)}' cannot be read: {reason_of(failure)}; check the path and its permissions") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise error(f"'{shown(path)}' is {what}, no file; give the path of a file")
    return found.st_size


def read_bytes(path: Path, error: type[RegraftError] = InputError, most_bytes: int = LARGEST_JSON_BYTES) -> bytes:
    """Returns what an ordinary file holds.

    Raises:
        RegraftError: It is no ordinary file, too large, or unreadable; the exception has the type ``error``.
    """
    size = check_ordinary(path, error)
    if size > most_bytes:
        raise error(f"'{shown(path)}' has {size:,} bytes, above the limit of {most_bytes:,}; give the right file")
    try:
        with path.open("rb") as stream:
            return stream.read(most_bytes + 1)
    except OSError as failure:
        raise error(f"'{shown(path)}' cannot be read: {reason_of(failure)}; check its permissions") from None


def parse_json(content: bytes | str, what: str, error: type[RegraftError] = InputError) -> Any:
    """Returns the value of a JSON text.

    Args:
        content: UTF-8.
        what: Where it comes from, for the message.
        error: Kind of the error.

    Raises:
        RegraftError: It is not JSON, nested too deep, or has a number that no program reads.
    """
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    depth = deepest = 0
    for token in _STRING_OR_BRACKET.finditer(raw):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        deepest = max(deepest, depth)
    if deepest > DEEPEST_JSON:
        raise error(f"{what} is nested {deepest:,} deep, above the limit of {DEEPEST_JSON}; give the right file")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as failure:
        raise error(f"{what} is not JSON ({shown(failure, 200)}); mend it or write it again") from None


def read_json(path: Path, error: type[RegraftError] = InputError) -> Any:
    """Returns the value of a JSON file.

    Raises:
        RegraftError: It cannot be read, or is not JSON; the exception has the type ``error``.
    """
    return parse_json(read_bytes(path, error), f"'{shown(path)}'", error)


def read_object(path: Path, error: type[RegraftError] = InputError) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
        RegraftError: It cannot be read, or holds something else; the exception has the type ``error``.
    """
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"'{shown(path)}' holds {_kind(value)}, no JSON object; mend it or write it again")
    return value


def read_safetensors_header(path: Path, error: type[RegraftError] = InputError) -> tuple[dict[str, Any], int, int]:
    """Returns the header of a safetensors file, its length, and the size of the file, in bytes; no tensor is read.

    The format (https://huggingface.co/docs/safetensors): eight bytes, little-endian, with the length of a JSON header; the header; the
    tensors.

    Raises:
        RegraftError: It is no ordinary file, truncated, damaged, or a git-lfs pointer; the exception has the type ``error``.
    """
    size_bytes = check_ordinary(path, error)
    name = shown(path)
    with path.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise error(f"'{name}' is a git-lfs pointer, not the weights; fetch them with: git lfs pull")
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < header_bytes <= min(LONGEST_HEADER_BYTES, size_bytes - 8):
            raise error(f"'{name}' is truncated or damaged: {size_bytes} bytes, of which the header claims {header_bytes}; {AGAIN}")
        text = stream.read(header_bytes)
    try:
        header = parse_json(text, "the header", error)
        header.pop("__metadata__", None)
    except RegraftError:
        raise error(f"'{name}' is damaged: its header cannot be read (ValueError); {AGAIN}") from None
    except (AttributeError, TypeError) as failure:  # no object
        raise error(f"'{name}' is damaged: its header cannot be read ({type(failure).__name__}); {AGAIN}") from None
    return header, header_bytes, size_bytes


def text_in(value: object) -> str | None:
    """Returns a value of other people's JSON that is a text, and None for anything else."""
    return value if isinstance(value, str) else None


def object_in(value: object) -> Mapping[str, Any]:
    """Returns a value of other people's JSON that is an object, and an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def list_in(value: object) -> Sequence[Any]:
    """Returns a value of other people's JSON that is a list, and an empty one for anything else."""
    return value if isinstance(value, list | tuple) else ()


def is_whole(value: object, least: float, most: float) -> TypeGuard[int]:
    """Returns whether a value is a whole number within limits; True and 1.5 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole_number(value: object, what: str, least: int, most: int, error: type[RegraftError] = InputError) -> int:
    """Returns a whole number within limits; True and 1.5 are none.

    Raises:
        RegraftError: The value or file is not as described; the exception has the type ``error``.
    """
    if not is_whole(value, least, most):
        raise error(f"{what} {_short(value)} is not a whole number from {least} to {most}")
    return value


def real_number(value: object, what: str, least: float, most: float, error: type[RegraftError] = InputError) -> float:
    """Returns a finite number above ``least`` and up to ``most``.

    Raises:
        RegraftError: The value or file is not as described; the exception has the type ``error``.
    """
    match value:
        case int() | float() if value is not True and value is not False and abs(value) < 1e300 and least < value <= most:
            return float(value)
        case _:
            raise error(f"{what} {_short(value)} is not a number above {least:g} and up to {most:g}")


def entry(values: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], what: str, error: type[RegraftError] = InputError) -> Any:
    """Returns an entry of a JSON object that has to be there and of a kind.

    Raises:
        RegraftError: The value or file is not as described; the exception has the type ``error``.
    """
    if key not in values:
        raise error(f"{what} lacks '{key}'; write it again")
    value = values[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise error(f"{what}: '{key}' is {_short(value)}, which cannot be; write it again")
    return value


def _short(value: object) -> str:
    if is_whole(value, -math.inf, math.inf) and abs(value) >= 10**30:
        return "of more than 30 digits"  # printing thousands of digits is refused by Python itself
    return shown(repr(value), 80)


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
