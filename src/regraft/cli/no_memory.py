"""The line for a command that found no memory: at what it was, how many bytes were asked for, and which settings need less."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from regraft.errors import shown

# How torch (on processors and GPUs) and NumPy write what they could not get.
_ASKED = re.compile(r"allocate ([\d.,]+) ?(bytes|[KMGTPE]i?B)", re.IGNORECASE)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "unable to allocate")
_SMALLER = {
    "prune": "prune with --memory, or take fewer --samples or a shorter --seq-len",
    "compress": "take fewer --samples or a shorter --seq-len",
    "recover": "take a smaller --batch with more --accumulate, or a shorter --seq-len",
    "allocate": "take a smaller --batch with more --accumulate, a shorter --seq-len, or fewer --workers",
    "evaluate": "take a shorter --window, or --dtype bfloat16",
    "run": "take a smaller recover.batch, fewer prune.samples or a shorter seq_len, or set prune.memory",
    "complete": "take a smaller --rank",
}


def is_no_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out, of the machine or of a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def no_memory_line(error: BaseException, arguments: Sequence[str]) -> str:
    """Returns the line for the user; the step that was under way is the last note of the error (:mod:`regraft.cli.progress`).

    >>> no_memory_line(MemoryError("Unable to allocate 7.45 GiB for an array"), ["complete", "ratings.csv"])
    'the memory of this machine is not enough (7.45 GiB were asked for); take a smaller --rank'
    """
    command = arguments[0] if arguments else ""
    found = _ASKED.search(str(error))
    doing: list[str] = getattr(error, "__notes__", [])
    about = [f"at: {shown(doing[-1], 100)}"] if doing else []
    about += [f"{_readable(*found.groups())} were asked for"] if found else []
    where = "GPU" if type(error).__name__ == "OutOfMemoryError" else "machine"
    said = f" ({'; '.join(about)})" if about else ""
    return f"the memory of this {where} is not enough{said}; {_SMALLER.get(command, 'take a smaller input')}"


def _readable(count: str, unit: str) -> str:
    if unit.lower() != "bytes":
        return f"{count} {unit}"
    value = float(count.replace(",", ""))
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
