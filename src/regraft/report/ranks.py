"""The report of a rank search, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from regraft.errors import in_markdown
from regraft.plans import Confirmation, RankSearch, RankTrial

_FEATURES = ("share_pruned", "importance_removed")


def to_markdown(search: RankSearch) -> str:
    """Returns the chosen ranks, the measurements and their confirmation, as Markdown."""
    lines = [f"# Ranks by {in_markdown(search.plan.method)}", "", f"**{in_markdown(search.verdict)}**", ""]
    lines += [*summary(search), ""]
    lines += ["## Ranks", "", *_table(*slots_table(search)), ""]
    if search.trials:
        lines += ["## What was measured", "", *_table(*_trials(search)), ""]
    if search.refits:
        lines += ["## The performance model at every refit", "", *_table(*_refits(search)), ""]
    if search.confirmation is not None and search.confirming:
        lines += ["## Confirmation", "", *_table(*_pairs(search, search.confirmation)), ""]
    return "\n".join(lines)


def summary(search: RankSearch) -> Iterator[str]:
    """Yields the figures of a search, one line each."""
    space, plan = search.space, search.plan
    yield (
        f"- trainable parameters: {plan.trainable_parameters:,} of {space.budget:,} allowed "
        f"(rank {space.uniform} everywhere: {space.uniform * sum(slot.parameters_per_rank for slot in space.slots):,})"
    )
    if search.trials:
        failed = sum(trial.loss_nats is None for trial in search.trials)
        yield f"- measured: {len(search.trials)} times, {failed} of them failed; cost {search.search_cost:.2f} full recoveries"
    if search.error is not None:
        error = search.error
        yield (
            f"- performance model, cross-validated on {error.trials} trials in {error.folds} parts: R² {error.r2:.2f}, "
            f"RMSE {error.rmse_nats:.4f} nats, rank correlation {error.rank_correlation:.2f}"
        )
    elif search.trials:
        yield "- performance model: too few trials to cross-validate it"
    if search.agreement is not None:
        yield f"- elastic scores rank the recovered vectors with a correlation of {search.agreement:+.2f}"
    if search.confirming:
        yield f"- confirmed by {len(search.confirming)} recoveries on fresh seeds; cost {search.confirming_cost:.2f} full recoveries"


def trials_csv(search: RankSearch) -> str:
    """Returns every measurement of the search and of its confirmation as CSV, one a line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["phase", "origin", "kind", "fidelity", "seed", "loss_nats", "cost", "note", *(slot.name for slot in search.space.slots)]
    )
    for trial, origin in zip(search.trials, search.origins, strict=True):
        writer.writerow(["search", origin, *_cells(trial)])
    uniform = search.space.uniform_ranks
    for trial in search.confirming:
        writer.writerow(["confirm", "uniform" if trial.ranks == uniform else "finalist", *_cells(trial)])
    return stream.getvalue()


def _cells(trial: RankTrial) -> list[object]:
    loss = "" if trial.loss_nats is None else repr(trial.loss_nats)
    return [trial.kind, trial.fidelity, trial.seed, loss, trial.cost, trial.note, *trial.ranks]


def slots_table(search: RankSearch) -> tuple[list[str], list[list[str]]]:
    """Returns heading and rows of a table of slots: rank in the plan, rank found by the search, and damage by pruning."""
    slots = search.space.slots
    known = [name for name in _FEATURES if name in slots[0].features]
    rows = [
        [slot.name, str(search.plan.ranks[slot.modules[0]]), str(found), *(f"{slot.features[name]:.4g}" for name in known)]
        for slot, found in zip(slots, search.found, strict=True)
    ]
    return ["", "rank", "found", *(name.replace("_", " ") for name in known)], rows


def _trials(search: RankSearch) -> tuple[list[str], list[list[str]]]:
    base = {
        (trial.kind, trial.fidelity, trial.seed): trial.loss_nats for trial in search.trials if trial.ranks == search.space.uniform_ranks
    }
    rows: list[list[str]] = []
    for trial, origin in zip(search.trials, search.origins, strict=True):
        uniform = base.get((trial.kind, trial.fidelity, trial.seed))
        gain = "" if uniform is None or trial.loss_nats is None else f"{uniform - trial.loss_nats:+.5f}"
        loss = trial.note if trial.loss_nats is None else f"{trial.loss_nats:.5f}"
        share = "elastic" if trial.kind == "elastic" else f"{trial.fidelity:.1%}"
        rows.append([origin, _spaced(trial.ranks), share, loss, gain, f"{trial.cost:.3f}"])
    return ["origin", "ranks", "steps", "held-out loss, nats", "gain over uniform", "cost"], rows


def _refits(search: RankSearch) -> tuple[list[str], list[list[str]]]:
    rows = [[str(error.trials), f"{error.r2:+.2f}", f"{error.rmse_nats:.5f}", f"{error.rank_correlation:+.2f}"] for error in search.refits]
    return ["recoveries", "R², cross-validated", "RMSE, nats", "rank correlation"], rows


def _pairs(search: RankSearch, confirmation: Confirmation) -> tuple[list[str], list[list[str]]]:
    losses = {(trial.seed, trial.ranks): trial.loss_nats for trial in search.confirming}
    uniform = search.space.uniform_ranks
    finalists = [finalist.ranks for finalist in confirmation.finalists]
    rows: list[list[str]] = []
    for number, seed in enumerate(dict.fromkeys(trial.seed for trial in search.confirming), start=1):
        base = losses.get((seed, uniform))
        cells = ["failed" if base is None else f"{base:.5f}"]
        for ranks in finalists:
            loss = losses.get((seed, ranks))
            cells += ["failed", ""] if loss is None else [f"{loss:.5f}", "" if base is None else f"{base - loss:+.5f}"]
        rows.append([str(number), *cells])
    return ["seed", "uniform, nats", *(cell for ranks in finalists for cell in (f"{_spaced(ranks)}, nats", "gain"))], rows


def _spaced(ranks: Sequence[int]) -> str:
    return " ".join(map(str, ranks))


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(in_markdown, heading))} |", "|" + "---|" * len(heading)]
    return [*lines, *(f"| {' | '.join(map(in_markdown, row))} |" for row in rows)]
