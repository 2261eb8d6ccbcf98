"""Bolaco's search of ranks: Bayesian optimisation of the compressed model's loss on text, with the machinery for adapter ranks.

A slot is a kind of projection, queries and keys together, in one group of layers; what is searched is the share of its dense size that it
keeps, in per cent, so that every vector of the space meets the budget and no other is ever measured (arXiv 2405.10616, section 3.2).
100 per cent leaves a layer dense. Values stay dense, as in the paper, unless the budget leaves no other way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from regraft.allocation import ALLOCATORS, ClosedForm, Rung, Schedule, winner
from regraft.atomic import atomic_file
from regraft.compression import rank_at_share, settle
from regraft.errors import InputError, shown
from regraft.models.load import load
from regraft.models.precision import float32_on_cpu
from regraft.numerics.divergence import log_probabilities, summed_divergence
from regraft.numerics.truncation import Truncation
from regraft.plans import FactorSite, FactorSpace, RankSlot, RankSpace, RankTrial, from_json, to_json
from regraft.progress import Say
from regraft.search.contract import Job
from regraft.search.measurers import pool_of
from regraft.search.run import open_search, search
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import open_storage
from regraft.settings import LoadSettings
from regraft.surgery.trial_ranks import TrialModel

LEAST_PERCENT, STEP_PERCENT = 20, 2
TIED = {"k_proj": "q_proj"}
UNTOUCHED = ("v_proj",)
_TERMS, _WINDOWS = "decompositions.safetensors", "windows"


@final
@dataclass(frozen=True)
class Objective:
    """Measures rank vectors of one model by perplexity and divergence on text.

    Attributes:
        trial: A copy of the model that ranks are put into.
        space: The space of ranks.
        slots: The slots of the search and their choices.
        windows_NT: Text that the vectors are judged on, int64 (windows, tokens); never test text.
        aims: Log-probabilities of the dense model, one tensor for each window.
        kl_weight: Weight of the divergence, which is added to the perplexity.
    """

    trial: TrialModel
    space: FactorSpace
    slots: RankSpace
    windows_NT: Tensor
    aims: tuple[Tensor, ...]
    kl_weight: float

    @classmethod
    @torch.no_grad()
    def over(cls, trial: TrialModel, space: FactorSpace, slots: RankSpace, windows_NT: Tensor, kl_weight: float) -> Objective:
        """Returns the objective of a copy in which no layer is truncated yet."""
        with float32_on_cpu(trial.model):
            device = trial.model.device
            logits = (trial.model(input_ids=window.unsqueeze(0).to(device), use_cache=False).logits for window in windows_NT)
            return cls(trial, space, slots, windows_NT, tuple(log_probabilities(one) for one in logits), kl_weight)

    def open(self, threads: int | None = None) -> Objective:
        """Returns itself: everything is here."""
        return self

    def __call__(self, jobs: Sequence[Job]) -> Sequence[RankTrial]:
        """Returns one trial for each job: perplexity plus the weighted divergence per token from the dense model."""
        return [RankTrial(job.ranks, self.of(job.ranks), job.fidelity, 1.0, job.kind, job.seed) for job in jobs]

    @torch.no_grad()
    def of(self, percents: Sequence[int]) -> float:
        """Returns the objective of a vector of shares."""
        self.trial.set(factored_ranks(self.space, self.slots, percents))
        nats = divergence = 0.0
        with float32_on_cpu(self.trial.model):
            for window, aim in zip(self.windows_NT, self.aims, strict=True):
                ids = window.unsqueeze(0).to(self.trial.model.device)
                now = log_probabilities(self.trial.model(input_ids=ids, use_cache=False).logits)
                nats -= float(now[0, :-1].gather(1, ids[0, 1:, None]).sum())
                divergence += float(summed_divergence(now, aim))
        count, width = self.windows_NT.shape
        return math.exp(min(nats / (count * (width - 1)), 100.0)) + self.kl_weight * divergence / (count * width)


@final
@dataclass(frozen=True)
class Elsewhere:
    """All that another process, or another machine with the same folders, needs to measure rank vectors; hashable.

    Attributes:
        source: The dense model.
        load: How it is loaded.
        file: The decompositions and the text, which :func:`write_terms` wrote.
        space: The space of ranks, as JSON.
        slots: The slots of the search, as JSON.
        kl_weight: Weight of the divergence.
    """

    source: str
    load: LoadSettings
    file: Path
    space: str
    slots: str
    kl_weight: float

    def open(self, threads: int | None = None) -> Objective:
        """Loads the model and the decompositions.

        Raises:
            RegraftError: They cannot be used on this machine.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        truncations, windows_NT = read_terms(self.file)
        trial = TrialModel(load(self.source, self.load).model, truncations)
        return Objective.over(trial, from_json(FactorSpace, self.space), from_json(RankSpace, self.slots), windows_NT, self.kl_weight)


