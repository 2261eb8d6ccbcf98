"""What becomes of every causal language model that transformers knows: heads and channels are cut and compared, or refused in one line.

    python benchmarks/all_families.py [MODEL_TYPE ...]

Without names, families that have no row yet are measured and their rows kept, so that an interrupted run goes on.

A small random model of each family is made as `regraft` itself makes one to look at it (`models/small_model.py`), in a process of its own.
One unit of the heads and a third of the channels go from every layer that has them; beside it, the removed units are set to zero in what
reads them and, where a norm runs over all heads, in what writes them. Logits may differ by 1e-5 of the largest. Then text is generated with and
without cache. A family of which no small model can be built is refused with what stands in the way. Faults are rows that begin with
WRONG, TRACEBACK or HANGS; the program ends with their number.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from common import RESULTS, add_row, machine, read_rows, table, versions
from regraft.errors import RegraftError
from regraft.groups.discover import look_for
from regraft.models.family import family_of
from regraft.models.small_model import small_model
from regraft.plans import Cut, PrunePlan
from regraft.surgery.cut import cut

KINDS = ("heads", "ffn")
HEAD = ("model type", "heads", "FFN channels", "processor time, s")
FILE = RESULTS / "all_families.csv"
LIMIT_SECONDS = 300
TOLERANCE = 1e-5


def found_of(model_type: str) -> tuple[str, str]:
    """Returns what becomes of heads and of channels."""
    try:
        family_of(model_type)
        config = CONFIG_MAPPING[model_type]
        known = frozenset({*config().to_dict(), *config.attribute_map})
        sizes = (32, None, 16) if "head_dim" in known else (None,)
        small = next((made for size in sizes if (made := small_model(model_type, known, size))), None)
        if small is None:
            return "known by a table; no small model", ""
        found = look_for(small.model, KINDS)
    except RegraftError as error:
        why = str(error).partition("; known by")[0].partition("; choose another")[0].partition("; prune a model")[0]
        return f"refused: {why}", ""
    return tuple(cut_of(small.model, found, kind) for kind in KINDS)  # pyright: ignore[reportReturnType]


def cut_of(model: Any, found: Any, kind: str) -> str:
    """Returns ``yes`` with the number of layers, or what is in the way, or what went wrong."""
    here = [group for group in found.groups.groups if group.kind == kind]
    if not here:
        reasons = dict.fromkeys(refusal.reason for refusal in found.refusals if refusal.kind == kind)
        return f"no: {'; '.join(reasons)}" if reasons else "none"
    units = min(group.units for group in here)
    if units == 1:
        return "no: all query heads share one key-value head"
    lost = 1 if kind == "heads" else units // 3
    cuts = tuple(Cut(group.name, tuple(range(lost, group.units))) for group in here)
    groups = found.groups
    plan = PrunePlan(groups.fingerprint, "planted", "planted", "uniform", 0.1, 1, groups.parameters, groups.parameters, cuts)
    try:
        pruned: Any = cut(model, groups, plan)
    except RegraftError as error:
        return f"refused: {error}"
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense, got = (each(ids, use_cache=False).logits for each in (model, pruned))
        for member, gone in [(member, range(lost)) for group in here for member in group.members]:
            over_all = kind == "heads" and any("q_norm" in entry.parameter for entry in here[0].members)
            if member.side == "in" or over_all:
                indices = torch.tensor([index for unit in gone for index in member.indices(unit)])
                model.get_parameter(member.parameter).index_fill_(member.axis, indices, 0.0)
        want = model(ids, use_cache=False).logits
    error, effect = float((got - want).abs().max()), float((want - dense).abs().max())
    if error > TOLERANCE * max(1.0, float(want.abs().max())) or effect < 1e-4:
        return f"WRONG: differs by {error:.1e} from zeros, which have an effect of {effect:.1e}"
    # The models of both kinds share what is not cut; what is compared next is the pruned one alone.
    return f"yes, {len(here)} layers" + generated(pruned, ids[:1, :5])


def generated(model: Any, ids: Any) -> str:
    """Returns what is wrong with generation by cache; nothing if it gives the same text as without, or the family has no cache."""
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        plain = model.generate(ids, use_cache=False, **settings)
        cached = model.generate(ids, use_cache=True, **settings)
    except Exception as error:  # whatever the family's own code raises
        return f"; generate: {type(error).__name__}"
    return "" if torch.equal(plain, cached) else "; WRONG: another text with cache"


def alone(model_type: str) -> list[str]:
    """Returns the row of a family, found in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_SECONDS)
        before = time.process_time()
        try:
            found = found_of(model_type)
        except Exception as error:  # a fault of ours
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = (f"TRACEBACK: {type(error).__name__} in {where.name}: {error}"[:200], "")
        os.write(writing, json.dumps([*found, f"{time.process_time() - before:.1f}"]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return [model_type, *(json.loads(text) if text else [f"HANGS: no answer in {LIMIT_SECONDS} s", "", ""])]


def main() -> int:
    """Measures all families that have no row yet, or those that are named, and draws the table; returns the number of faults."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    every = sorted(kind for kind in CONFIG_MAPPING if CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING)
    named, done = sys.argv[1:], {row[HEAD[0]] for row in read_rows(FILE)}
    rows: list[list[str]] = []
    for model_type in named or [kind for kind in every if kind not in done]:
        rows.append(alone(model_type))
        print(*rows[-1], sep=" | ", flush=True)
        if not named:
            add_row(FILE, dict(zip(HEAD, rows[-1], strict=True)))
    if not named:
        rows = sorted([row[column] for column in HEAD] for row in read_rows(FILE))
        draw(rows, len(every))
    return faults_in(rows)


def faults_in(rows: Sequence[Sequence[str]]) -> int:
    return sum(any(word in cell for word in ("WRONG", "TRACEBACK", "HANGS")) for row in rows for cell in row)


def draw(rows: Sequence[Sequence[str]], families: int) -> None:
    """Draws the table of all rows."""
    cut = sum(any(cell.startswith("yes") for cell in row) for row in rows)
    lines = ["# Every causal language model of transformers", "", "Written by `benchmarks/all_families.py`; do not edit by hand.", ""]
    lines += [f"{machine()}; {versions('torch', 'transformers')}; processor time, one thread, without the imports.", ""]
    counts = f"heads or channels of {cut} are cut, {len(rows) - cut} are refused or have no small model, {faults_in(rows)} faults"
    lines += [f"{len(rows)} of {families} model types: {counts}.", "", *table(HEAD, rows)]
    FILE.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
