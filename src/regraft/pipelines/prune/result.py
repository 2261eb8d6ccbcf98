"""The result of pruning: the plan, the pruned model, its sizes, and how it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.errors import InputError
from regraft.in_short import in_short
from regraft.models.load import Loaded
from regraft.models.save import save
from regraft.pipelines.prune.record import card_of
from regraft.pipelines.prune.resolved import ResolvedPrune
from regraft.pipelines.prune.summary import collapsed, plan_summary, why_kept
from regraft.pipelines.results import Saving
from regraft.plans import Groups, Provenance, PrunePlan


@dataclass(frozen=True, repr=False)
class PruneReport:
    """The sizes of a model before and after a plan.

    Attributes:
        parameters_before: Number of parameters of the unpruned model.
        parameters_after: Number of parameters of the pruned model.
        rows: One for each group: its name, kind, units before and units after.
        kept: Why kinds of units that could be cut are not, a line each.
        notes: Remarks for the user, a line each.
        model_class: Class of the pruned model; empty where there is none in memory.
    """

    parameters_before: int
    parameters_after: int
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    kept: tuple[str, ...] = ()
    model_class: str = ""

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)

    def __str__(self) -> str:
        """Returns the sizes before and after, layers that are alike in one line, and the notes."""
        removed = 1.0 - self.parameters_after / self.parameters_before
        lines = [f"parameters {self.parameters_before:,} -> {self.parameters_after:,}: {removed:.2%} removed"]
        lines += [f"{names}: {before} -> {after} units" for names, before, after in collapsed(self.rows)]
        if self.model_class.startswith("Regraft"):
            lines.append(
                f"class {self.model_class}, which no stock class holds: it loads after `import regraft` or with trust_remote_code=True"
            )
        elif self.model_class:
            lines.append(f"class {self.model_class}, a stock class")
        return "\n".join([*lines, *self.kept, *self.notes])


@dataclass(frozen=True, repr=False)
class PruneResult(Saving):
    """Result of pruning.

    Attributes:
        plan: The units to keep.
        model: The pruned model; None after a dry run, and with ``memory``, which keeps it on disk.
        loaded: The unpruned model with its tokenizer and source; with ``memory``, without its weights.
        groups: Groups of the unpruned model that could be cut.
        resolved: The settings, with a value in place of every "auto".
        notes: Remarks for the user, a line each.
        provenance: How the pruned model came to be, without the checksums of files.
        smaller_tokenizer: The tokenizer of a smaller vocabulary; None where pruning leaves the tokenizer as it is.
    """

    plan: PrunePlan
    model: PreTrainedModel | None
    loaded: Loaded
    groups: Groups
    resolved: ResolvedPrune
    notes: tuple[str, ...]
    provenance: Provenance
    smaller_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, which pruning leaves as it is unless it cuts the vocabulary."""
        return self.smaller_tokenizer or self.loaded.tokenizer

    @property
    def report(self) -> PruneReport:
        """The sizes before and after."""
        rows = tuple(plan_summary(self.groups, self.plan))
        kind = "" if self.model is None else type(self.model).__name__
        before, after = self.plan.parameters_before, self.plan.parameters_after
        return PruneReport(before, after, rows, self.notes, why_kept(self.groups, self.plan), kind)

    def __repr__(self) -> str:
        """Returns the parameters and what holds the model, in one line."""
        plan, kind = self.plan, type(self.model).__name__ if self.model is not None else "no model in memory"
        return f"PruneResult({plan.parameters_before:,} -> {plan.parameters_after:,} parameters, {kind})"

    def save_pretrained(self, folder: str | Path, *, replace: bool = False) -> Provenance:
        """Saves the pruned model with its tokenizer, its plan, its card and how it came to be.

        Args:
            folder: A new or empty folder.
            replace: Whether a folder that we wrote is replaced.

        Returns:
            The record as it was written.

        Raises:
            InputError: There is no model in memory.
            OutputError: The folder exists or cannot be written.
        """
        if self.model is None:
            raise InputError(
                "there is no pruned model in memory, so that nothing can be saved; prune without `dry_run` and without `memory`"
            )
        return save(self.model, self.tokenizer, folder, self.provenance, card_of(self.provenance), replace=replace)
