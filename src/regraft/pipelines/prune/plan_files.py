"""Files of plans, written by ``--plan-only`` and replayed by ``--plan``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.atomic import atomic_folder, reserved, reserved_file, write_text
from regraft.errors import ConfigError, InputError, PlanError, shown
from regraft.plans import Provenance, PrunePlan, from_json, to_json
from regraft.reading import is_file, is_folder, object_in, parse_json, path_of, read_bytes
from regraft.settings import PruneSettings, checked

FILE = "plan.json"
# Settings that may be given together with a plan: the way of the replay, and the present location of the plan's text.
BESIDE = ("memory", "cache", "calibration")
_MADE_WITH = {"settings", "seed", "windows_sha256"}


def plan_path(output: Path) -> Path:
    """Returns the file for a plan: the output itself if it ends in ``.json``, else ``plan.json`` in that folder."""
    return output if output.suffix == ".json" else output / FILE


@contextmanager
def reserved_plan(output: Path | None) -> Iterator[None]:
    """Reserves a plan's output before the plan is made.

    Raises:
        OutputError: The output exists and is not an empty folder, cannot be written, or another process is writing it.
    """
    path = plan_path(output) if output is not None else None
    if path == output:
        with reserved_file(path):
            yield
    else:
        with reserved(output):
            yield


def write_plan(plan: PrunePlan, output: Path) -> Path:
    """Writes a plan, completely or not at all, and returns its file.

    Raises:
        OutputError: The file exists or cannot be written.
    """
    path = plan_path(output)
    text = to_json(plan) + "\n"
    with reserved_plan(output):
        if path == output:
            write_text(path, text)
        else:
            with atomic_folder(output) as partial:
                (partial / FILE).write_text(text, encoding="utf-8")
    return path


def read_plan(path: Path) -> PrunePlan:
    """Reads a plan from its file, from the folder that holds it, or from the record of a pruned model (``regraft.json``).

    Raises:
        PlanError: The file does not exist or holds no plan.
    """
    path = path_of(path, "plan")
    found = next((path / name for name in (FILE, "regraft.json") if is_file(path / name)), path) if is_folder(path) else path
    try:
        text = read_bytes(found, PlanError)
    except PlanError as error:
        raise PlanError(f"no plan can be read from '{shown(found)}': {error}; write one with `plan_only`") from None
    try:
        if _is_record(text):
            return _plan_of(from_json(Provenance, text), found)
        return from_json(PrunePlan, text)
    except PlanError as error:
        raise PlanError(f"'{found}': {error}") from None


def _is_record(text: bytes) -> bool:
    try:
        value: Any = parse_json(text, "the plan", PlanError)
    except PlanError:
        return False
    return "source_fingerprint" in object_in(value)


def _plan_of(record: Provenance, path: Path) -> PrunePlan:
    if record.plan is None:
        raise PlanError(f"'{path}' is the record of a model that was not pruned; give the record of a pruned model, or a plan")
    return record.plan


def settings_of(plan: PrunePlan, given: PruneSettings) -> tuple[PruneSettings, int | None]:
    """Returns the settings and the seed for replaying a plan: those stored in it, or the given ones if it has none.

    Args:
        plan: The plan to replay.
        given: The user's settings; memory, cache and calibration replace the plan's.

    Raises:
        InputError: Another given setting contradicts the plan.
    """
    if not plan.made_with:
        return given, None
    try:
        unknown = sorted(set(plan.made_with) - _MADE_WITH)
        if unknown:
            raise ValueError(f"'{shown(unknown[0], 40)}' is none of its keys")
        own = checked(PruneSettings, plan.made_with["settings"], "the plan's made_with")
        seed = int(plan.made_with["seed"])
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise PlanError(f"the plan's made_with cannot be read ({error}); remove it from the file, and give the settings again") from None
    defaults = PruneSettings()
    values = own.model_dump()
    for name in PruneSettings.model_fields:
        wanted, default = getattr(given, name), getattr(defaults, name)
        if name in BESIDE:
            values[name] = wanted if wanted is not None else values[name]
        elif wanted not in (default, values[name]):
            raise InputError(
                f"`{name}={wanted}` does nothing beside `plan`, which was made with {values[name]}; leave it out, or plan anew"
            )
    return PruneSettings.model_validate(values), seed
