"""Checks of a stock PEFT adapter's ``adapter_config.json`` before PEFT sees it: known kinds, no paths, patterns that end.

PEFT follows what a config says: kinds that start from a file read it as a pickle, and a pattern in ``target_modules`` is matched by a
matcher that can take longer than the universe is old. Neither reaches it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from regraft.errors import ModelError, shown
from regraft.platforms import OUT_OF_TIME
from regraft.reading import is_whole, read_object

FILE = "adapter_config.json"
# Kinds that change layers by what their own tensors say. Prompts, and mixtures of adapters in other folders, are none.
KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA", "HRA", "FOURIERFT", "RANDLORA", "LN_TUNING", "MISS", "SHIRA")
LARGEST_ID = 2**31 - 1
LARGEST_NUMBER = 2.0**64  # seeds are the largest
PATTERN_SECONDS = 1.0  # of processor time; names and patterns of real adapters take milliseconds
_WAIT_SECONDS = 10.0  # where other work takes the processor
_SPECIAL = frozenset("*+{?()[]|\\^$")
_MATCH = """
import json, re, signal, sys
patterns, names, seconds = json.load(sys.stdin)
if seconds:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, also within a match
for pattern in patterns:
    compiled = re.compile(pattern)
    for name in names:
        compiled.fullmatch(name)
        compiled.match(name)
"""


def read_stock_config(folder: Path) -> dict[str, Any]:
    """Returns the config of a stock adapter, of a kind that is read and without a path to anything but its base.

    Raises:
        ModelError: It is missing, damaged, or of another kind.
    """
    path = folder / FILE
    config = read_object(path, ModelError)
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise ModelError(f"'{path}' is of kind {shown(repr(kind), 60)}, which is not read; known: {', '.join(KINDS)}")
    for key, value in _entries(config):
        if key.endswith(("_path", "_file", "_dir", "state_dict")) and key != "base_model_name_or_path" and value not in (None, ""):
            raise ModelError(f"'{path}': {shown(key)} leads to another file ({shown(repr(value), 60)}); remove that entry")
        if isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:
            raise ModelError(f"'{path}': {shown(key)} {shown(value, 40)} is no number that an adapter has; copy it again")
    invoked = config.get("alora_invocation_tokens")
    if invoked is not None and not (isinstance(invoked, list) and invoked and all(is_whole(token, 0, LARGEST_ID) for token in invoked)):
        raise ModelError(
            f"'{path}': alora_invocation_tokens {shown(repr(invoked), 60)} is no list of token ids; copy it again, or remove it"
        )
    return config


def check_patterns(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuses a config whose patterns cannot be matched with the names of a base in a few seconds.

    Raises:
        ModelError: One takes too long, or is no pattern.
    """
    patterns = [value for key in ("target_modules", "exclude_modules") if isinstance(value := config.get(key), str)]
    for key in ("rank_pattern", "alpha_pattern"):
        entries = config.get(key)
        patterns += [rf"(.*\\.)?({name})" for name in entries] if isinstance(entries, Mapping) else []
    problem = problem_of(tuple(pattern for pattern in patterns if pattern != "all-linear"), tuple(names))
    if problem:
        raise ModelError(f"'{folder / FILE}': {problem}; name the modules in a list")


@lru_cache(maxsize=64)
def problem_of(patterns: tuple[str, ...], names: tuple[str, ...]) -> str:
    """Returns what is wrong with regular expressions, in words: no expression, or one that takes too long; nothing if all is well.

    They are tried in a process of their own, which ends when the time is up, as a match that goes back and back cannot be interrupted.

    Args:
        patterns: The expressions.
        names: Names of modules to match them with.
    """
    hard = [pattern for pattern in patterns if _SPECIAL.intersection(pattern)]
    if not hard:
        return ""
    try:
        code = subprocess.run(
            [sys.executable, "-I", "-c", _MATCH],
            input=json.dumps([hard, list(names), PATTERN_SECONDS if OUT_OF_TIME is not None else 0]),
            text=True,
            capture_output=True,
            timeout=_WAIT_SECONDS,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        code = None
    if code is None or code == OUT_OF_TIME:
        return f"the pattern '{shown(hard[0], 80)}' takes more than {PATTERN_SECONDS:g} s to match"
    return f"'{shown(hard[0], 80)}' is no pattern" if code else ""


def _entries(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yields every entry of a config and of the objects in it, and each entry of a list under the list's name."""
    for key, value in config.items():
        yield from ((key, one) for one in (value if isinstance(value, list) else [value]))
        if isinstance(value, Mapping):
            yield from _entries(value)
