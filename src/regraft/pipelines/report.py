"""Pages of what lies in a folder: of a run, of a model or an adapter that a command wrote, of a search for ranks; and the list of runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regraft.atomic import write_text
from regraft.claims import holder, lock_file, remove
from regraft.errors import DataError, InputError, OutputError, PlanError, RegraftError, did_you_mean, shown
from regraft.models.provenance import read_provenance
from regraft.pipelines.finished_recovery import LOSS_LOG
from regraft.pipelines.ranks.files import SEARCH
from regraft.pipelines.run.folder import LOCK, RUN_FILE, TIMINGS
from regraft.pipelines.run.page import REPORT, read_curve
from regraft.plans import LOSS_UNITS, LossReport, PrunePlan, RankSearch, from_json
from regraft.reading import is_file, is_folder, object_in, read_bytes, read_object
from regraft.report.page import to_html
from regraft.report.summary import PastRun, RunReport, Width

PAGE = "report.html"


@dataclass(frozen=True)
class Listed:
    """A run in a folder of runs.

    Attributes:
        name: Name of its folder.
        path: The folder.
        report: Its report; None for a run that is not finished, or was finished by a version without this record.
    """

    name: str
    path: Path
    report: RunReport | None


def write_page(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a folder.

    Args:
        folder: A run, a folder that ``prune``, ``recover`` or ``compress`` wrote, or the ``.search`` folder of ``allocate``.
        output: The HTML file; None for ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        InputError: The folder is none of these.
        OutputError: The page cannot be written.
    """
    folder = Path(folder)
    page = page_of(folder)
    file = Path(output) if output is not None else folder / PAGE
    if is_folder(file):
        raise OutputError(f"'{shown(file)}' is a folder; name an HTML file with `output`")
    write_text(file, page)
    return file


def page_of(folder: Path) -> str:
    """Returns the page of a folder as HTML; see :func:`report_of` for what is refused."""
    return to_html(report_of(folder), past_of(folder))


def report_of(folder: Path) -> RunReport:
    """Returns the contents of the page of a folder.

    Raises:
        InputError: It is no run, and nothing that a command of regraft wrote.
        PlanError: Its record cannot be read.
    """
    if is_file(folder / REPORT):
        return _read(folder / REPORT)
    if is_file(folder / SEARCH):
        search = from_json(RankSearch, read_bytes(folder / SEARCH, PlanError))
        return RunReport(f"ranks for {folder.stem}", "", "", (), ranks=search, facts={"fingerprint of the model": search.plan.fingerprint})
    if is_file(folder / RUN_FILE) and _is_search(folder):
        raise InputError(f"the search '{shown(folder)}' is not finished; go on with it by `regraft allocate` and `resume`")
    if is_file(folder / RUN_FILE):
        raise InputError(f"the run '{shown(folder)}' is not finished; go on with it by `regraft run` and `resume`, which writes its page")
    try:
        made = read_provenance(folder) if is_folder(folder) else None
    except RegraftError as error:
        raise InputError(f"'{shown(folder)}' cannot be reported: {error}") from None
    if made is None:
        what = "is no run" if is_folder(folder) else "does not exist or is no folder"
        raise InputError(f"'{shown(folder)}' {what}; give a folder that `regraft run`, prune, recover, compress or allocate wrote")
    facts = {"command": made.command, "model": f"{made.source} (fingerprint {made.source_fingerprint})", "seed": made.seed}
    if made.parents:
        facts["made earlier by"] = str(made.parents[-1].get("command", "unknown"))
    facts |= {"versions": ", ".join(f"{name} {number}" for name, number in made.versions.items())}
    facts |= {f"SHA-256 of {name}": checksum for name, checksum in made.files.items()}
    plan = made.plan or _plan_of_parents(made.parents)
    widths = widths_of(plan) if plan is not None else ()
    report = RunReport(folder.resolve().name, "", "", (), plan=plan, widths=widths, factors=made.factors, rank_plan=made.ranks, facts=facts)
    return _with_curve(report, folder, made.settings.get("recover"))


def _with_curve(report: RunReport, folder: Path, recovery: object) -> RunReport:
    """Returns a report with the losses of the recovery that a folder is from, and the step of the lowest held-out loss, which was kept."""
    if recovery is None or not is_file(folder / LOSS_LOG):
        return report
    curve = read_curve(folder)
    held = [(point.held_out_nats, point.step) for point in curve if point.held_out_nats is not None]
    unit = LOSS_UNITS.get(str(object_in(recovery).get("task")), report.unit)
    return replace(report, curve=curve, best_step=min(held)[1] if held else None, unit=unit)


def widths_of(plan: PrunePlan) -> tuple[Width, ...]:
    """Returns the numbers of units before and after, of the groups of which a plan has a record."""
    kept = {cut.group: len(cut.kept) for cut in plan.cuts}
    return tuple(Width(group, entry.units, kept.get(group, entry.units)) for group, entry in plan.removed.items())


