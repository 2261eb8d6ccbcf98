"""Compression of a checkpoint that is larger than memory: moments, decompositions and factors layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from regraft.atomic import atomic_folder
from regraft.compression import RANK_CHOICES, Compressor, Decomposed, Evidence, decompose_one, factor_plan, remembered
from regraft.errors import InputError
from regraft.models.load import Loaded
from regraft.pipelines.compress.prepare import layer_of, moved_plan, projections_of, read_texts, saved_moments, space_of
from regraft.pipelines.compress.record import card_of, record_of, refuse_short_text
from regraft.pipelines.prune.score_cache import checksum_of
from regraft.pipelines.texts import Texts
from regraft.plans import FactorPlan, FactorSpace
from regraft.progress import Say
from regraft.settings import CompressSettings, LoadSettings
from regraft.streaming.factored_output import FactoredWriter, StoredFactors
from regraft.streaming.hidden import HiddenStates, InMemory, OnDisk, room_for
from regraft.streaming.memory import find_room_for_moments, in_words
from regraft.streaming.moments import streamed_moments, weight_of
from regraft.streaming.skeleton import Skeleton, open_skeleton

WORK = "work"


@dataclass(frozen=True)
class StreamedCompress:
    """All inputs of a compression within a memory limit.

    Attributes:
        source: A folder, a hub id, or ``seedling``.
        output: Folder of the compressed model; None to plan only.
        settings: The settings, with a memory limit.
        compressor: The method.
        calibration: Calibration text in memory, in place of a file.
        load: How the model is loaded.
        seed: Seed of windows and draws.
        plan: Ranks from an earlier run; None to choose them.
        command: How this was called, for the folder's record.
        say: Called with a line of progress at intervals.
    """

    source: str | Path
    output: Path | None
    settings: CompressSettings
    compressor: Compressor
    calibration: Texts | None
    load: LoadSettings
    seed: int
    plan: FactorPlan | None
    command: str
    say: Say


@dataclass(frozen=True)
class Streamed:
    """Result: the plan, the model without its weights, the ranks that there were, and remarks for the user."""

    plan: FactorPlan
    loaded: Loaded
    space: FactorSpace | None
    notes: tuple[str, ...]


def refuse_whole_model(settings: CompressSettings, method: str) -> None:
    """Refuses, together with a memory limit, what runs the whole model.

    Raises:
        InputError: A setting needs the whole model in memory.
    """
    reasons = {
        "mix": settings.mix,
        "dense": settings.dense,
        "ranks bayes": settings.ranks == "bayes",
        "prices measured": settings.prices == "measured",
        "method pc_lora": method == "pc_lora",
        "test": settings.test is not None,
    }
    found = [name for name, given in reasons.items() if given]
    if found:
        raise InputError(f"{found[0]} takes the whole model, and `memory` reads it layer by layer; leave one of the two out")


def compress_streamed(request: StreamedCompress) -> Streamed:
    """Compresses a checkpoint without loading all of it into memory.

    Raises:
        InputError: The memory limit is below the need of one layer, or the ratio cannot be met.
        PlanError: The plan does not fit the model.
        OutputError: The output cannot be written.
    """
    skeleton = open_skeleton(request.source, request.load)
    with ExitStack() as stack:
        if request.output is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="regraft-")))
        else:
            folder = stack.enter_context(atomic_folder(request.output))
        job = _Job(request, skeleton, folder / WORK)
        done = job.decided()
        if request.output is not None:
            loaded = skeleton.loaded
            record = record_of(loaded, done.plan, request.settings, seed=request.seed, command=request.command)
            writer = FactoredWriter(skeleton, done.plan, job.factors.at)
            writer.write(folder, record, partial(card_of, dense=False), request.say)
            shutil.rmtree(folder / WORK)
    return done


class _Job:
    """One streamed compression of one checkpoint."""

    def __init__(self, request: StreamedCompress, skeleton: Skeleton, work: Path) -> None:
        self._request = request
        self._skeleton = skeleton
        self._work = work
        self.factors = StoredFactors(work)
        settings, plan = request.settings, request.plan
        self._modules = projections_of(skeleton.view, settings.targets)
        if plan is not None:
            planned = plan.ranks()
            self._modules = {name: module for name, module in self._modules.items() if name in planned}

    def decided(self) -> Streamed:
        """Decomposes every layer and chooses the ranks."""
        request, loaded = self._request, self._skeleton.loaded
        settings, compressor = request.settings, request.compressor
        given = None if request.plan is None else moved_plan(loaded, request.plan)
        texts = read_texts(loaded, settings, compressor, request.seed, judging=False, calibration=request.calibration)
        found, notes = self._decomposed(texts.fitted)
        if given is not None:
            refuse_short_text(given, found)
            return Streamed(given, loaded, None, (*texts.notes, *notes))
        space = space_of(loaded, found, compressor, settings, settings.ratio)
        choice = settings.ranks
        if choice == "auto":
            choice = "knapsack" if space.unit == "nats" else "uniform"
        biases = {one.priced.name: one.has_bias or compressor.adds_bias for one in found}
        made_with = {
            "settings": settings.decisive() | {"ranks": choice},
            "seed": request.seed,
            "windows_sha256": checksum_of(texts.fitted),
            "judged_sha256": None,
        }
        plan = replace(factor_plan(space, RANK_CHOICES.get(choice)(space), choice, settings.ratio, biases), made_with=made_with)
        refuse_short_text(plan, found)
        return Streamed(plan, loaded, space, (*texts.notes, *notes))

    def _decomposed(self, windows: Tensor | None) -> tuple[list[Decomposed], tuple[str, ...]]:
        """Decomposes every layer, leaves the factors in files, and returns prices with empty factors, in the order of the model."""
        request, skeleton = self._request, self._skeleton
        settings, compressor = request.settings, request.compressor
        assert settings.memory is not None
        transposed = skeleton.view.family.transposed
        shapes = {name: self._shape(module, transposed=transposed) for name, module in self._modules.items()}
        size = (0, 0) if windows is None else (windows.shape[0], windows.shape[1])
        room = find_room_for_moments(skeleton, list(shapes.values()), compressor.looks_at, size, settings.memory)

        def gathered(names: Sequence[str]) -> Iterator[Evidence]:
            hidden = self._hidden(size, room.room.hidden_in_memory, room.room.hidden_bytes)
            return streamed_moments(skeleton, names, windows, compressor.looks_at, hidden, room, seed=request.seed, say=request.say)

        found: dict[str, Decomposed] = {}
        evidence = remembered(
            saved_moments(settings, skeleton.loaded.fingerprint, windows, request.seed),
            {name: partial(weight_of, skeleton, name) for name in self._modules},
            compressor.looks_at,
            gathered,
        )
        for one in evidence:
            own_bias = self._modules[one.name]._parameters.get("bias") is not None
            done = decompose_one(one, compressor, settings.layout, layer_of(skeleton.view, one.name), has_bias=own_bias)
            self.factors.keep(one.name, done.truncation)
            found[one.name] = replace(done, truncation=done.truncation.without_factors())
        notes: list[str] = []
        if not room.room.fits:
            notes.append(
                f"`memory={in_words(settings.memory)}` bounds weights and states ({in_words(room.room.working_bytes)}); the program itself "
                f"takes {in_words(room.room.program_bytes)} beside them"
            )
        if windows is not None and not room.room.hidden_in_memory:
            notes.append(f"hidden states of the calibration text ({in_words(room.room.hidden_bytes)}) were kept on disk")
        return [found[name] for name in self._modules], tuple(notes)

    def _hidden(self, size: tuple[int, int], in_memory: bool, needed_bytes: int) -> Callable[[], HiddenStates]:
        shape = (*size, self._skeleton.head_shape[1])
        if in_memory:
            return lambda: InMemory(shape)

        def on_disk() -> HiddenStates:
            room_for(self._work, needed_bytes)
            return OnDisk(self._work / "hidden.bin", shape)

        return on_disk

    @staticmethod
    def _shape(module: nn.Module, *, transposed: bool) -> tuple[int, int]:
        rows, columns = module.get_parameter("weight").shape
        return (columns, rows) if transposed else (rows, columns)
