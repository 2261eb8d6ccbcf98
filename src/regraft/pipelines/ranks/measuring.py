"""Specification of a rank search's measurements: a small value with the locations of model and data, opened in each measuring process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from regraft.data.text import Corpus, split_corpus
from regraft.errors import DataError, TrainingError
from regraft.models.load import load, require_tokenizer
from regraft.models.view import ModelView
from regraft.paired.candidates import PASS_VALUES, Candidates
from regraft.paired.elastic import Elastic, ElasticSettings
from regraft.paired.setup import PairedSetup, cost_of
from regraft.pipelines.recover import load_teacher, training_corpora
from regraft.plans import RankSpace, RankTrial, from_json
from regraft.search.contract import Job, Phase
from regraft.settings import TRAINING_TOKENS, LoadSettings, RecoverSettings

_AT_ONCE_ON_A_GPU = 4
_SCORED_TOKENS = 2048


def held_out_parts(held_out: Corpus) -> dict[Phase, Corpus]:
    """Splits the held-out text into one half for the search and one for the confirmation; a very short text is used for both."""
    try:
        first, second = split_corpus(held_out, 0.5, seed=0)
    except DataError:
        return {"search": held_out, "confirm": held_out}
    return {"search": first, "confirm": second}


def scored(settings: RecoverSettings) -> RecoverSettings:
    """Returns the settings of the elastic adapter, with an eighth of the held-out rows, because it scores many vectors.

    The rows have at least 2,048 tokens, if the text has as many. With a few rows all scores would share one sampling error about the
    layers, which more scores cannot reduce.
    """
    enough = -(-_SCORED_TOKENS // (settings.seq_len or TRAINING_TOKENS))
    rows = min(settings.held_out_windows, max(-(-settings.held_out_windows // 8), enough))
    return settings.model_copy(update={"held_out_windows": rows})


def elastic_cost(settings: RecoverSettings, scores: int) -> float:
    """Returns the cost of an elastic adapter and its scores, in full recoveries; the real cost is lower if the held-out text is short."""
    if not scores:
        return 0.0
    elastic, settings = ElasticSettings(), scored(settings)
    return cost_of(settings, settings.held_out_windows, max(1, round(elastic.fidelity * settings.steps)), scores, elastic.vectors)


def candidate_cost(settings: RecoverSettings, start: float, stop: float) -> float:
    """Returns the cost of training one candidate from one share of the steps to another, with its evaluations, in full recoveries."""
    first, last = (max(1, round(share * settings.steps)) if share else 0 for share in (start, stop))
    looks = last // settings.eval_every - first // settings.eval_every + (last % settings.eval_every > 0)
    return cost_of(settings, settings.held_out_windows, last - first, max(1, looks))


def placed(settings: RecoverSettings) -> RecoverSettings:
    """Returns the settings with absolute paths, because measuring processes may have other current directories."""
    teacher = settings.teacher
    if teacher is not None and Path(teacher).is_dir():
        teacher = str(Path(teacher).absolute())
    data = settings.data.absolute() if settings.data is not None else None
    cache = settings.teacher_cache.absolute() if settings.teacher_cache is not None else None
    return settings.model_copy(update={"teacher": teacher, "data": data, "teacher_cache": cache})


@final
@dataclass(frozen=True)
class Measuring:
    """All inputs of measuring; hashable, and picklable between processes of one search.

    Attributes:
        source: The pruned model.
        load: Settings for loading the model.
        recover: Settings of a full recovery.
        space: The rank space, as JSON.
        folder: Folder for unfinished recoveries, which any measuring process can continue.
        seed: Seed of the split of the data.
    """

    source: str
    load: LoadSettings
    recover: RecoverSettings
    space: str
    folder: Path
    seed: int

    def open(self, threads: int | None = None) -> OpenMeasure:
        """Loads model and data.

        Raises:
            RegraftError: Model or data cannot be used on this machine.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        return OpenMeasure(self)


@final
class OpenMeasure:
    """Measurement of rank vectors of one model.

    Args:
        spec: Specification of the measurements.
    """

    def __init__(self, spec: Measuring) -> None:
        space = from_json(RankSpace, spec.space)
        loaded = load(spec.source, spec.load)
        teacher = load_teacher(spec.recover, spec.load, loaded)
        train, held_out = training_corpora(spec.recover, spec.seed, loaded)
        modules = [module for slot in space.slots for module in slot.modules]
        tokenizer = require_tokenizer(loaded)
        parts = held_out_parts(held_out)

        def setup(phase: Phase, settings: RecoverSettings) -> PairedSetup:
            return PairedSetup(loaded.model, tokenizer, train, parts[phase], modules, settings, teacher=teacher)

        spec.folder.mkdir(parents=True, exist_ok=True)
        self._candidates = {phase: Candidates(setup(phase, spec.recover), space, folder=spec.folder) for phase in parts}
        self._elastic = Elastic(setup("search", scored(spec.recover)), space, folder=spec.folder)

    def __call__(self, jobs: Sequence[Job]) -> Sequence[RankTrial]:
        """Measures jobs that differ only in the ranks.

        Raises:
            TrainingError: A candidate does not fit into the GPU's memory.
            RegraftError: An error that all candidates have in common.
        """
        first, vectors = jobs[0], [job.ranks for job in jobs]
        try:
            if first.kind == "elastic":
                return self._elastic.measure(vectors, first.seed)
            return self._candidates[first.phase].measure(vectors, first.fidelity, first.seed)
        except torch.OutOfMemoryError:
            raise TrainingError("it does not fit into the GPU's memory; lower `batch` or `seq_len`") from None


def candidates_at_once(view: ModelView, settings: RecoverSettings) -> int:
    """Returns the number of candidates that one process trains in one pass, the default of :class:`Candidates`."""
    if view.model.device.type != "cpu":
        return _AT_ONCE_ON_A_GPU
    values = settings.batch * (settings.seq_len or TRAINING_TOKENS) * view.width
    return max(1, PASS_VALUES // values)