@dataclass(frozen=True)
class RankSearch:
    """How ranks are searched.

    Attributes:
        trials: Vectors to measure; the uniform one is the first.
        layer_groups: Groups of adjacent layers with shares of their own.
        kl_weight: Weight of the divergence, which is added to the perplexity.
        identity: Whatever would change the result.
        folder: Where the trials are kept, and what other processes read.
        seed: Seed for the proposals.
        resume: Continue with the trials of an earlier run.
        workers: Number of measuring processes.
        storage: URL of a database that several machines share, or None for a file in the folder.
        ray: Address of a Ray cluster, or None.
        source: Where other processes load the model; None where it is in memory only.
        load: How they load it.
    """

    trials: int
    layer_groups: int
    kl_weight: float
    identity: Mapping[str, object]
    folder: Path
    seed: int
    resume: bool = False
    workers: int = 1
    storage: str | None = None
    ray: str | None = None
    source: str | None = None
    load: LoadSettings = field(default_factory=LoadSettings)

    @property
    def here(self) -> bool:
        """Whether this process measures."""
        return self.workers == 1 and self.ray is None


def searched_ranks(
    model: PreTrainedModel, truncations: Mapping[str, Truncation], space: FactorSpace, windows_NT: Tensor, how: RankSearch, say: Say
) -> tuple[int, ...]:
    """Returns the rank vector with the least objective of those that were measured, what is left of the budget spent.

    Args:
        model: The dense model; it is left as it is.
        truncations: Decompositions of its layers, by name.
        space: The space of ranks.
        windows_NT: Text that the vectors are judged on, int64 (windows, tokens).
        how: How ranks are searched.
        say: Called with a line for every trial.

    Raises:
        InputError: No share meets the budget.
        StorageError: There are trials and ``resume`` is off, or they are of another search.
    """
    slots = slots_of(space, how.layer_groups)
    learner = ALLOCATORS.get("bayes")
    assert not isinstance(learner, ClosedForm)
    schedule = Schedule(rungs=(Rung(1.0, max(2, how.trials)),), elastic=0, batch=2, cost_limit=float(max(2, how.trials)))
    sampler = AllocatorSampler(slots, learner, schedule, how.seed)

    def told(job: Job, result: RankTrial) -> None:
        found = result.note or f"objective {result.loss_nats:.4f}"
        say(f"{job.origin}: keeps {' '.join(f'{percent} %' for percent in job.ranks)}, {found}")

    with ExitStack() as stack:
        storage = open_storage(how.storage, how.folder)
        stack.callback(storage.close)
        mark = json.dumps(dict(how.identity), sort_keys=True)
        name = f"compress-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"
        opened = open_search(storage, name, slots, sampler, mark, resume=how.resume or storage.shared)
        if how.here:
            spec = Objective.over(TrialModel(model, truncations), space, slots, windows_NT, how.kl_weight)
        else:
            spec = _elsewhere(truncations, space, slots, windows_NT, how)
            stack.callback(spec.file.unlink, missing_ok=True)
        on_gpu = model.device.type == "cuda"
        pool = stack.enter_context(pool_of(spec, how.workers, how.ray, on_gpu=on_gpu, say=say))
        results = [result for _, result in search(opened, sampler, pool, told)]
    best = winner(slots, results, learner)
    ranks = factored_ranks(space, slots, best)
    return settle(space, [ranks.get(site.name, site.full_rank) for site in space.sites])


