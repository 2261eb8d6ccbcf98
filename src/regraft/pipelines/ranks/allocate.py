"""Rank search for every layer of a model: measure features, search, confirm, and write the plan with its report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from regraft.adapters.seeding import derived_seed
from regraft.allocation import (
    ALLOCATORS,
    MOST_FINALISTS,
    PAST,
    PRIOR,
    ClosedForm,
    Learner,
    Ranks,
    Schedule,
    add_to_store,
    confirm,
    finalists,
    rank_plan,
    rank_space,
    winner,
)
from regraft.atomic import atomic_folder, json_with, refuse_special, reserved_file, sha256_of, write_text
from regraft.data.tokens import window_tokens
from regraft.errors import InputError
from regraft.models.card import model_card
from regraft.models.folder import write_folder
from regraft.models.live import ModelLike, take
from regraft.models.load import Loaded, device_named, require_tokenizer
from regraft.models.provenance import parents_of, versions
from regraft.models.save import save
from regraft.models.view import ModelView
from regraft.paired.elastic import agreement
from regraft.paired.side_by_side import check_adapter
from regraft.pipelines.ranks.cost import SHORTEST, confirming_cost, learns_from_scores, schedule_of
from regraft.pipelines.ranks.files import REPORT, past_search, texts_of
from regraft.pipelines.ranks.layer_features import bare_slots, measured_slots
from regraft.pipelines.ranks.measuring import Measuring, candidates_at_once, placed
from regraft.pipelines.ranks.start import decisive, started
from regraft.pipelines.recover import training_corpora
from regraft.pipelines.results import Saving
from regraft.pipelines.run.folder import open_run
from regraft.pipelines.texts import Texts, in_memory, path_in, read
from regraft.plans import Confirmation, Provenance, RankPlan, RankSearch, RankSpace, RankTrial, from_json, to_json
from regraft.progress import Say, say_nothing
from regraft.search.contract import Job
from regraft.search.measurers import check_measurers, pool_of
from regraft.search.pools import Pool
from regraft.search.run import measure_all, open_search, search
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import open_storage
from regraft.settings import TRAINING_TOKENS, AllocateSettings, LoadSettings, RecoverSettings, takes_settings, with_keywords

SPACE = "space.json"
_RECOVERIES = ".recoveries"
_FEW_STEPS = 20  # with fewer steps, gains of ranks are not measurable yet
_CHOSEN_BY_THE_SEARCH = ("rank", "rank_pattern", "alpha", "patience")


@dataclass(frozen=True, repr=False)
class RankResult(Saving):
    """Result of a search for ranks.

    Attributes:
        search: What was measured, found and confirmed.
        loaded: The model.
        identity: Whatever would change the result, as plain JSON types.
    """

    search: RankSearch
    loaded: Loaded
    identity: Mapping[str, Any]

    @property
    def plan(self) -> RankPlan:
        """A rank for every module, for ``recover(ranks=...)``."""
        return self.search.plan

    @property
    def report(self) -> str:
        """Report of how the ranks were found, in Markdown."""
        return self.files()[REPORT]

    def __repr__(self) -> str:
        """Returns the method and the verdict, in one line."""
        return f"RankResult({self.plan.method}: {self.search.verdict})"

    def files(self) -> dict[str, str]:
        """Returns the texts that tell of the search, by file name."""
        return texts_of(self.search, self.loaded, self.identity)

    def save_pretrained(self, folder: str | Path, *, replace: bool = False) -> Provenance:
        """Saves the plan, the report, every trial, and what PEFT needs of the plan.

        Raises:
            OutputError: The folder exists or cannot be written.
        """
        record = Provenance(
            command="regraft.allocate_ranks",
            source=self.loaded.source,
            source_fingerprint=self.loaded.fingerprint,
            seed=int(self.identity["seed"]),
            versions=versions(),
            ranks=self.plan,
            settings={"allocate": self.identity["allocate"], "recover": self.identity["recover"]},
            parents=parents_of(self.loaded.provenance),
        )
        with atomic_folder(Path(folder), replace=replace) as partial:
            for name, text in self.files().items():
                write_text(partial / name, text)
            return write_folder(partial, record, self.report)


@takes_settings(AllocateSettings, RecoverSettings, LoadSettings)
def allocate_ranks(
    model: ModelLike,
    output: str | Path | None = None,
    settings: AllocateSettings | None = None,
    recover: RecoverSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Texts | None = None,
    load: LoadSettings | None = None,
    seed: int = 0,
    resume: bool = False,
    work: Path | None = None,
    say: Say = say_nothing,
    **keywords: Any,
) -> RankResult:
    """Searches ranks and writes the plan.

    Next to ``plan.json``, the folder ``plan.search`` holds the report, every trial, the features of the slots, and the search's storage
    unless another is given. Several calls with one shared storage, on one machine or on many, share one search.

    Args:
        model: A pruned model: a ``PreTrainedModel`` in memory, which is left as it is; or a folder, a hub id, or ``seedling``.
        output: File of the plan, ``.json``; None writes nothing.
        settings: Method, budget and how the search is run.
        recover: Settings of the recovery that the ranks are for: data, steps, learning rate, teacher.
        tokenizer: The tokenizer for a model in memory.
        data: What the recovery is to learn: a file, texts, or a data set.
        load: How a folder or hub id is loaded.
        seed: Seed for everything random.
        resume: Go on with a search that was stopped; with none there, begin.
        work: Where the search is kept without an output; it stays, and a search that was stopped goes on there.
        say: Called with one line for each thing a user wants to know.
        **keywords: Single settings by name, of the search or of the recovery.

    Raises:
        OutputError: The plan or its folder exists, or cannot be written.
        StorageError: The storage is locked, corrupt or unreachable.
        RegraftError: Anything else that the user can mend, in one line.
    """
    given = (settings or AllocateSettings(), recover or RecoverSettings(), load or LoadSettings())
    settings, recover, load = with_keywords("regraft.allocate_ranks", keywords, *given)
    if data is not None:
        recover = recover.model_copy(update={"data": path_in(data)})
    check_settings(settings, recover)
    order = _Order(model, tokenizer, in_memory(data), settings, recover, load, seed, resume, say)
    if output is None:
        with nullcontext(work) if work is not None else TemporaryDirectory(prefix="regraft-") as kept:
            request = order.request(Path(kept))
            write_space(request, Path(kept))
            return request.result(find_ranks(request, Path(kept), Path(kept), resume=True))
    output = Path(output)
    if output.suffix != ".json":
        raise InputError(f"`output={output}` is not the name of a JSON file; write it as {output}.json")
    with reserved_file(output, json_with("ranks", "alpha_per_rank") if resume else lambda content: False):
        return _allocated(order, output)


@dataclass(frozen=True)
class _Order:
    """Order of one call; the fields are the parameters of :func:`allocate_ranks`."""

    model: ModelLike
    tokenizer: PreTrainedTokenizerBase | None
    texts: Texts | None
    settings: AllocateSettings
    recover: RecoverSettings
    load: LoadSettings
    seed: int
    resume: bool
    say: Say

    def request(self, beside: Path) -> SearchOrder:
        """Loads the model; puts what is in memory into a folder, since whoever measures may be another process."""
        loaded = take(self.model, self.tokenizer, self.load)
        recover = self.recover
        if self.texts is not None:
            recover = recover.model_copy(update={"data": _written(self.texts, beside)})
        return SearchOrder(loaded, self._source(loaded, beside), self.settings, recover, self.load, self.seed, self.say)

    def _source(self, loaded: Loaded, beside: Path) -> str:
        if isinstance(self.model, str | Path | Loaded):
            return loaded.source
        folder = beside / "model"
        record = Provenance("regraft.allocate_ranks", loaded.source, loaded.fingerprint, self.seed, versions())
        record = replace(record, parents=parents_of(loaded.provenance))
        save(loaded.model, require_tokenizer(loaded), folder, record, model_card(record), replace=True)
        return str(folder)


def _written(texts: Texts, folder: Path) -> Path:
    """Writes text that was given in memory into a file."""
    corpus = read(texts, "train", "data")
    rows: list[dict[str, Any]] = [{"text": text} for text in corpus.documents]
    for record in corpus.records:
        plain = {"instruction": record.instruction, "input": record.input, "output": record.output}
        rows.append({"messages": record.messages()} if record.system or record.history else plain)
    path = folder / "data.jsonl"
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _allocated(order: _Order, output: Path) -> RankResult:
    """Finds ranks, with everything that is measured in a folder beside the plan."""
    if order.settings.storage is not None:
        open_storage(order.settings.storage, output.parent).close()  # a wrong storage is refused before anything is computed
    with TemporaryDirectory(prefix="regraft-") as aside:
        request = order.request(Path(aside))
        search = output.with_suffix(".search")
        if search.exists() and not order.resume:
            training_corpora(request.recover, request.seed, request.loaded)  # data that cannot be read are said before a search left there
        with open_run(search, request.identity(), resume=order.resume, say=order.say) as folder:
            slots = folder.stage("slots", request.identity(), lambda partial: write_space(request, partial))
            result = request.result(find_ranks(request, slots, folder.path, resume=order.resume))
            for name, text in result.files().items():
                folder.write(name, text)
            write_text(output, to_json(result.plan) + "\n")
    return result


def check_settings(settings: AllocateSettings, recover: RecoverSettings) -> None:
    """Checks the settings that need no model.

    Raises:
        InputError: The method or the adapter is not possible, or two settings contradict each other.
        MissingDependencyError: Ray is requested and not installed.
    """
    check_adapter(recover.adapter)
    if recover.epochs is not None:
        raise InputError("`epochs` is for recoveries; a search for ranks counts in `steps`: give these")
    schedule_of(settings, recover)
    if isinstance(started(settings), ClosedForm) and settings.store is not None:
        raise InputError(f"`store` keeps searches, and method '{settings.method}' makes none; leave it out")
    if settings.store is not None and settings.store.is_file():
        raise InputError(f"`store` '{settings.store}' is a file; name a folder, which is made if it is not there")
    if settings.store is not None:
        refuse_special(settings.store / PAST)  # what it would be written to is looked at before anything is computed
    if settings.elastic not in ("auto", 0) and not learns_from_scores(settings.method):
        raise InputError(f"`elastic={settings.elastic}` has no effect on method '{settings.method}'; leave it out")
    if settings.confirm_seeds == 1:
        raise InputError("`confirm_seeds=1` gives no interval; use 2 or more, or 0 to take the ranks as they are found")
    check_measurers(settings.workers, settings.ray)


@dataclass(frozen=True)
class SearchOrder:
    """All inputs of a rank search.

    Attributes:
        loaded: The model.
        source: Source from which measuring processes load the model.
        settings: Settings of the search.
        recover: Settings of the recovery.
        load: Settings for loading the model.
        seed: Seed of every random draw.
        say: Called with one line at each step of progress.
    """

    loaded: Loaded
    source: str
    settings: AllocateSettings
    recover: RecoverSettings
    load: LoadSettings
    seed: int
    say: Say

    def result(self, found: RankSearch) -> RankResult:
        """Returns what was found, with what it was found for."""
        return RankResult(found, self.loaded, self.identity())

    def identity(self) -> dict[str, Any]:
        """Returns all inputs that would change the result, as plain JSON types."""
        return {
            "model": self.loaded.fingerprint,
            "allocate": decisive(self.settings),
            "recover": self.recover.decisive(varied=_CHOSEN_BY_THE_SEARCH),
            "held_out": self.recover.held_out,
            "teacher": self.recover.teacher,
            "load": self.load.model_dump(mode="json"),
            "data": sha256_of(self.recover.data) if self.recover.data is not None and self.recover.data.is_file() else "built in",
            "seed": self.seed,
        }


def write_space(request: SearchOrder, folder: Path) -> None:
    """Measures the features of the slots and writes the space of the search.

    Raises:
        InputError: The budget or a rank is out of range.
        PlanError: The method needs a feature that the slots lack.
        DataError: The text is too short.
    """
    settings = request.settings
    window_tokens(request.recover.seq_len, TRAINING_TOKENS, request.loaded.model.config, "seq_len")
    train, _ = training_corpora(request.recover, request.seed, request.loaded)
    bare = bare_slots(ModelView(request.loaded.model), settings.granularity)
    # Checked before anything is measured, so that errors come at once.
    rank_space(request.loaded.fingerprint, settings.granularity, [slot.plain() for slot in bare], settings.ranks, settings.budget)
    slots = measured_slots(request.loaded, bare, train, settings, request.recover, seed=request.seed, say=request.say)
    space = rank_space(request.loaded.fingerprint, settings.granularity, slots, settings.ranks, settings.budget)
    method = ALLOCATORS.get(settings.method)
    if isinstance(method, ClosedForm):
        method.allocate(space)
    write_text(folder / SPACE, to_json(space) + "\n")


def find_ranks(request: SearchOrder, slots: Path, work: Path, *, resume: bool) -> RankSearch:
    """Searches ranks; measurements are stored in a folder, so that a killed search can be resumed.

    Args:
        request: Inputs of the search.
        slots: Folder that :func:`write_space` wrote.
        work: A folder for this search alone.
        resume: Whether to continue a search in a shared storage.
    """
    space = from_json(RankSpace, (slots / SPACE).read_bytes())
    match started(request.settings):
        case ClosedForm() as method:
            ranks = method.allocate(space)
            plan = rank_plan(space, ranks, method.name)
            verdict = f"The method {method.name} decides from what is known of the layers."
            return RankSearch(plan, space, (), (), ranks, (), None, None, (), None, verdict)
        case learner:
            found = _searched(request, space, learner, work, resume=resume)
            if request.settings.store is not None:
                add_to_store(request.settings.store, past_search(found, request.loaded, request.identity()))
            return found


@dataclass(frozen=True)
class _Measured:
    """Measurements of a search.

    Attributes:
        pairs: Every job of the search with its trial, in order.
        found: The best vector.
        compared: The vectors that were measured again, beside uniform, on seeds that the search did not use.
        confirming: The trials of these.
    """

    pairs: Sequence[tuple[Job, RankTrial]]
    found: Ranks
    compared: Sequence[Ranks]
    confirming: list[RankTrial]

    @property
    def trials(self) -> list[RankTrial]:
        return [trial for _, trial in self.pairs]


def _searched(request: SearchOrder, space: RankSpace, learner: Learner, work: Path, *, resume: bool) -> RankSearch:
    schedule = schedule_of(request.settings, request.recover)
    for line in _announced(request, schedule):
        request.say(line)
    measured = _measured(request, space, AllocatorSampler(space, learner, schedule, request.seed), learner, work, resume)
    shutil.rmtree(work / _RECOVERIES, ignore_errors=True)
    return _result(request, space, learner, measured)


def _announced(request: SearchOrder, schedule: Schedule) -> Iterator[str]:
    """Yields what a user should know before a search begins."""
    settings, steps = request.settings, request.recover.steps
    yield (
        f"a search of at most {schedule.cost_limit + confirming_cost(settings, request.recover):.1f} full recoveries: "
        f"{schedule.elastic} scores by an elastic adapter, {settings.trials} short recoveries, {settings.confirm_seeds} seeds to confirm"
    )
    if SHORTEST * steps < _FEW_STEPS:
        yield (
            f"an eighth of {steps} steps is little more than the warm-up, which says little about ranks; "
            f"for a search that can be trusted raise `steps` to {8 * _FEW_STEPS} or more"
        )


def _measured(request: SearchOrder, space: RankSpace, sampler: AllocatorSampler, learner: Learner, work: Path, resume: bool) -> _Measured:
    """Measures what the sampler asks for, and then the finalists and uniform on fresh seeds."""
    settings = request.settings
    identity = json.dumps(request.identity(), sort_keys=True)
    name = f"regraft-{request.loaded.fingerprint}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    storage = open_storage(settings.storage, work)
    # A storage file in a folder that this process has locked belongs to it; opening the folder has already decided about resuming.
    opened = open_search(storage, name, space, sampler, identity, resume=resume or not storage.shared)
    alone = settings.ray is None and settings.workers == 1
    at_once = candidates_at_once(ModelView(request.loaded.model), request.recover) if alone else 1

    def say_result(job: Job, trial: RankTrial) -> None:
        result = trial.note or f"{trial.loss_nats:.4f} nats"
        share = "scored" if job.kind == "elastic" else f"{job.fidelity:.1%} of the steps"
        request.say(f"{job.origin}: ranks {' '.join(map(str, job.ranks))}, {share}: {result}")

    with _pool(request, space, work) as pool:
        pairs = search(opened, sampler, pool, say_result, at_once)
        trials = [trial for _, trial in pairs]
        found = winner(space, trials, learner)
        compared = finalists(space, trials, learner, found, _from_closed_forms(pairs)) if settings.confirm_seeds else ()
        confirming = measure_all(opened, _confirming(request, space, compared), pool, say_result, at_once)
    return _Measured(pairs, found, compared, confirming)


def _result(request: SearchOrder, space: RankSpace, learner: Learner, measured: _Measured) -> RankSearch:
    """Decides which ranks are used, and puts them beside all that was measured."""
    pairs, found = measured.pairs, measured.found
    confirmation, kept, verdict = _verdict(request, space, found, measured.compared, measured.confirming)
    refits = tuple(error for past in _rounds(pairs) if (error := learner.assess(space, past)) is not None)
    return RankSearch(
        plan=rank_plan(space, kept, learner.name if kept == found else f"{learner.name}, {_origin(space, pairs, kept)} kept"),
        space=space,
        trials=tuple(measured.trials),
        origins=tuple(job.origin for job, _ in pairs),
        found=found,
        confirming=tuple(measured.confirming),
        confirmation=confirmation,
        error=refits[-1] if refits else None,
        refits=refits,
        agreement=_agreement(measured.trials),
        verdict=verdict,
    )


def _rounds(pairs: Sequence[tuple[Job, RankTrial]]) -> Iterator[list[RankTrial]]:
    """Yields all trials up to the end of each round of real recoveries."""
    for last in sorted({job.round for job, _ in pairs if job.kind == "recovery"}):
        yield [trial for job, trial in pairs if job.round <= last]


def _agreement(trials: Sequence[RankTrial]) -> float | None:
    """Returns the rank correlation of elastic scores with the longest recoveries of at least three vectors, or None."""
    recovered = [trial for trial in trials if trial.kind == "recovery" and trial.loss_nats is not None]
    for fidelity in sorted({trial.fidelity for trial in recovered}, reverse=True):
        try:
            return agreement(trials, [trial for trial in recovered if trial.fidelity == fidelity])
        except InputError:  # fewer than three at this length
            continue
    return None


def _pool(request: SearchOrder, space: RankSpace, work: Path) -> Pool:
    """Returns whoever measures: this process, others on this machine, or a cluster."""
    settings = request.settings
    source = str(Path(request.source).absolute()) if Path(request.source).is_dir() else request.source
    spec = Measuring(source, request.load, placed(request.recover), to_json(space), work.absolute() / _RECOVERIES, request.seed)
    on_gpu = device_named(request.load.device).type == "cuda"
    return pool_of(spec, settings.workers, settings.ray, on_gpu=on_gpu, say=request.say)


def _from_closed_forms(pairs: Sequence[tuple[Job, RankTrial]]) -> set[Ranks]:
    """Returns the recovered vectors that came from a closed form, or from the prior alone."""
    names = {PRIOR, *(name for name in ALLOCATORS.names() if isinstance(ALLOCATORS.get(name), ClosedForm))}
    return {job.ranks for job, trial in pairs if job.kind == "recovery" and job.origin in names and trial.loss_nats is not None}


def _origin(space: RankSpace, pairs: Sequence[tuple[Job, RankTrial]], ranks: Ranks) -> str:
    """Returns the origin of a vector at its first measurement."""
    return "uniform" if ranks == space.uniform_ranks else next(job.origin for job, _ in pairs if job.ranks == ranks)


def _confirming(request: SearchOrder, space: RankSpace, compared: Sequence[Ranks]) -> list[Job]:
    """Returns the confirming jobs: the finalists and uniform on seeds that the search did not use; none without finalists.

    With fewer finalists than the maximum, the same cost pays for more seeds.
    """
    if not compared:
        return []
    share, vectors = request.settings.confirm_share, (space.uniform_ranks, *compared)
    count = request.settings.confirm_seeds * (1 + MOST_FINALISTS) // len(vectors)
    seeds = [derived_seed(request.seed, "confirm", index) % 2**31 for index in range(count)]
    return [
        Job("confirm", 0, len(vectors) * index + place, ranks, share, seed=seed, origin="finalist" if place else "uniform")
        for index, seed in enumerate(seeds)
        for place, ranks in enumerate(vectors)
    ]


def _verdict(
    request: SearchOrder, space: RankSpace, found: Ranks, compared: Sequence[Ranks], confirming: list[RankTrial]
) -> tuple[Confirmation | None, Ranks, str]:
    """Returns the confirmation, the ranks to use, and the result in words."""
    if request.settings.confirm_seeds == 0 and found != space.uniform_ranks:
        return None, found, "The ranks are taken as they were found; nothing confirms that they beat uniform ranks."
    try:
        confirmation = confirm(space, compared, confirming)
    except InputError as error:  # recoveries diverged on all but one seed
        return None, space.uniform_ranks, f"Uniform ranks are kept, since nothing could be confirmed: {error}"
    share = request.settings.confirm_share
    short = "" if share == 1.0 or not confirming else f" Compared after {share:.0%} of a full recovery's steps."
    return confirmation, confirmation.kept, confirmation.verdict + short
