"""The contents of a run's report, and the figures computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.plans import LOSS_UNITS, FactorPlan, Measurement, PrunePlan, RankPlan, RankSearch, TaskReport, TaskScore


@dataclass(frozen=True)
class Width:
    """Numbers of units of one group before and after pruning.

    Attributes:
        group: Name of the group, such as ``layers.3.ffn``.
        before: Units of the dense model.
        after: Units of the pruned model.
    """

    group: str
    before: int
    after: int


@dataclass(frozen=True)
class CurvePoint:
    """Losses at one optimizer step, in nats a token; None for a loss that was not measured."""

    step: int
    train_nats: float | None
    held_out_nats: float | None


@dataclass(frozen=True)
class RunReport:
    """Contents of the page of a run.

    Attributes:
        title: Name of the run.
        description: One line for people, or empty.
        recipe: The recipe as YAML, with every key written out.
        measurements: Measurements of those of the dense, the pruned, the compressed and the recovered model that exist.
        plan: The prune plan; None when nothing was cut.
        widths: Numbers of units, one entry for each group of the plan.
        factors: The factored layers; None when none were.
        ranks: The rank search for recovery; None when the ranks were given.
        curve: The loss log of recovery; empty when there was none.
        best_step: The step that recovery kept; None when there was none.
        prompt: Prompt that the samples continue.
        samples: Label of a model to its sample.
        facts: Provenance of the run: command, seed, versions, checksums.
        tasks: Scores on tasks and further texts, one entry for each model; empty when none were asked for.
        rank_plan: Ranks that were trained, where no search is recorded.
        unit: Unit of the losses in the loss log.
    """

    title: str
    description: str
    recipe: str
    measurements: tuple[Measurement, ...]
    plan: PrunePlan | None = None
    widths: tuple[Width, ...] = ()
    factors: FactorPlan | None = None
    ranks: RankSearch | None = None
    curve: tuple[CurvePoint, ...] = ()
    best_step: int | None = None
    prompt: str = ""
    samples: Mapping[str, str] = field(default_factory=dict[str, str])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tasks: tuple[TaskReport, ...] = ()
    rank_plan: RankPlan | None = None
    unit: str = LOSS_UNITS["language"]


@dataclass(frozen=True)
class PastRun:
    """A measured model of a run, for the comparison of all runs in a folder.

    Attributes:
        run: Name of the run.
        label: Label of the model, such as ``recovered``.
        parameters: Its parameters.
        loss_nats: Its loss on a text, the same for all that are compared.
        current: Whether it is the final model of the run whose page this is.
    """

    run: str
    label: str
    parameters: int
    loss_nats: float
    current: bool = False


def front_of(past: Sequence[PastRun]) -> list[PastRun]:
    """Returns the models that no other beats in both size and loss, smallest first.

    >>> models = [PastRun("a", "x", 10, 3.0), PastRun("b", "x", 20, 3.5), PastRun("c", "x", 30, 2.0)]
    >>> [one.run for one in front_of(models)]
    ['a', 'c']
    """
    best: list[PastRun] = []
    for one in sorted(past, key=lambda one: (one.parameters, one.loss_nats)):
        if not best or one.loss_nats < best[-1].loss_nats:
            best.append(one)
    return best


@dataclass(frozen=True)
class WonBack:
    """The part of the loss increase of pruning, or of compression, that recovery undid.

    Attributes:
        cost_nats: Loss of the model before recovery minus that of the dense one, in nats a token.
        gain_nats: Loss of the model before recovery minus that of the recovered one, in nats a token.
        by: What made it smaller.
    """

    cost_nats: float
    gain_nats: float
    by: str = "pruning"

    @property
    def share(self) -> float | None:
        """Ratio of gain to cost; None when pruning cost nothing."""
        return self.gain_nats / self.cost_nats if self.cost_nats > 0 else None

    def sentence(self) -> str:
        """Returns cost and gain in words.

        >>> WonBack(0.81, 0.51).sentence()
        'recovery won back 63 % of the 0.81 nats that pruning cost'
        """
        cost, gain = _nats(self.cost_nats), _nats(self.gain_nats)
        if self.share is None:
            changed = "lowered" if self.gain_nats > 0 else "raised"
            return f"{self.by} cost nothing ({cost} nats better than dense); recovery {changed} the loss by {gain} nats"
        if self.gain_nats < 0:
            return f"recovery lost {gain} nats more, on top of the {cost} nats that {self.by} cost"
        return f"recovery won back {self.share * 100:.0f} % of the {cost} nats that {self.by} cost"


def _nats(value: float) -> str:
    """Returns the magnitude of a loss difference, with more digits for small ones."""
    return f"{abs(value):.2f}" if abs(value) >= 0.1 else f"{abs(value):.4f}"


def won_back(measurements: Sequence[Measurement]) -> WonBack | None:
    """Returns cost and gain of the model that was recovered, or None unless the dense, a smaller and the recovered model were measured."""
    loss = {measurement.label: measurement.loss.loss_nats for measurement in measurements}
    before = next((label for label in ("compressed", "pruned") if label in loss), None)
    if before is None or not {"dense", "recovered"} <= loss.keys():
        return None
    by = {"pruned": "pruning", "compressed": "pruning and compression" if "pruned" in loss else "compression"}[before]
    return WonBack(loss[before] - loss["dense"], loss[before] - loss["recovered"], by)


def table(measurements: Sequence[Measurement]) -> list[list[str]]:
    """Returns the table of the models: a heading, then one row for each figure, with a cell for each model.

    Below the number of parameters is its share of the first model's; speeds are shown only if they were measured.
    """
    rows = [
        ["", *(entry.label for entry in measurements)],
        ["loss, nats a token", *(f"{entry.loss.loss_nats:.3f}" for entry in measurements)],
        ["perplexity", *(f"{entry.loss.perplexity:,.2f}" for entry in measurements)],
        ["bits a byte", *(f"{entry.loss.bits_per_byte:.3f}" for entry in measurements)],
        ["parameters", *(f"{entry.size.parameters:,}" for entry in measurements)],
        ["  of the first", *(f"{entry.size.parameters / measurements[0].size.parameters:.1%}" for entry in measurements)],
        ["on disk", *(scaled(entry.size.bytes_on_disk, "B") for entry in measurements)],
        ["MACs a token", *(scaled(entry.size.macs_per_token, "") for entry in measurements)],
    ]
    speeds = [entry.speed for entry in measurements]
    if any(speeds):
        rows += [
            ["prefill", *(f"{speed.prefill_seconds * 1e3:,.1f} ms" if speed else "" for speed in speeds)],
            ["decode, a token", *(f"{speed.decode_seconds_per_token * 1e3:,.2f} ms" if speed else "" for speed in speeds)],
            ["peak memory", *(scaled(speed.peak_memory_bytes, "B") if speed else "" for speed in speeds)],
        ]
    return rows


def tasks_table(tasks: Sequence[TaskReport]) -> list[list[str]]:
    """Returns the table of tasks: a heading, then one row for each metric and text, with a cell for each model.

    A score has its standard error behind it, a loss is a perplexity. The last row is the mean of ``acc`` over the tasks that have it.
    """
    rows = [["", *(report.label for report in tasks)]]
    for index, score in enumerate(tasks[0].scores):
        shots = f", {score.shots} shots" if score.shots else ""
        name = f"{score.task}, {score.metric} ({score.items:,} items{shots}, version {score.version or 'unknown'})"
        rows.append([name, *(_score(report.scores[index]) for report in tasks)])
    means = [_mean_accuracy(report) for report in tasks]
    if all(mean is not None for mean in means):
        rows.append(["mean of acc", *(f"{mean:.4f}" for mean in means)])
    for index, loss in enumerate(tasks[0].losses):
        rows.append([f"{loss.text}, perplexity at window {loss.window_tokens}", *(f"{one.losses[index].perplexity:,.2f}" for one in tasks)])
    return rows


def _score(score: TaskScore) -> str:
    return f"{score.value:.4f}" if score.stderr is None else f"{score.value:.4f} ± {score.stderr:.4f}"


def _mean_accuracy(report: TaskReport) -> float | None:
    """Returns the mean accuracy over tasks, each once; None for less than two."""
    values = {score.task: score.value for score in report.scores if score.metric == "acc"}
    return sum(values.values()) / len(values) if len(values) > 1 else None


def caption(measurements: Sequence[Measurement]) -> str:
    """Returns the conditions of the losses: text, split, tokens, window, stride, BOS."""
    if not measurements:
        return "nothing was measured"
    loss, size = measurements[0].loss, measurements[0].size
    start = "each document starts with BOS" if loss.bos else "no BOS"
    return (
        f"{loss.tokens:,} tokens of {loss.text} ({loss.split}, {loss.documents:,} documents, {loss.bytes:,} bytes); "
        f"window {loss.window_tokens}, stride {loss.stride_tokens}, {start}; MACs at a context of {size.context_tokens}"
    )


def speed_note(measurements: Sequence[Measurement]) -> str:
    """Returns the conditions of the speeds, or an empty string without speeds."""
    speeds = [entry.speed for entry in measurements if entry.speed is not None]
    if not speeds:
        return ""
    speed = speeds[0]
    return (
        f"prefill of {speed.prompt_tokens} tokens, then {speed.decoded_tokens} tokens decoded one by one; medians of "
        f"{speed.repeats} on {speed.device}, {speed.threads} threads"
    )


def plan_lines(report: RunReport) -> list[str]:
    """Returns the cuts of the plan in words."""
    plan = report.plan
    if plan is None:
        return []
    return [
        f"{plan.achieved:.2%} of all parameters removed (asked for: {plan.ratio:.2%}): "
        f"{plan.parameters_before:,} to {plan.parameters_after:,}",
        f"criterion {plan.criterion}; selection {plan.selection}; shape {plan.shape}; widths aligned to {plan.align}",
    ]


def factor_lines(plan: FactorPlan) -> list[str]:
    """Returns a factor plan in words: its size, then the ranks of each kind of projection."""
    kinds: dict[str, list[int]] = {}
    for entry in plan.factorings:
        kinds.setdefault(entry.module.rpartition(".")[2], []).append(entry.rank)
    ranks = "; ".join(f"{kind} {', '.join(map(str, found))}" for kind, found in kinds.items())
    return [
        f"{plan.achieved:.2%} of all stored parameters removed (asked for: {plan.ratio:.2%}): "
        f"{plan.parameters_before:,} to {plan.parameters_after:,}",
        f"method {plan.method}; ranks by {plan.choice}; {plan.layout} layout; {len(plan.factorings)} layers factored",
        f"ranks from the first layer to the last: {ranks}",
        "a smaller file; faster only where measured",
    ]


def scaled(value: float, unit: str) -> str:
    """Returns a number with a decimal prefix.

    >>> scaled(8_388_608, "B"), scaled(512, ""), scaled(3.2e9, "")
    ('8.39 MB', '512', '3.2 G')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()