def _elsewhere(
    truncations: Mapping[str, Truncation], space: FactorSpace, slots: RankSpace, windows_NT: Tensor, how: RankSearch
) -> Elsewhere:
    assert how.source is not None, "a model that is in memory only is refused before"
    source = str(Path(how.source).absolute()) if Path(how.source).exists() else how.source
    file = how.folder.absolute() / _TERMS
    write_terms(file, truncations, windows_NT)
    return Elsewhere(source, how.load, file, to_json(space), to_json(slots), how.kl_weight)


def write_terms(file: Path, truncations: Mapping[str, Truncation], windows_NT: Tensor) -> None:
    """Writes decompositions and the text that vectors are judged on, for other processes."""
    tensors = {_WINDOWS: windows_NT.contiguous()}
    for name, one in truncations.items():
        parts = {"left": one.left_OK, "right": one.right_KI, "price": one.price_K, "mean_in": one.mean_I, "mean_out": one.mean_O}
        tensors |= {f"{name}:{part}": value.detach().cpu().contiguous() for part, value in parts.items() if value is not None}
    with atomic_file(file) as partial:
        save_file(tensors, partial)


def read_terms(file: Path) -> tuple[dict[str, Truncation], Tensor]:
    """Returns what :func:`write_terms` wrote.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the decompositions in '{file}' cannot be read ({shown(error)}); repeat the command with `resume`") from None
    windows_NT = tensors.pop(_WINDOWS)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(":")
        parts.setdefault(name, {})[part] = value
    found = {
        name: Truncation(one["left"], one["right"], one["price"], one.get("mean_in"), one.get("mean_out")) for name, one in parts.items()
    }
    return found, windows_NT


def slots_of(space: FactorSpace, layer_groups: int) -> RankSpace:
    """Returns the shares that are searched, in per cent: one for each kind of projection in each group of layers.

    Raises:
        InputError: Even the smallest shares store more than the budget.
    """
    touched = [site for site in space.sites if site.kind not in UNTOUCHED]
    free = space.budget - sum(site.rows * site.columns for site in space.sites if site.kind in UNTOUCHED)
    if free < sum(_least(site) for site in touched):
        touched, free = list(space.sites), space.budget
    layers = 1 + max(site.layer for site in space.sites)
    groups = min(layer_groups, layers)
    members: dict[str, list[FactorSite]] = {}
    for site in touched:
        part = site.layer * groups // layers
        name = TIED.get(site.kind, site.kind) if groups == 1 else f"{TIED.get(site.kind, site.kind)}.{part}"
        members.setdefault(name, []).append(site)
    cost = {name: sum(_percent(site) for site in sites) for name, sites in members.items()}
    uniform = free // sum(cost.values())
    choices = tuple(range(LEAST_PERCENT, 100 + STEP_PERCENT, STEP_PERCENT))
    if uniform < choices[0]:
        raise InputError(
            f"the budget leaves {uniform} % of the layers, and ranks bayes keeps at least {choices[0]} % of each; lower ratio, or use "
            "ranks knapsack"
        )
    slots = tuple(
        RankSlot(name, tuple(site.name for site in sites), min(site.layer for site in sites), cost[name], 100)
        for name, sites in members.items()
    )
    even = max(choice for choice in choices if choice <= uniform)
    return RankSpace(space.fingerprint, "module", slots, choices, free, even)


def factored_ranks(space: FactorSpace, slots: RankSpace, percents: Sequence[int]) -> dict[str, int]:
    """Returns the rank of every layer that a vector of shares does not leave dense."""
    share = {name: percent / 100.0 for slot, percent in zip(slots.slots, percents, strict=True) for name in slot.modules}
    ranks = {site.name: rank_at_share(space, site, share[site.name]) for site in space.sites if site.name in share}
    full = {site.name: site.full_rank for site in space.sites}
    return {name: rank for name, rank in ranks.items() if rank < full[name]}


def _percent(site: FactorSite) -> int:
    """Returns the parameters of one per cent of a layer, rounded up, so that the budget holds."""
    return -(-site.rows * site.columns // 100)


def _least(site: FactorSite) -> int:
    return LEAST_PERCENT * _percent(site)
