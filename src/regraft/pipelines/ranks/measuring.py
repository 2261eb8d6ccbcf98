"""What a rank search measures with, as one small value: where model, data and settings are. Opened wherever the measuring is done."""

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
    """Divides the held-out text: one half for the search, the other to confirm what it found. Too little text serves both."""
    try:
        first, second = split_corpus(held_out, 0.5, seed=0)
    except DataError:
        return {"search": held_out, "confirm": held_out}
    return {"search": first, "confirm": second}


def scored(settings: RecoverSettings) -> RecoverSettings:
    """Returns the settings of the elastic adapter: an eighth of the held-out rows, since it is asked for many vectors.

    But no fewer than 2,048 tokens, where there are so many: what a few rows say of the layers all scores have in common, so that no number
    of them makes up for it.
    """
    enough = -(-_SCORED_TOKENS // (settings.seq_len or TRAINING_TOKENS))
    rows = min(settings.held_out_windows, max(-(-settings.held_out_windows // 8), enough))
    return settings.model_copy(update={"held_out_windows": rows})


def elastic_cost(settings: RecoverSettings, scores: int) -> float:
    """Returns what an elastic adapter and its scores cost, in full recoveries; less where there is less held-out text than asked for."""
    if not scores:
        return 0.0
    elastic, settings = ElasticSettings(), scored(settings)
    return cost_of(settings, settings.held_out_windows, max(1, round(elastic.fidelity * settings.steps)), scores, elastic.vectors)


def candidate_cost(settings: RecoverSettings, start: float, stop: float) -> float:
    """Returns what it costs to take one candidate from one share of the steps to another, in full recoveries, with its looks."""
    first, last = (max(1, round(share * settings.steps)) if share else 0 for share in (start, stop))
    looks = last // settings.eval_every - first // settings.eval_every + (last % settings.eval_every > 0)
    return cost_of(settings, settings.held_out_windows, last - first, max(1, looks))


def placed(settings: RecoverSettings) -> RecoverSettings:
    """Returns the settings with paths that hold wherever the measuring is done: other processes may stand in other folders."""
    teacher = settings.teacher
    if teacher is not None and Path(teacher).is_dir():
        teacher = str(Path(teacher).absolute())
    data = settings.data.absolute() if settings.data is not None else None
    cache = settings.teacher_cache.absolute() if settings.teacher_cache is not None else None
    return settings.model_copy(update={"teacher": teacher, "data": data, "teacher_cache": cache})


@final
@dataclass(frozen=True)
class Measuring:
    """Everything that measuring needs; hashable, and to be pickled between processes of one search.

    Attributes:
        source: The pruned model.
        load: How it is loaded.
        recover: Of a full recovery.
        space: The rank space, as JSON.
        folder: Where unfinished recoveries are kept, so that whoever measures on goes on from them.
        seed: Of the division of the data.
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
            RegraftError: They cannot be used here.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        return OpenMeasure(self)


@final
class OpenMeasure:
    """Measures rank vectors of one model.

    Args:
        spec: Of what.
    """

    def __init__(self, spec: Measuring) -> None:
        space = from_json(RankSpace, spec.space)
        loaded = load(spec.source, spec.load)
        teacher = load_teacher(spec.recover, spec.load, loaded.provenance.source if loaded.provenance else None)
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
        """Measures jobs that have everything but the ranks in common.

        Raises:
            TrainingError: A candidate does not fit into the GPU's memory.
            RegraftError: Something is wrong with all of them.
        """
        first, vectors = jobs[0], [job.ranks for job in jobs]
        try:
            if first.kind == "elastic":
                return self._elastic.measure(vectors, first.seed)
            return self._candidates[first.phase].measure(vectors, first.fidelity, first.seed)
        except torch.OutOfMemoryError:
            raise TrainingError("it does not fit into the GPU's memory; lower --batch or --seq-len") from None


def candidates_at_once(view: ModelView, settings: RecoverSettings) -> int:
    """Returns how many candidates one process trains in one pass: as many as :class:`Candidates` puts together by itself."""
    if view.model.device.type != "cpu":
        return _AT_ONCE_ON_A_GPU
    values = settings.batch * (settings.seq_len or TRAINING_TOKENS) * view.width
    return max(1, PASS_VALUES // values)
