"""Scores of a model on tasks, and the comparison of two models on the same items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regraft.in_short import named
from regraft.plans.reports import LossReport


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Name of the task, or the file of its items.
        metric: ``acc`` (the choice of the highest likelihood), ``acc_norm`` (the same per character), ``exact_match``,
            ``repeated_4grams``, or what lm-evaluation-harness calls it.
        value: Mean over the items.
        stderr: Standard error of the mean; None where the harness gives none.
        items: Number of items.
        shots: Number of solved examples before each item.
        version: Version of the task.
        higher_is_better: Whether a larger value is better.
        outcomes: The value of every item, in order; empty where they are not known. Two models can be compared by them.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    items: int
    shots: int
    version: str
    higher_is_better: bool = True
    outcomes: tuple[float, ...] = ()


@dataclass(frozen=True, repr=False)
class TaskReport:
    """All scores of one model.

    Attributes:
        label: Name of the model.
        scores: Scores of the tasks, in the order asked for.
        losses: Losses on the texts, for each text at each window.
        parameters: Number of parameters of the model.
        versions: Versions of the libraries that decide the scores.
    """

    label: str
    scores: tuple[TaskScore, ...]
    losses: tuple[LossReport, ...]
    parameters: int
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    def __repr__(self) -> str:
        """Returns the label and the scores in one short line."""
        return named("TaskReport", {"label": self.label} | {f"{score.task} {score.metric}": score.value for score in self.scores})

    @property
    def worst(self) -> LossReport | None:
        """The text with the highest bits per byte, where several texts were measured."""
        several = len({loss.text for loss in self.losses}) > 1
        return max(self.losses, key=lambda loss: loss.bits_per_byte) if several else None


@dataclass(frozen=True)
class PairedScore:
    """Two models on the same items of one task.

    Attributes:
        task: Name of the task.
        metric: The metric.
        difference: Mean of the first model minus that of the second.
        low: Lower end of the 95 % interval of the difference, by a paired bootstrap.
        high: Its upper end.
        only_first: Number of items on which the first model has the higher value.
        only_second: Number of items on which the second model has it.
        p_value: Two-sided, that the two are equally good: exact McNemar (a sign test on the items that differ).
    """

    task: str
    metric: str
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float
