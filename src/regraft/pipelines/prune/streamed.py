"""Pruning of a checkpoint that is larger than memory: planned, re-fitted and written layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from regraft.data.text import Corpus
from regraft.importance import CRITERIA
from regraft.models.load import Loaded
from regraft.models.provenance import versions
from regraft.pipelines.prune.experts import ExpertsWanted, experts_wanted, of_experts, plan_experts
from regraft.pipelines.prune.planning import Planning, check_text, draw_windows
from regraft.pipelines.prune.record import card_of, record_of
from regraft.pipelines.prune.resolved import (
    ResolvedPrune,
    budget_of,
    kinds_wanted,
    left_out,
    missed_by_shape,
    only_wanted,
    refuse_unlike_layers,
    with_shape,
)
from regraft.pipelines.prune.score_cache import checksum_of
from regraft.plans import Groups, PrunePlan, to_dict
from regraft.progress import Say
from regraft.selection.budget import check_possible
from regraft.settings import LoadSettings
from regraft.streaming.hidden import HiddenStates, InMemory, OnDisk, room_for
from regraft.streaming.memory import Room, Task, find_room, in_words
from regraft.streaming.output import FinishedLayers, PrunedLayout, finish_pruned, layout_of, readers_of, resumable, write_shards
from regraft.streaming.passes import StreamedPasses, StreamedWalk
from regraft.streaming.skeleton import Skeleton, open_skeleton, refuse_beyond_layers
from regraft.surgery.apply_plan import split_by_part
from regraft.surgery.cut import check_counts, check_plan
from regraft.surgery.refit_layerwise import refitted

HIDDEN = "hidden.bin"


@dataclass(frozen=True)
class StreamedPrune:
    """All inputs of pruning a model.

    Attributes:
        source: A folder, a hub id, or ``seedling``.
        output: Folder of the pruned model; None to plan only.
        resolved: The settings, with a value in place of every "auto" and a memory limit.
        load: Settings of loading the model.
        text: Returns the calibration text of the loaded model.
        plan: A plan to replay; None to make one.
        command: How this was called, for the folder's record.
        say: Called with a line of progress at each step.
    """

    source: str | Path
    output: Path | None
    resolved: ResolvedPrune
    load: LoadSettings
    text: Callable[[Loaded], Corpus]
    plan: PrunePlan | None
    command: str
    say: Say


@dataclass(frozen=True)
class Streamed:
    """Result of pruning a checkpoint layer by layer.

    Attributes:
        plan: The units to keep.
        loaded: The model without its weights.
        groups: Groups of the model.
        resolved: The settings, with a value in place of every "auto".
        notes: Notes to the user, one line each.
    """

    plan: PrunePlan
    loaded: Loaded
    groups: Groups
    resolved: ResolvedPrune
    notes: tuple[str, ...]


def prune_streamed(request: StreamedPrune) -> Streamed:
    """Prunes a checkpoint without loading all of it into memory.

    Raises:
        InputError: The memory limit is below the need of one layer, the ratio cannot be met, or a cut would change more than one layer at
            a time.
        PlanError: The plan to replay belongs to another model.
        OutputError: The output cannot be written; finished shards are kept for the next attempt.
    """
    skeleton = open_skeleton(request.source, request.load)
    return (_experts if of_experts(request.resolved.settings) else _groups)(request, skeleton)


def _groups(request: StreamedPrune, skeleton: Skeleton) -> Streamed:
    """Prunes heads, channels, layers and parts of layers."""
    found = skeleton.look_for(kinds_wanted(request.resolved.settings, request.plan))
    groups, resolved = found.groups, request.resolved
    if request.plan is None:
        resolved = with_shape(resolved, groups, skeleton.view.family)
        groups = only_wanted(groups, resolved.settings)
        refuse_unlike_layers(resolved.settings, groups, skeleton.view.model.config)
    request = replace(request, resolved=resolved)
    refuse_beyond_layers(skeleton.view.family, groups)
    if request.plan is not None:
        check_plan(groups, request.plan)
        check_counts(groups, request.plan)
    else:
        check_possible(groups, budget_of(groups, resolved.settings))
    windows = draw_windows(skeleton.loaded, request.text(skeleton.loaded), resolved) if resolved.needs_text else None
    if request.plan is not None:
        check_text(request.plan, windows)
    done = _GroupsJob(request, skeleton, groups, windows).run()
    notes = (
        (*left_out(resolved.settings, found), *missed_by_shape(done.plan, groups, skeleton.view.model.config))
        if request.plan is None
        else ()
    )
    return replace(done, notes=(*done.notes, *notes))


def _experts(request: StreamedPrune, skeleton: Skeleton) -> Streamed:
    """Prunes experts, or channels of experts, with one layer of them in memory at a time."""
    settings = request.resolved.settings
    wanted = experts_wanted(skeleton.view.model, settings, request.resolved.seed, skeleton.loaded.fingerprint)
    request = replace(request, resolved=wanted.resolved)
    if request.plan is not None:
        check_plan(wanted.groups, request.plan)
        check_counts(wanted.groups, request.plan)
    windows = draw_windows(skeleton.loaded, request.text(skeleton.loaded), wanted.resolved) if request.plan is None else None
    return _ExpertsJob(request, skeleton, wanted, windows).run()


class _Job(ABC):
    """One streamed run over one checkpoint.

    Args:
        request: The inputs.
        skeleton: The checkpoint's model without its weights.
        groups: Its groups.
        windows: Calibration tokens, int64 (windows, tokens), where they are needed.
    """

    def __init__(self, request: StreamedPrune, skeleton: Skeleton, groups: Groups, windows: Tensor | None) -> None:
        self._request = request
        self._skeleton = skeleton
        self._groups = groups
        self._windows = windows
        settings = request.resolved.settings
        assert settings.memory is not None
        count, tokens = (0, 0) if windows is None else windows.shape
        self._room: Room = find_room(skeleton, self._task(count, tokens), settings.memory)

    @abstractmethod
    def _task(self, windows: int, tokens: int) -> Task:
        """Returns what the run does with so many windows, which decides how much memory a layer takes."""

    @abstractmethod
    def _plan(self, work: Path) -> PrunePlan:
        """Scores the layers and chooses the units to keep.

        Args:
            work: A folder for hidden states.
        """

    def _refitted(self, plan: PrunePlan, layout: PrunedLayout, work: Path, done: int) -> Iterator[tuple[int, Mapping[str, Tensor]]] | None:
        """Returns the new tensors of every layer that is not written yet, computed one after another; None without a re-fit."""
        return None

    def run(self) -> Streamed:
        """Plans, and writes the pruned checkpoint where an output was asked for."""
        request = self._request
        if request.output is None:
            with TemporaryDirectory(prefix="regraft-") as work:
                plan = request.plan or self._plan(Path(work))
        else:
            plan = self._write(request.output)
        return Streamed(plan, self._skeleton.loaded, self._groups, request.resolved, self._notes())

    def _notes(self) -> tuple[str, ...]:
        """Returns notes to the user, one line each."""
        room, found = self._room, list(self._request.resolved.notes)
        if not room.fits:
            found.append(
                f"`memory={in_words(room.bound_bytes)}` bounds weights and states ({in_words(room.working_bytes)}); the program itself "
                f"takes {in_words(room.program_bytes)} beside them"
            )
        if self._windows is not None and not room.hidden_in_memory:
            found.append(f"hidden states of the calibration text ({in_words(room.hidden_bytes)}) were kept on disk")
        return tuple(found)

    def _write(self, output: Path) -> PrunePlan:
        """Makes a plan, unless there is one from an interrupted run or the user, and writes the pruned checkpoint."""
        request = self._request
        with resumable(output, self._asked()) as progress:
            (progress.folder / HIDDEN).unlink(missing_ok=True)
            if progress.plan is not None:
                request.say("going on where an interrupted run stopped")
            plan = progress.plan or request.plan or self._plan(progress.folder)
            progress.decided(plan)
            layout = layout_of(self._skeleton, self._groups, plan)
            done = progress.finished(layout.shards)
            write_shards(layout, progress, done, self._refitted(plan, layout, progress.folder, done), request.say)
            record = record_of(self._skeleton.loaded, plan, request.resolved, command=request.command)
            finish_pruned(layout, progress, record, card_of)
        return plan

    def _hidden(self, work: Path) -> Callable[[], HiddenStates]:
        """Returns a function that opens a storage for hidden states: in memory if they fit, else in a work folder."""
        if self._windows is None:
            return lambda: InMemory((0, 0, 0))
        count, tokens = self._windows.shape
        shape = (count, tokens, self._skeleton.head_shape[1])
        if self._room.hidden_in_memory:
            return lambda: InMemory(shape)

        def on_disk() -> HiddenStates:
            room_for(work, self._room.hidden_bytes)
            return OnDisk(work / HIDDEN, shape)

        return on_disk

    def _asked(self) -> dict[str, Any]:
        """Returns all inputs that affect the written files."""
        request, skeleton = self._request, self._skeleton
        return {
            "fingerprint": self._groups.fingerprint,
            "settings": request.resolved.record(),
            "seed": request.resolved.seed,
            "windows_sha256": checksum_of(self._windows),
            "plan": None if request.plan is None else to_dict(request.plan),
            "dtype": str(skeleton.dtype),
            "device": skeleton.device.type,
            "versions": versions(),
        }


class _GroupsJob(_Job):
    """A run that cuts groups and re-fits what reads them."""

    def _task(self, windows: int, tokens: int) -> Task:
        resolved = self._request.resolved
        looks_at = CRITERIA.get(resolved.settings.criterion).looks_at
        return Task(
            looks_at=looks_at if self._request.plan is None else None,
            squares=looks_at == "gradients" and resolved.settings.order != "first",
            refits=resolved.refit is not None and self._request.output is not None,
            windows=windows,
            tokens=tokens,
        )

    def _plan(self, work: Path) -> PrunePlan:
        request, settings = self._request, self._request.resolved.settings
        planning = Planning(request.resolved, self._windows, request.say)
        passes = StreamedPasses(self._skeleton, self._windows, self._hidden(work), self._room.limits, request.say)
        plan = planning.once(self._skeleton.view, self._groups, budget_of(self._groups, settings), passes)
        return replace(plan, ratio=settings.ratio, made_with=planning.made_with(plan))

    def _refitted(self, plan: PrunePlan, layout: PrunedLayout, work: Path, done: int) -> Iterator[tuple[int, Mapping[str, Tensor]]] | None:
        method, windows = self._request.resolved.refit, self._windows
        if method is None:
            return None
        assert windows is not None
        assert method in ("least_squares", "mean"), "the other takes the whole model; refused before"
        before = FinishedLayers(layout, work, done, readers_of(self._groups, plan))
        if before.count == len(self._skeleton.view.layers):
            return iter(())
        gone, narrow = split_by_part(self._groups, plan.cuts)
        hidden, say = self._hidden(work), self._request.say
        walk = StreamedWalk(self._skeleton, windows, hidden, say, finished=before.put, start=before.count, gone=gone)
        return refitted(walk, self._groups, narrow, method)


class _ExpertsJob(_Job):
    """A run that cuts experts, or channels of experts, and re-fits nothing.

    Args:
        request: The inputs.
        skeleton: The checkpoint's model without its weights.
        wanted: What is to go.
        windows: Calibration tokens, int64 (windows, tokens); None for a plan to replay.
    """

    def __init__(self, request: StreamedPrune, skeleton: Skeleton, wanted: ExpertsWanted, windows: Tensor | None) -> None:
        self._wanted = wanted
        super().__init__(request, skeleton, wanted.groups, windows)

    def _task(self, windows: int, tokens: int) -> Task:
        return Task(looks_at=None, squares=False, refits=False, windows=windows, tokens=tokens)

    def _plan(self, work: Path) -> PrunePlan:
        assert self._windows is not None
        return plan_experts(self._wanted, StreamedWalk(self._skeleton, self._windows, self._hidden(work), self._request.say))
