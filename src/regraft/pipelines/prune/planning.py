"""Plan from resolved settings, whether the model is in memory or streamed: windows of text, scores, curves, the choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from regraft.data.text import Corpus
from regraft.data.tokens import calibration_windows, window_tokens
from regraft.errors import InputError, PlanError
from regraft.importance import CRITERIA, Evidence, score
from regraft.importance.passes import Passes, WholeModel
from regraft.importance.two_sided import readers
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.view import ModelView
from regraft.pipelines.prune.at_once import Making, better_at_once, better_with_tokens
from regraft.pipelines.prune.effort import EFFORTS
from regraft.pipelines.prune.priced_tokens import PricedTokens
from regraft.pipelines.prune.removal_record import removed_by, renumbered, together
from regraft.pipelines.prune.resolved import ResolvedPrune
from regraft.pipelines.prune.score_cache import ScoreCache, checksum_of
from regraft.plans import WHOLE, Curves, Cut, Groups, PrunePlan, Scores
from regraft.progress import Say, say_nothing
from regraft.selection import SELECTORS, Budget, select
from regraft.selection.budget import check_possible
from regraft.selection.global_threshold import as_shares
from regraft.settings import CALIBRATION_TOKENS
from regraft.surgery.cut import layers_after
from regraft.surgery.damage_curves import measure_curves, predict_curves, rescale_curves
from regraft.surgery.gates import Gating, learn_gates


def draw_windows(loaded: Loaded, corpus: Corpus, resolved: ResolvedPrune) -> Tensor:
    """Draws and encodes the calibration windows.

    Args:
        loaded: The model, for its tokenizer and its context.
        corpus: The text.
        resolved: How many windows, how long, and the seed of the draw.

    Returns:
        Token ids, int64 (windows, tokens).

    Raises:
        InputError: They are longer than the model's context.
        DataError: The text is too short.
        ModelError: There is no tokenizer.
    """
    settings = resolved.settings
    seq_len = window_tokens(settings.seq_len, CALIBRATION_TOKENS, loaded.model.config, "seq_len")
    return calibration_windows(corpus, require_tokenizer(loaded), settings.samples, seq_len, resolved.seed)


def check_text(plan: PrunePlan, windows: Tensor | None) -> None:
    """Refuses calibration text other than that of the plan, because the re-fitted weights would differ.

    Raises:
        PlanError: The windows differ.
    """
    expected = plan.made_with.get("windows_sha256")
    if windows is not None and expected is not None and checksum_of(windows) != expected:
        raise PlanError(
            "the calibration text gives other windows than those the plan was made with; give the same `calibration`, or a plan made anew"
        )


@dataclass(frozen=True)
class Planning:
    """All inputs of a plan other than the model.

    Attributes:
        resolved: How it is pruned.
        windows: Calibration tokens, int64 (windows, tokens), where they are needed.
        say: Called with a line of progress at each step.
        tokens: Tokens that may go, in one budget with the groups; None where the vocabulary stays.
    """

    resolved: ResolvedPrune
    windows: Tensor | None
    say: Say = say_nothing
    tokens: PricedTokens | None = None

    def once(self, view: ModelView, groups: Groups, budget: Budget, passes: Passes | None = None) -> PrunePlan:
        """Scores a model and chooses the units to keep.

        Args:
            view: The model.
            groups: Groups of the model.
            budget: The amount to remove.
            passes: Source of the criterion's evidence; None for the model in memory.

        Raises:
            InputError: The budget cannot be met.
        """
        settings = self.resolved.settings
        auto = settings.align == "auto"
        every = groups if self.tokens is None else self.tokens.beside(groups)
        check_possible(every, replace(budget, align=1) if auto else budget)
        in_memory = passes is None
        passes = passes or WholeModel(view.model, self.windows)
        scores = self._scores(view, groups, passes)
        selector = SELECTORS.get(settings.select)
        by = "knapsack" if selector.learned else settings.select  # gates begin at the knapsack's answer
        if selector.needs_curves:
            budget = replace(budget, curves=self._curves(view, groups, scores, budget))
        ranked = scores
        if selector.compares_layers and not CRITERIA.get(settings.criterion).between_layers:
            ranked = as_shares(groups, scores)
        plan, settled = self._selected(by, view, groups, ranked, budget, auto), budget
        if budget.curves is not None and self._predicted:
            settled = replace(budget, curves=self._rescaled(view, groups, scores, budget.curves, plan, passes))
            plan = self._selected(by, view, groups, scores, settled, auto)
        if budget.curves is not None and in_memory and self._equal_layers(budget):
            plan = better_at_once(self._making(view, groups), scores, budget, plan, auto_align=auto, say=self.say)
        if selector.learned:
            assert self.windows is not None
            aligned = replace(budget, align=plan.align)
            resolved = self.resolved
            scores = learn_gates(Gating(view, groups, scores, aligned, plan, self.windows, resolved.layerwise, resolved.seed, self.say))
            plan = select(settings.select, groups, scores, aligned)
        if self.tokens is not None:
            plan = self._with_tokens(self.tokens, view, groups, scores, settled, plan)
            return self.tokens.in_ids(replace(plan, removed=removed_by(every, self.tokens.scored(scores), plan.cuts)))
        return replace(plan, removed=removed_by(groups, scores, plan.cuts))

    def _selected(self, by: str, view: ModelView, groups: Groups, scores: Scores, budget: Budget, auto: bool) -> PrunePlan:
        """Chooses how much stays of each group, and of the tokens beside them."""
        if self.tokens is not None and budget.curves is not None:
            budget = replace(budget, curves=self.tokens.drawn(budget.curves, view.model.dtype.itemsize))
            groups, scores = self.tokens.beside(groups), self.tokens.scored(scores)
        return select(by, groups, scores, budget, auto_align=auto)

    def _with_tokens(
        self, tokens: PricedTokens, view: ModelView, groups: Groups, scores: Scores, budget: Budget, plan: PrunePlan
    ) -> PrunePlan:
        """Returns a plan, or that of the other targets alone where its model predicts text better."""
        settings = self.resolved.settings
        try:
            alone = select(settings.select, groups, scores, budget, auto_align=settings.align == "auto")
        except InputError:  # without tokens the ratio is out of reach
            return plan
        return better_with_tokens(self._making(view, groups), tokens, plan, alone, self.say)

    def _making(self, view: ModelView, groups: Groups) -> Making:
        """Returns how whole models are made to be compared."""
        assert self.windows is not None
        return Making(view, groups, self.windows, self.resolved.layerwise, bridged=self.resolved.settings.bridge)

    def _equal_layers(self, budget: Budget) -> bool:
        """Returns whether all layers get the same sizes, so that whole answers have to be compared."""
        return budget.shape == "uniform" and budget.counted and self.tokens is None

    @property
    def _predicted(self) -> bool:
        """Returns whether curves come from scores, and are measured once for each group."""
        settings = self.resolved.settings
        return CRITERIA.get(settings.criterion).in_nats and not EFFORTS[settings.effort].all_sizes

    def made_with(self, plan: PrunePlan) -> dict[str, Any]:
        """Returns the values that a plan stores, so that it can be replayed to the same bytes."""
        return {"settings": self.resolved.record(plan), "seed": self.resolved.seed, "windows_sha256": checksum_of(self.windows)}

    def _scores(self, view: ModelView, groups: Groups, passes: Passes | None) -> Scores:
        """Scores units by the criterion, and layers and parts by the criterion for depth."""
        units = tuple(group for group in groups.groups if group.kind not in WHOLE)
        whole = tuple(group for group in groups.groups if group.kind in WHOLE)
        settings = self.resolved.settings
        wanted = [(name, here) for name, here in ((settings.criterion, units), (settings.depth, whole)) if here]
        parts = [self._scores_by(name, view, replace(groups, groups=here), passes) for name, here in wanted]
        values = {name: value for part in parts for name, value in part.values.items()}
        return Scores(groups.fingerprint, " + ".join(part.criterion for part in parts), values)

    def _scores_by(self, name: str, view: ModelView, groups: Groups, passes: Passes | None) -> Scores:
        settings, criterion = self.resolved.settings, CRITERIA.get(name)
        run = round(settings.ratio * groups.parameters / groups.of("layer")[0].unit_parameters) if groups.of("layer") else 1
        evidence = Evidence(
            model=view.model,
            groups=groups,
            windows=self.windows if criterion.needs_text else None,
            seed=self.resolved.seed,
            order=settings.order,
            granularity=settings.granularity,
            reduce=settings.reduce,
            consecutive=max(1, run),
            passes=passes,
        )
        if settings.cache is None:
            return score(name, evidence)
        made_from = self._made_from(view, groups) | {"criterion": name} | criterion.key(evidence)
        if not criterion.needs_text:
            made_from |= {"windows_sha256": None}
        return ScoreCache(settings.cache).get(Scores, made_from, lambda: score(name, evidence), self.say)

    def _curves(self, view: ModelView, groups: Groups, scores: Scores, budget: Budget) -> Curves:
        windows, settings = self.windows, self.resolved.settings
        assert windows is not None
        names = [group.name for group in budget.prunable(groups)]

        def measure() -> Curves:
            curves = predict_curves if self._predicted else measure_curves
            return curves(view, groups, scores, windows, only=names, unit=settings.budget, say=self.say)

        if settings.cache is None or settings.budget == "milliseconds":  # times depend on the machine and its load
            return measure()
        made_from = self._made_from(view, groups) | {"scores": checksum_of(scores), "groups": names, "unit": settings.budget}
        made_from |= {"predicted": self._predicted}
        return ScoreCache(settings.cache).get(Curves, made_from, measure, self.say)

    def _rescaled(self, view: ModelView, groups: Groups, scores: Scores, curves: Curves, plan: PrunePlan, passes: Passes) -> Curves:
        """Returns predicted curves, corrected near the sizes that were chosen with them."""
        assert self.windows is not None
        units = [group for group in groups.groups if group.kind not in WHOLE and group.kind != "residual"]
        if not units:
            return curves
        kept = {entry.group: len(entry.kept) for entry in plan.cuts}
        inputs = {name: seen.inputs for name, seen in passes.reader_moments(readers(units), self.resolved.seed).items()}
        near = EFFORTS[self.resolved.settings.effort].near_windows
        judged = self.windows[-min(near, len(self.windows)) :]
        return rescale_curves(view, groups, scores, judged, curves, kept, inputs, say=self.say)

    def _made_from(self, view: ModelView, groups: Groups) -> dict[str, Any]:
        """Returns the inputs that both scores and curves depend on."""
        return {
            "fingerprint": groups.fingerprint,
            "units": checksum_of(groups),
            "windows_sha256": checksum_of(self.windows),
            "computed_in": str(view.model.dtype),
        }


def composed(groups: Groups, first: PrunePlan, then: PrunePlan) -> PrunePlan:
    """Returns one plan for the first model from two consecutive plans, the second made for the result of the first."""
    kept = {entry.group: entry.kept for entry in first.cuts}
    layers = layers_after(groups, first.cuts)
    for entry in then.cuts:
        prefix, _, kind = entry.group.rpartition(".")
        name = f"layers.{layers[int(prefix.removeprefix('layers.'))]}.{kind}" if prefix else entry.group
        before = kept.get(name, tuple(range(groups.named()[name].units)))
        kept[name] = tuple(before[unit] for unit in entry.kept)
    cuts = tuple(Cut(group.name, kept[group.name]) for group in groups.groups if group.name in kept)
    removed = together(first.removed, renumbered(then.removed, layers))
    return replace(first, parameters_after=then.parameters_after, cuts=cuts, align=then.align, removed=removed)
