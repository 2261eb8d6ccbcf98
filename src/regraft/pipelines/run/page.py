"""The page of a run, with its results and samples in files beside it, from what the stages left in their folders."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regraft.errors import PlanError, shown
from regraft.evaluation.harness import flat
from regraft.models.provenance import versions
from regraft.pipelines.prune.summary import plan_summary
from regraft.pipelines.recover import LOSS_LOG
from regraft.pipelines.run.folder import plain_json
from regraft.pipelines.run.recipe import to_yaml
from regraft.pipelines.run.stages import RECOVERY, SAMPLE, Made, Measured, RunOrder
from regraft.plans import Groups, Measurement, PrunePlan, to_json
from regraft.reading import read_bytes, read_object, whole_number
from regraft.report.page import to_html, to_markdown
from regraft.report.summary import CurvePoint, RunReport, Width, won_back

REPORT = "report.json"


def write_page(order: RunOrder, groups: Groups, made: Made, measured: Measured) -> RunReport:
    """Writes results, samples and the page of a run.

    Args:
        order: The run.
        groups: Groups of the dense model.
        made: The models and decisions of the run.
        measured: What was measured of them.
    """
    sample, recovered = order.recipe.sample, made.folder("recovered")
    sampled = measured.folders if sample is not None else {}
    report = RunReport(
        title=order.name,
        description=order.recipe.description,
        recipe=to_yaml(order.recipe),
        measurements=tuple(measured.measurements),
        plan=made.plan,
        widths=_widths(groups, made.plan) if made.plan is not None else (),
        factors=made.factors,
        ranks=made.ranks,
        curve=read_curve(recovered) if recovered is not None else (),
        best_step=_read_best_step(recovered) if recovered is not None else None,
        prompt=sample.prompt if sample is not None else "",
        samples={label: (folder / SAMPLE).read_text(encoding="utf-8") for label, folder in sampled.items()},
        facts=_facts(order, made.folder(made.label)),
        tasks=tuple(measured.tasks),
    )
    order.folder.write("results.json", plain_json(_results(measured.measurements)))
    if report.samples:
        order.folder.write("samples.json", plain_json({"prompt": report.prompt, **report.samples}))
    order.folder.write(REPORT, to_json(report) + "\n")
    order.folder.write("report.md", to_markdown(report))
    order.folder.write("report.html", to_html(report))
    return report


def _facts(order: RunOrder, final: Path | None) -> dict[str, Any]:
    """Returns the provenance of the run for its page."""
    facts: dict[str, Any] = {
        "command": order.command,
        "model": f"{order.recipe.model} (fingerprint {order.fingerprint})",
        "seed": order.recipe.seed,
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    if final is not None:
        weights = {name: checksum for name, checksum in order.folder.checksums(final).items() if name.endswith(".safetensors")}
        facts |= {f"SHA-256 of {final.name}/{name}": checksum for name, checksum in weights.items()}
    return facts


def _widths(groups: Groups, plan: PrunePlan) -> tuple[Width, ...]:
    return tuple(Width(row["group"], row["before"], row["after"]) for row in plan_summary(groups, plan))


def read_curve(folder: Path) -> tuple[CurvePoint, ...]:
    """Returns the losses that a recovery logged in its folder.

    Raises:
        PlanError: The log is missing or damaged.
    """
    path = folder / LOSS_LOG
    try:
        rows = csv.DictReader(io.StringIO(read_bytes(path, PlanError).decode("utf-8")))
        numbers = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
        return tuple(CurvePoint(int(row["step"] or 0), row["train_loss_nats"], row["held_out_loss_nats"]) for row in numbers)
    except PlanError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        raise PlanError(f"'{path}' is damaged ({shown(error, 100)}); remove '{folder}' and run again with `resume`") from None


def _read_best_step(folder: Path) -> int:
    path = folder / RECOVERY
    return whole_number(read_object(path, PlanError).get("best_step"), f"'{path}': best_step", 0, 10**9, PlanError)


def _results(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Returns label to flat measurement; the entry of the recovered model also has cost and gain."""
    results = {entry.label: flat(entry) for entry in measurements}
    won = won_back(measurements)
    if won is not None:
        results["recovered"] |= asdict(won) | {"won_back_share": won.share}
    return results