def past_of(folder: Path) -> tuple[PastRun, ...]:
    """Returns the measured models of all runs beside a run, on the same text in the same way; the final one of the run is marked."""
    if not is_file(folder / REPORT):
        return ()
    own = _read(folder / REPORT)
    if not own.measurements:
        return ()
    same = _conditions(own.measurements[-1].loss)
    found: list[PastRun] = []
    for run in list_runs(folder.resolve().parent):
        measured = run.report.measurements if run.report is not None else ()
        for entry in measured:
            if _conditions(entry.loss) == same:
                current = run.path.resolve() == folder.resolve() and entry.label == own.measurements[-1].label
                found.append(PastRun(run.name, entry.label, entry.size.parameters, entry.loss.loss_nats, current))
    return tuple(found)


def list_runs(folder: Path) -> list[Listed]:
    """Returns the runs in a folder, by name; searches for ranks, which lie beside their plans, are none.

    Raises:
        InputError: The folder does not exist.
    """
    if not is_folder(folder):
        raise InputError(f"'{shown(folder)}' is no folder; give the folder that holds the runs, such as runs")
    runs: list[Listed] = []
    for path in sorted(folder.iterdir()):
        if is_file(path / RUN_FILE) and not _is_search(path):
            try:
                report = _read(path / REPORT) if is_file(path / REPORT) else None
            except RegraftError:
                report = None
            runs.append(Listed(path.name, path, report))
    return runs


def without_page(folder: Path) -> list[Path]:
    """Returns what lies in a folder and has a page as a rule, but none now: its command was killed at the very end, or was to write none.

    These are finished runs, folders that ``prune``, ``recover`` or ``compress`` wrote, and finished searches of ``allocate``.
    """
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if not is_folder(path) or is_file(path / PAGE):
            continue
        is_run = is_file(path / REPORT) or (path.suffix == ".search" and is_file(path / SEARCH))
        if is_run or (not is_file(path / RUN_FILE) and _made_by(path) in ("prune", "recover", "compress")):
            found.append(path)
    return found


def _made_by(folder: Path) -> str:
    """Returns the command of regraft that wrote a folder; an empty text for any other folder."""
    try:
        made = read_provenance(folder)
    except RegraftError:
        return ""
    words = made.command.split() if made is not None else []
    return words[1] if len(words) > 1 and words[0] == "regraft" else ""


def run_named(folder: Path, name: str) -> Listed:
    """Returns the run of a name in a folder.

    Raises:
        InputError: There is none; the message has the nearest.
    """
    runs = {run.name: run for run in list_runs(folder)}
    if name not in runs:
        hint = did_you_mean(name, runs) or "; list them by `regraft runs`"
        raise InputError(f"there is no run '{shown(name)}' in '{shown(folder)}'{hint}")
    return runs[name]


def figures_of(run: Listed, *, every_model: bool = False) -> list[dict[str, Any]]:
    """Returns a line of figures for the final model of a run, or for each of its models, as plain JSON types."""
    if run.report is None or not run.report.measurements:
        empty = dict.fromkeys(("parameters", "loss_nats", "change_nats", "text"))
        return [{"run": run.name, "model": "not finished" if run.report is None else "not measured", **empty}]
    measured = run.report.measurements
    return [
        {
            "run": run.name,
            "model": entry.label,
            "parameters": entry.size.parameters,
            "loss_nats": entry.loss.loss_nats,
            "change_nats": entry.loss.loss_nats - measured[0].loss.loss_nats,
            "text": entry.loss.text,
        }
        for entry in (measured if every_model else measured[-1:])
    ]


def progress_of(run: Listed) -> dict[str, Any]:
    """Returns whether a run is finished, the seconds of its finished stages, and the process that works in it, or None."""
    try:
        found = read_object(run.path / TIMINGS, DataError) if is_file(run.path / TIMINGS) else {}
    except RegraftError:
        found = {}
    stages = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return {"finished": run.report is not None, "stages": stages, "works": holder(run.path / LOCK)}


def remove_run(run: Listed) -> None:
    """Removes the folder of a run.

    Raises:
        OutputError: Another process works in it, or it is a link.
    """
    if run.path.is_symlink():
        raise OutputError(f"'{shown(run.path)}' is a link; remove it yourself")
    with lock_file(run.path / LOCK, run.path):
        for entry in run.path.iterdir():
            if entry.name != LOCK:
                remove(entry)
    run.path.rmdir()


def _is_search(folder: Path) -> bool:
    """Returns whether a folder with stages is a search of ``allocate``, finished or not."""
    try:
        return "allocate" in read_object(folder / RUN_FILE, DataError)
    except RegraftError:
        return False


def _read(file: Path) -> RunReport:
    try:
        return from_json(RunReport, read_bytes(file, DataError))
    except PlanError:
        raise PlanError(f"'{shown(file)}' is no report of this version; run again with `resume`, which writes it anew") from None


def _plan_of_parents(parents: tuple[Mapping[str, object], ...]) -> PrunePlan | None:
    """Returns the newest prune plan among the records of earlier folders."""
    for parent in reversed(parents):
        if parent.get("plan") is not None:
            return from_json(PrunePlan, json.dumps(parent["plan"]))
    return None


def _conditions(loss: LossReport) -> tuple[object, ...]:
    """Returns what two losses must share to be compared: the bytes predicted, so that other tokenizers count too, and how they are read."""
    return (loss.text, loss.split, loss.bytes, loss.documents, loss.window_tokens)
