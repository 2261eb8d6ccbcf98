"""Elastic adapter: one adapter trained at many ranks at once, so that a forward pass scores any rank vector.

The adapter has the largest rank in every slot. Every step trains a few rank vectors in one pass. Each vector uses the leading rows of A
and columns of B, as many as its ranks, so that the leading ones learn to work without the others [VAL22]. The vectors are drawn at
random within the budget, independently for each slot, because only such vectors are scored later. The sandwich rule of [YU19] (the
smallest and the largest vector in every step) would spend half of the passes outside the budget.

All scores come from one trained adapter: vectors differ in the rows that they leave out, not in what separate trainings would have
learned. Scores rank vectors but do not measure recoveries. :func:`agreement` measures how well they rank, and the finalists of a search
are always recovered.

References:
    [VAL22] Valipour and others, DyLoRA, arXiv 2210.07558, section 4. [YU19] Yu and Huang, arXiv 1903.05134, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from regraft.adapters import ParameterGroup
from regraft.adapters.linear_like import shape_of
from regraft.adapters.nested_init import first_rows
from regraft.adapters.seeding import derived_seed
from regraft.allocation.fill import random_vectors
from regraft.errors import InputError
from regraft.paired.partial_runs import PartialRun, PartialRuns
from regraft.paired.setup import PairedSetup
from regraft.paired.side_by_side import SCALES, Factors, adapted, check_adapter
from regraft.plans import ALPHA_PER_RANK, RankSpace, RankTrial
from regraft.training.optimizer import make_optimizer

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class ElasticSettings:
    """Settings for training the elastic adapter.

    Attributes:
        fidelity: Number of steps as a share of a full recovery's, with a complete schedule, because the training is never continued.
        vectors: Number of rank vectors in one step.
        sandwich: Whether two of these vectors are the smallest and the largest one.
    """

    fidelity: float = 0.25
    vectors: int = 2
    sandwich: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.fidelity <= 1.0:
            raise InputError(f"fidelity {self.fidelity} is not in (0, 1]; it is the share of a full recovery's steps")
        least = 3 if self.sandwich else 1
        if self.vectors < least:
            raise InputError(f"an elastic adapter needs {least} rank vectors a step or more, not {self.vectors}")


@final
class Elastic:
    """Scoring of rank vectors by one elastic adapter.

    Args:
        setup: The model and the data.
        space: Space of the rank vectors.
        settings: Settings of the training.
        folder: Folder for the trained adapter; None keeps it in memory.

    Raises:
        InputError: The settings of the setup name an adapter that cannot be trained with others in one pass.
    """

    def __init__(
        self, setup: PairedSetup, space: RankSpace, settings: ElasticSettings | None = None, *, folder: Path | None = None
    ) -> None:
        check_adapter(setup.settings.adapter)
        self.setup = setup
        self.space = space
        self.settings = settings or ElasticSettings()
        self._kept = PartialRuns(folder)
        self._trained: tuple[int, _Nested, Ranks, float] | None = None

    def measure(self, ranks: Sequence[Ranks], seed: int) -> list[RankTrial]:
        """Scores rank vectors, after training the adapter if it is not trained yet.

        Args:
            ranks: Rank vectors of the space.
            seed: Seed of batches, initial values, dropout and the trained vectors.

        Returns:
            One trial of kind ``elastic`` for each vector, in order. The cost of the vector that the adapter was trained for, the first of
            the first call, includes the training, also when it is scored again: so a search costs the same however often it was killed.
            A loss that is not finite gives a trial without a loss.
        """
        setup = self.setup
        with setup.ready(seed):
            nested, payer, training_cost = self._adapter(seed, ranks)
            losses = torch.cat([nested.look([vector]) for vector in ranks]) if ranks else torch.zeros(0)
        trials: list[RankTrial] = []
        for vector, loss in zip(ranks, losses.tolist(), strict=True):
            cost = setup.cost(0, 1) + (training_cost if vector == payer else 0.0)
            finite = np.isfinite(loss)
            note = "" if finite else f"the held-out loss of the elastic adapter is {loss}"
            trials.append(RankTrial(vector, loss if finite else None, 1.0, cost, "elastic", seed, note))
        return trials

    def _adapter(self, seed: int, ranks: Sequence[Ranks]) -> tuple[_Nested, Ranks, float]:
        """Returns the trained adapter of a seed, the rank vector whose score bears the cost of the training, and that cost."""
        if self._trained is None or self._trained[0] != seed:
            self._trained = seed, *self._opened(seed, ranks)
        return self._trained[1:]

    def _opened(self, seed: int, ranks: Sequence[Ranks]) -> tuple[_Nested, Ranks, float]:
        """Trains an adapter, or reads one that was trained before."""
        setup, settings = self.setup, self.settings
        steps = max(1, round(settings.fidelity * setup.settings.steps))
        space = (self.space.choices, self.space.budget, [slot.modules for slot in self.space.slots])
        key = setup.key(seed, "elastic", space, asdict(settings))
        nested = _Nested(setup, self.space, seed)
        kept = self._kept.get(key)
        if kept is None:
            self._train(nested, steps, seed)
            cost = setup.cost(steps, 0, settings.vectors)
            kept = PartialRun(steps, math.nan, nested.taken(), math.nan, cost, ranks[0] if ranks else ())
            self._kept.put(key, kept)
        else:
            nested.put(kept.tensors)
        return nested, kept.ranks, kept.cost

    def _train(self, nested: _Nested, steps: int, seed: int) -> None:
        setup = self.setup.settings
        peak = self.setup.lr
        ratios = (1.0, setup.lr_ratio)
        optimizer = make_optimizer([ParameterGroup(part, peak * ratio) for part, ratio in zip(nested.parts, ratios, strict=True)])
        generator = np.random.default_rng(derived_seed(seed, "elastic"))
        for step in range(steps):
            torch.manual_seed(derived_seed(seed, "step", step))
            nested.step(step, self._vectors(generator))
            torch.nn.utils.clip_grad_norm_([*nested.parts[0], *nested.parts[1]], setup.max_grad_norm)
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = peak * ratio * self.setup.learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()

    def _vectors(self, generator: np.random.Generator) -> list[Ranks]:
        """Returns the rank vectors for one training step."""
        smallest = (self.space.choices[0],) * len(self.space.slots)
        largest = tuple(max(rank for rank in self.space.choices if rank <= slot.limit) for slot in self.space.slots)
        fixed = [smallest, largest] if self.settings.sandwich else []
        return fixed + random_vectors(self.space, self.settings.vectors - len(fixed), frozenset(), generator)


def agreement(scored: Sequence[RankTrial], recovered: Sequence[RankTrial]) -> float:
    """Returns Spearman's correlation of elastic scores with the losses of real recoveries, over the vectors that have both.

    Raises:
        InputError: Fewer than three vectors have both, or either is constant.
    """
    scores = {trial.ranks: trial.loss_nats for trial in scored if trial.kind == "elastic" and trial.loss_nats is not None}
    losses = {trial.ranks: trial.loss_nats for trial in recovered if trial.kind == "recovery" and trial.loss_nats is not None}
    common = sorted(scores.keys() & losses.keys())
    first, second = [scores[vector] for vector in common], [losses[vector] for vector in common]
    if len(common) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        raise InputError(f"{len(common)} rank vectors have an elastic score and a recovery; a correlation needs three that differ")
    return float(spearmanr(first, second).statistic)  # pyright: ignore[reportAttributeAccessIssue]


@final
class _Nested:
    """An adapter of the largest rank; a rank vector uses the leading part of it in every slot."""

    def __init__(self, setup: PairedSetup, space: RankSpace, seed: int) -> None:
        self._setup, self._seed = setup, seed
        self._slot_of = {module: index for index, slot in enumerate(space.slots) for module in slot.modules}
        self._sites = {name: setup.sites[name] for name in self._slot_of}
        self._a: dict[str, nn.Parameter] = {}
        self._b: dict[str, nn.Parameter] = {}
        for name, site in self._sites.items():
            rows, columns = shape_of(site)
            rank = max(choice for choice in space.choices if choice <= space.slots[self._slot_of[name]].limit)
            self._a[name] = nn.Parameter(first_rows(name, rank, columns, seed).to(setup.device))
            self._b[name] = nn.Parameter(torch.zeros(rows, rank, device=setup.device))

    @property
    def parts(self) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        """All parameters A, and all parameters B."""
        return tuple(self._a.values()), tuple(self._b.values())

    def step(self, step: int, vectors: Sequence[Ranks]) -> None:
        """Computes the mean gradient over some vectors, for one step."""
        with adapted(self._sites, lambda name: self._factors(name, vectors), lambda: self._setup.dropout):
            self._setup.train_step(self._seed, step, len(vectors))
        for parameter in (*self.parts[0], *self.parts[1]):
            if parameter.grad is not None:
                parameter.grad /= len(vectors)

    def look(self, vectors: Sequence[Ranks]) -> Tensor:
        """Returns the held-out loss of every vector, (K,) float64 in nats."""
        with torch.no_grad(), adapted(self._sites, lambda name: self._factors(name, vectors), lambda: 0.0):
            return self._setup.held_out_loss(len(vectors))

    def _factors(self, name: str, vectors: Sequence[Ranks]) -> Factors:
        ranks = [vector[self._slot_of[name]] for vector in vectors]
        a_RI, b_OR = self._a[name], self._b[name]
        most = max(ranks)
        device = a_RI.device
        used_KR = torch.arange(most, device=device)[None] < torch.tensor(ranks, device=device)[:, None]
        scale = SCALES[self._setup.settings.adapter]
        scales = [scale(ALPHA_PER_RANK * rank, rank) for rank in ranks]
        b_KOR = b_OR[:, :most].expand(len(ranks), -1, -1)
        return Factors(a_RI[:most] * used_KR[:, :, None], b_KOR, torch.tensor(scales, device=device).reshape(-1, 1, 1))

    def taken(self) -> dict[str, Tensor]:
        """Returns copies of the factors by name."""
        tensors = {f"{name}.A": value for name, value in self._a.items()} | {f"{name}.B": value for name, value in self._b.items()}
        return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores the factors from the result of :meth:`taken`."""
        with torch.no_grad():
            for name in self._sites:
                self._a[name].copy_(tensors[f"{name}.A"])
                self._b[name].copy_(tensors[f"{name}.B"])
