"""From settings to a plan, whether the model is in memory or streamed: what "auto" means, the budget, the scores, the choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from regraft.data.text import read_corpus
from regraft.data.tokens import calibration_windows, window_tokens
from regraft.errors import InputError, PlanError
from regraft.groups.traced import Traced
from regraft.importance import CRITERIA, Evidence, score
from regraft.importance.passes import Passes, WholeModel
from regraft.importance.two_sided import readers
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.view import ModelView
from regraft.pipelines.prune.removal_record import removed_by, renumbered, together
from regraft.pipelines.prune.score_cache import ScoreCache, checksum_of
from regraft.plans import WHOLE, Curves, Cut, GroupKind, Groups, PrunePlan, Scores
from regraft.selection import SELECTORS, Budget, select
from regraft.selection.budget import check_possible
from regraft.settings import CALIBRATION_TOKENS, PruneSettings, Target
from regraft.surgery.cut import layers_after
from regraft.surgery.damage_curves import measure_curves, predict_curves, rescale_curves
from regraft.surgery.refit_predictions import refitting_bytes

Say = Callable[[str], None]
Reconstruct = Literal["divergence", "least_squares", "mean"]
# Re-fitting to the dense model's predictions is the default up to here, which is about half a billion parameters.
MOST_REFITTING_BYTES = 8_000_000_000
# Windows that measure the damage near the chosen widths: every one is run once for each group.
NEAR_WINDOWS = 4
# Where the word on the command line is not that of the groups.
KIND_OF: dict[Target, GroupKind] = {
    "heads": "heads",
    "ffn": "ffn",
    "query_heads": "query_heads",
    "residual": "residual",
    "layers": "layer",
    "attention": "attention",
    "mlp": "mlp",
}


@dataclass(frozen=True)
class Way:
    """The settings that say "auto", decided.

    Attributes:
        select: A registered selector.
        reconstruct: How reading projections are re-fitted, or None.
        needs_text: Whether any of it needs calibration text.
        depth: The criterion for layers and parts of layers that go whole.
        notes: What the user should know of what was decided, a line each.
    """

    select: str
    reconstruct: Reconstruct | None
    needs_text: bool
    depth: str = "removal"
    notes: tuple[str, ...] = field(default=())


def resolve(settings: PruneSettings, view: ModelView | None = None) -> Way:
    """Decides what "auto" means: criteria without text stay without text, everything else takes the best there is.

    Under a bound of memory the best there is leaves out what has to run the whole model many times over, and for a large model what
    takes much more memory than the model.

    Args:
        settings: What was asked for.
        view: The model, once it is loaded.

    Raises:
        InputError: The criterion is unknown, or the budget needs a selector that was not chosen, or --memory rules something out.
    """
    if not settings.targets:
        raise InputError(f"--targets names nothing to prune; name one or more of {', '.join(KIND_OF)}")
    with_text = CRITERIA.get(settings.criterion).needs_text
    curves_wanted = settings.budget != "parameters"
    notes: tuple[str, ...] = ()
    chosen = settings.select
    if chosen == "auto":
        measured = with_text and settings.memory is None
        chosen = "knapsack" if curves_wanted or measured else "uniform"  # one threshold for all layers lost more by every criterion
        if with_text and settings.memory is not None and not curves_wanted:
            notes = ("selection: uniform; the knapsack measures the whole model many times over, which --memory leaves no room for",)
    if curves_wanted and chosen != "knapsack":
        raise InputError(f"--budget {settings.budget} is only known to the knapsack; use --select knapsack (now {chosen})")
    if settings.memory is not None:
        _refuse_with_memory(settings, chosen)
    reconstruct = reconstruct_of(settings, view)
    if view is not None and reconstruct != reconstruct_of(settings):
        needed = refitting_bytes(view)
        notes += (
            f"reconstruct: least_squares; to re-fit a model of this size to its predictions as well takes {needed / 1e9:.0f} GB more "
            "(--reconstruct divergence)",
        )
    whole = bool(set(kinds_wanted(settings)) & set(WHOLE))
    depth, best = settings.depth, "removal" if settings.memory is None else "block_influence"
    if whole and settings.memory is not None and depth not in ("auto", best):
        raise InputError(
            f"--depth {depth} looks at several layers at once, which --memory leaves no room for; use --depth {best}, or leave --memory out"
        )
    depth = best if depth == "auto" else depth
    return Way(chosen, reconstruct, with_text or chosen == "knapsack" or reconstruct is not None or whole, depth, notes)


def reconstruct_of(settings: PruneSettings, view: ModelView | None = None) -> Reconstruct | None:
    """Decides how reading projections are re-fitted.

    Args:
        settings: What was asked for.
        view: The model, once it is loaded; unless it was asked for, a large one is not re-fitted to its predictions.

    Raises:
        InputError: It takes the whole model, and there is a bound of memory.
    """
    method = settings.reconstruct
    if method == "auto":
        with_text = CRITERIA.get(settings.criterion).needs_text
        affordable = settings.memory is None and (view is None or refitting_bytes(view) <= MOST_REFITTING_BYTES)
        method = ("divergence" if affordable else "least_squares") if with_text else "none"
    if method == "divergence" and settings.memory is not None:
        raise InputError(
            "--reconstruct divergence runs the whole model many times over, which --memory leaves no room for; "
            "use --reconstruct least_squares, or leave --memory out"
        )
    return None if method == "none" else method


def _refuse_with_memory(settings: PruneSettings, chosen: str) -> None:
    if SELECTORS.get(chosen).needs_curves:
        why = f"--budget {settings.budget} needs" if settings.budget != "parameters" else f"--select {chosen} needs"
        raise InputError(
            f"{why} measurements of the whole model, which --memory leaves no room for; use --select global or uniform with "
            "--budget parameters, or leave --memory out"
        )
    if settings.rounds > 1:
        raise InputError(
            f"--rounds {settings.rounds} prunes the pruned model again, which --memory leaves no room for; use --rounds 1, and prune "
            "the result again for another round"
        )


def layers_in(text: str, count: int) -> tuple[int, ...]:
    """Returns the layer indices of a range written as a Python slice.

    Raises:
        InputError: The range is empty.

    >>> layers_in("1:-1", 4)
    (1, 2)
    """
    parts = [int(part) if part.strip() else None for part in text.split(":")]
    chosen = tuple(range(count)[slice(*parts)])
    if not chosen:
        raise InputError(f"--layers {text} names no layer of this model's {count}; write START:STOP, such as 1:-1")
    return tuple(sorted(chosen))


def kinds_wanted(settings: PruneSettings, plan: PrunePlan | None = None) -> tuple[GroupKind, ...]:
    """Returns the kinds of groups that the settings cut, and those that a plan cuts that is to be replayed."""
    kinds: list[GroupKind] = [KIND_OF[target] for target in settings.targets]
    if plan is not None:
        kinds.extend(kind for kind in KIND_OF.values() if any(f".{entry.group}".endswith(f".{kind}") for entry in plan.cuts))
    return tuple(dict.fromkeys(kinds))


def left_out(settings: PruneSettings, found: Traced) -> tuple[str, ...]:
    """Returns a line for each target that a model has not got, or that cannot be cut in it."""
    lines: list[str] = []
    for target in settings.targets:
        if not found.groups.of(KIND_OF[target]):
            reasons = dict.fromkeys(refusal.reason for refusal in found.refusals if refusal.kind == KIND_OF[target])
            lines.append(f"--targets {target} is left out: {'; '.join(reasons) or 'this model has none'}")
    return tuple(lines)


def budget_of(groups: Groups, settings: PruneSettings) -> Budget:
    """Returns how much the settings remove from a model, and from where.

    Raises:
        InputError: The range of layers is empty, or spares layers of a model that is to stay uniform or to become narrower, or a part of
            some layers is to go from a model whose layers are to stay alike.
    """
    parts = [target for target in settings.targets if target in ("attention", "mlp")]
    if parts and settings.shape == "uniform":
        raise InputError(
            f"--targets {parts[0]} leaves layers that differ, which --shape uniform rules out; use --shape per-layer, or layers"
        )
    budget = Budget(
        ratio=settings.ratio,
        shape=settings.shape,
        layers=layers_in(settings.layers, groups.layers),
        targets=kinds_wanted(settings),
        align=settings.align if isinstance(settings.align, int) else 1,
    )
    if settings.shape == "uniform" and len(budget.layers) < groups.layers:
        raise InputError(
            f"--shape uniform wants the same width in all {groups.layers} layers, but --layers {settings.layers} prunes only "
            f"{len(budget.layers)}; drop --layers or use --shape per-layer"
        )
    if "residual" in settings.targets and len(budget.layers) < groups.layers:
        raise InputError(
            f"the residual width runs through all {groups.layers} layers, but --layers {settings.layers} prunes only {len(budget.layers)}; "
            "drop --layers, or residual from --targets"
        )
    return budget


def calibration(loaded: Loaded, settings: PruneSettings, seed: int) -> Tensor:
    """Returns the calibration windows, int64 (windows, tokens).

    Raises:
        InputError: They are longer than the model's context.
        DataError: The text cannot be used.
        ModelError: There is no tokenizer.
    """
    seq_len = window_tokens(settings.seq_len, CALIBRATION_TOKENS, loaded.model.config, "--seq-len")
    corpus = read_corpus(settings.calibration, "validation")
    return calibration_windows(corpus, require_tokenizer(loaded), settings.samples, seq_len, seed)


def check_text(plan: PrunePlan, windows: Tensor | None) -> None:
    """Refuses to re-fit on other calibration text than a plan was made with: the result would not be the plan's.

    Raises:
        PlanError: The windows differ.
    """
    expected = plan.made_with.get("windows_sha256")
    if windows is not None and expected is not None and checksum_of(windows) != expected:
        raise PlanError(
            "the calibration text gives other windows than those the plan was made with; give the same --calibration, or a plan made anew"
        )


@dataclass(frozen=True)
class Planning:
    """Everything that one plan is made from, beside the model.

    Attributes:
        settings: What was asked for.
        way: What "auto" means here.
        windows: Calibration tokens, int64 (windows, tokens), where they are needed.
        seed: Of random scores.
        say: Called with one line now and then.
    """

    settings: PruneSettings
    way: Way
    windows: Tensor | None
    seed: int
    say: Say = lambda line: None

    def once(self, view: ModelView, groups: Groups, budget: Budget, passes: Passes | None = None) -> PrunePlan:
        """Scores a model and chooses what stays.

        Args:
            view: The model.
            groups: Of it.
            budget: How much to remove.
            passes: Where the criterion's evidence comes from, if not from the model.

        Raises:
            InputError: The budget cannot be met.
        """
        check_possible(groups, replace(budget, align=1) if self.settings.align == "auto" else budget)
        passes = passes or WholeModel(view.model, self.windows)
        scores = self._scores(view, groups, passes)
        if SELECTORS.get(self.way.select).needs_curves:
            budget = replace(budget, curves=self._curves(view, groups, scores, budget))
        plan = select(self.way.select, groups, scores, budget, auto_align=self.settings.align == "auto")
        if budget.curves is not None and CRITERIA.get(self.settings.criterion).in_nats:
            curves = self._rescaled(view, groups, scores, budget.curves, plan, passes)
            plan = select(self.way.select, groups, scores, replace(budget, curves=curves), auto_align=self.settings.align == "auto")
        return replace(plan, removed=removed_by(groups, scores, plan.cuts))

    def made_with(self) -> dict[str, Any]:
        """Returns what a plan is to remember, so that it can be replayed to the same bytes."""
        settings = self.settings.decisive() | {"reconstruct": self.way.reconstruct or "none"}  # "auto" depends on --memory
        return {"settings": settings, "seed": self.seed, "windows_sha256": checksum_of(self.windows)}

    def _scores(self, view: ModelView, groups: Groups, passes: Passes | None) -> Scores:
        """Scores units by the criterion, and what goes whole by that for depth."""
        units = tuple(group for group in groups.groups if group.kind not in WHOLE)
        whole = tuple(group for group in groups.groups if group.kind in WHOLE)
        wanted = [(name, here) for name, here in ((self.settings.criterion, units), (self.way.depth, whole)) if here]
        parts = [self._scores_by(name, view, replace(groups, groups=here), passes) for name, here in wanted]
        values = {name: value for part in parts for name, value in part.values.items()}
        return Scores(groups.fingerprint, " + ".join(part.criterion for part in parts), values)

    def _scores_by(self, name: str, view: ModelView, groups: Groups, passes: Passes | None) -> Scores:
        settings = self.settings
        criterion = CRITERIA.get(name)
        run = round(settings.ratio * groups.parameters / groups.of("layer")[0].unit_parameters) if groups.of("layer") else 1
        evidence = Evidence(
            model=view.model,
            groups=groups,
            windows=self.windows if criterion.needs_text else None,
            seed=self.seed,
            order=settings.order,
            granularity=settings.granularity,
            reduce=settings.reduce,
            consecutive=max(1, run),
            passes=passes,
        )
        if settings.cache is None:
            return score(name, evidence)
        made_from = self._made_from(view, groups) | {"criterion": name, **criterion.key(evidence)}
        if not criterion.needs_text:
            made_from |= {"windows_sha256": None}
        return ScoreCache(settings.cache).get(Scores, made_from, lambda: score(name, evidence), self.say)

    def _curves(self, view: ModelView, groups: Groups, scores: Scores, budget: Budget) -> Curves:
        windows, settings = self.windows, self.settings
        assert windows is not None
        names = [group.name for group in budget.prunable(groups)]

        def measure() -> Curves:
            curves = predict_curves if CRITERIA.get(settings.criterion).in_nats else measure_curves
            return curves(view, groups, scores, windows, only=names, unit=settings.budget, say=self.say)

        if settings.cache is None or settings.budget == "milliseconds":  # times are of the machine and of the moment
            return measure()
        made_from = self._made_from(view, groups) | {"scores": checksum_of(scores), "groups": names, "unit": settings.budget}
        return ScoreCache(settings.cache).get(Curves, made_from, measure, self.say)

    def _rescaled(self, view: ModelView, groups: Groups, scores: Scores, curves: Curves, plan: PrunePlan, passes: Passes) -> Curves:
        """Returns predicted curves, set right near the sizes that they led to."""
        assert self.windows is not None
        units = [group for group in groups.groups if group.kind not in WHOLE and group.kind != "residual"]
        if not units:
            return curves
        kept = {entry.group: len(entry.kept) for entry in plan.cuts}
        inputs = {name: seen.inputs for name, seen in passes.reader_moments(readers(units), self.seed).items()}
        judged = self.windows[-min(NEAR_WINDOWS, len(self.windows)) :]
        return rescale_curves(view, groups, scores, judged, curves, kept, inputs, say=self.say)

    def _made_from(self, view: ModelView, groups: Groups) -> dict[str, Any]:
        """Returns what scores and curves depend on alike."""
        return {
            "fingerprint": groups.fingerprint,
            "units": checksum_of(groups),
            "windows_sha256": checksum_of(self.windows),
            "computed_in": str(view.model.dtype),
        }


def composed(groups: Groups, first: PrunePlan, then: PrunePlan) -> PrunePlan:
    """Returns one plan on the first model for two plans in a row, the second made on what the first left."""
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
