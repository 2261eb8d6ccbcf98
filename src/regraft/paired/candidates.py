"""Measurement of rank vectors by short recoveries that differ only in the ranks.

All candidates of a seed see the same batches in the same order, start from the leading rows of the same matrices
(:mod:`regraft.adapters.nested_init`), have the same dropout and are evaluated on the same held-out rows. Several candidates train in one
pass (:mod:`regraft.paired.side_by_side`).

A fidelity below 1 is the first part of the full recovery, with the learning rates of the full schedule, and not a shorter schedule. Only
so can a survivor continue its training (all levels together cost as much as the longest one), and only so is fidelity 1 the intended
recovery. The disadvantage is that short measurements are taken at a high learning rate; the noise of that is common to all candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from regraft.adapters import AdapterRequest, LowRank, ParameterGroup, make_request
from regraft.adapters.seeding import derived_seed
from regraft.allocation.spaces import rank_plan
from regraft.errors import InputError
from regraft.paired.partial_runs import PartialRun, PartialRuns
from regraft.paired.setup import PairedSetup
from regraft.paired.side_by_side import SCALES, Stack, adapted, check_adapter, clip_each
from regraft.plans import RankSpace, RankTrial
from regraft.training.optimizer import make_optimizer

PASS_VALUES = 1 << 17
"""Largest number of hidden-state values in one pass on a CPU, which limits the candidates in a pass. Larger products exceed the cache."""


@dataclass(frozen=True)
class _Member:
    """A candidate while it trains."""

    place: int
    ranks: tuple[int, ...]
    request: AdapterRequest
    progress: PartialRun | None

    @property
    def steps(self) -> int:
        """Number of steps that it has made."""
        return self.progress.steps if self.progress else 0


@final
class Candidates:
    """Measurement of rank vectors by recoveries.

    Args:
        setup: The model and the data.
        space: Space of the rank vectors.
        together: Number of candidates in one pass; None for the fastest number (on a CPU) or as many as fit (on a GPU).
        folder: Folder for unfinished recoveries, so that other processes can continue them; None keeps them in memory.

    Raises:
        InputError: The settings name an adapter that cannot be trained with others in one pass.
    """

    def __init__(self, setup: PairedSetup, space: RankSpace, *, together: int | None = None, folder: Path | None = None) -> None:
        self.setup = setup
        self.space = space
        self._together = together
        self._kept = PartialRuns(folder)
        check_adapter(setup.settings.adapter)

    def measure(self, ranks: Sequence[tuple[int, ...]], fidelity: float, seed: int) -> list[RankTrial]:
        """Recovers every rank vector for a share of the steps, and continues recoveries that were measured for less before.

        Args:
            ranks: Rank vectors of the space.
            fidelity: Number of steps as a share of a full recovery's, in (0, 1].
            seed: Seed of batches, initial values and dropout.

        Returns:
            One trial for each vector, in order. Its loss is the lowest held-out loss that a recovery up to here would have measured,
            without the one before the first step: so candidates differ even if a short training harms at first. Its cost counts the
            steps and evaluations since the shorter measurement that it continues, if there is one. A measurement that is finished and
            stored is returned as it was, with its cost: so a search costs the same however often it was killed. A candidate whose loss
            is not finite becomes a trial without a loss.

        Raises:
            InputError: The fidelity is out of range.
            PlanError: A vector does not belong to the space.
            DataError: The data are fewer than one batch.
        """
        if not 0.0 < fidelity <= 1.0:
            raise InputError(f"fidelity {fidelity} is not in (0, 1]; it is the share of a full recovery's steps")
        until = max(1, round(fidelity * self.setup.settings.steps))
        members = [self._member(place, each, seed, until) for place, each in enumerate(ranks)]
        stored = {member.place: _finished(member, member.progress, seed) for member in members if member.progress and member.steps == until}
        begun = [self._at_its_beginning(member, seed, until) if member.place in stored else member for member in members]
        trials = dict(stored)
        with self.setup.ready(seed):
            for start in sorted({member.steps for member in begun}):
                for part in self._parts([member for member in begun if member.steps == start]):
                    if any(member.place not in stored for member in part):
                        trials |= self._recovered(part, start, until, seed)
        return [replace(trials[place], fidelity=fidelity) for place in range(len(members))]

    def change(self, ranks: tuple[int, ...], seed: int) -> dict[str, LowRank] | None:
        """Returns the present weight change of every module in the recovery of a vector; None before its first measurement.

        Args:
            ranks: The rank vector.
            seed: Seed of the recovery.
        """
        progress = self._kept.get(self._key(ranks, seed))
        if progress is None:
            return None
        request = make_request(self.setup.sites, self.setup.settings, rank_plan(self.space, ranks, "candidate"), seed)
        scale = SCALES[self.setup.settings.adapter]
        return {
            name: LowRank(scale(request.alphas[name], rank) * progress.tensors[f"{name}.B.value"], progress.tensors[f"{name}.A.value"])
            for name, rank in request.ranks.items()
        }

    def _member(self, place: int, ranks: tuple[int, ...], seed: int, until: int) -> _Member:
        plan = rank_plan(self.space, ranks, "candidate")
        request = make_request(self.setup.sites, self.setup.settings, plan, seed)
        progress = self._kept.get(self._key(ranks, seed))
        return _Member(place, ranks, request, progress if progress is not None and progress.steps <= until else None)

    def _at_its_beginning(self, member: _Member, seed: int, until: int) -> _Member:
        """Returns a member as it was before a measurement that was stored.

        A search that was killed while the members of a pass were stored trains all of them again: alone, the others would round
        differently, and the search would not end with the bytes of one that was not killed.
        """
        earlier = self._kept.earlier(self._key(member.ranks, seed))
        return replace(member, progress=earlier if earlier is not None and earlier.steps < until else None)

    def _key(self, ranks: tuple[int, ...], seed: int) -> str:
        named = {module: rank for slot, rank in zip(self.space.slots, ranks, strict=True) for module in slot.modules}
        return self.setup.key(seed, "candidate", named)

    def _parts(self, members: Sequence[_Member]) -> list[list[_Member]]:
        """Splits candidates into passes."""
        settings = self.setup.settings
        values = settings.batch * (settings.seq_len or 1) * self.setup.view.width
        fits = max(1, PASS_VALUES // values) if self.setup.device.type == "cpu" else len(members)
        size = self._together or fits
        left = iter(members)
        return [part for _ in range(0, len(members), size) if (part := list(islice(left, size)))]

    def _recovered(self, members: Sequence[_Member], start: int, until: int, seed: int) -> dict[int, RankTrial]:
        """Trains candidates in one pass, or in smaller passes if the GPU's memory is too small."""
        try:
            return self._trained(members, start, until, seed)
        except torch.OutOfMemoryError:
            if len(members) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(members) // 2
        return self._recovered(members[:half], start, until, seed) | self._recovered(members[half:], start, until, seed)

    def _trained(self, members: Sequence[_Member], start: int, until: int, seed: int) -> dict[int, RankTrial]:
        """Trains candidates that are at the same step; evaluates them at the steps of a recovery's evaluations and at the end."""
        setup, settings = self.setup, self.setup.settings
        trials: dict[int, RankTrial] = {}
        run = _Run(setup, members, start, seed)
        looks, seen = 0, torch.zeros(0)
        for step in range(start, until):
            losses = run.step(step)
            looked = (step + 1) % settings.eval_every == 0 or step + 1 == until
            seen = run.look() if looked else losses
            looks += looked
            alive = torch.isfinite(losses) & torch.isfinite(seen)
            for index, member in enumerate(run.members):
                if not alive[index]:
                    what, value = ("held-out", seen) if torch.isfinite(losses[index]) else ("training", losses)
                    note = f"the {what} loss became {float(value[index])} at step {step + 1}"
                    trials[member.place] = self._trial(member, None, step + 1 - start, looks, seed, note)
            if not alive.all():
                kept = torch.nonzero(alive).flatten().tolist()
                if not kept:
                    return trials
                run, seen = run.without(kept, step + 1), seen[kept]
            if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
                run.best = [min(pair) for pair in zip(run.best, seen.tolist(), strict=True)]
        for index, member in enumerate(run.members):
            loss = min(run.best[index], float(seen[index]))
            trials[member.place] = self._trial(member, loss, until - start, looks, seed, "")
            finished = PartialRun(until, run.best[index], run.taken(index), loss, trials[member.place].cost, member.ranks)
            self._kept.put(self._key(member.ranks, seed), finished)
        return trials

    def _trial(self, member: _Member, loss: float | None, steps: int, looks: int, seed: int, note: str) -> RankTrial:
        return RankTrial(member.ranks, loss, 1.0, self.setup.cost(steps, looks), "recovery", seed, note)


def _finished(member: _Member, progress: PartialRun, seed: int) -> RankTrial:
    """Returns the trial of a measurement that was finished and stored before."""
    return RankTrial(member.ranks, progress.loss_nats, 1.0, progress.cost, "recovery", seed, "")


@final
class _Run:
    """The candidates of one pass, with their stacked factors and optimizer."""

    def __init__(self, setup: PairedSetup, members: Sequence[_Member], steps: int, seed: int) -> None:
        self.members = list(members)
        self.best = [member.progress.best_nats if member.progress else math.inf for member in members]
        self._setup, self._seed = setup, seed
        self._sites = {name: site for name, site in setup.sites.items() if any(name in member.request.ranks for member in members)}
        settings = setup.settings
        self._stack = Stack(self._sites, [member.request for member in members], settings.adapter, setup.device)
        first, second = tuple(self._stack.first), tuple(self._stack.second)
        ratio = settings.lr_ratio
        self._optimizer = make_optimizer([ParameterGroup(first, setup.lr), ParameterGroup(second, setup.lr * ratio)])
        for index, member in enumerate(members):
            if member.progress is not None:
                self._stack.put(index, member.progress.tensors, self._optimizer, steps)

    def step(self, step: int) -> Tensor:
        """Makes one optimizer step; returns the training losses, (K,) float64 in nats."""
        setup, settings = self._setup, self._setup.settings
        torch.manual_seed(derived_seed(self._seed, "step", step))
        with adapted(self._sites, self._stack.factors.__getitem__, lambda: setup.dropout):
            losses_K = setup.train_step(self._seed, step, len(self.members))
        clip_each([*self._stack.first, *self._stack.second], settings.max_grad_norm)
        for group, ratio in zip(self._optimizer.param_groups, (1.0, settings.lr_ratio), strict=True):
            group["lr"] = setup.lr * ratio * setup.learning_rate(step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return losses_K

    def look(self) -> Tensor:
        """Returns the held-out losses, (K,) float64 in nats."""
        with adapted(self._sites, self._stack.factors.__getitem__, lambda: 0.0):
            return self._setup.held_out_loss(len(self.members))

    def taken(self, index: int) -> dict[str, Tensor]:
        """Returns the factors and optimizer moments of one candidate."""
        return self._stack.taken(index, self._optimizer)

    def without(self, kept: Sequence[int], steps: int) -> _Run:
        """Returns a run of only the kept candidates, in their state after ``steps`` steps."""
        members = [replace(self.members[index], progress=self._progress(index, steps)) for index in kept]
        return _Run(self._setup, members, steps, self._seed)

    def _progress(self, index: int, steps: int) -> PartialRun:
        """Returns the state of one candidate in the middle of a measurement, which is stored nowhere."""
        return PartialRun(steps, self.best[index], self.taken(index), math.nan, math.nan, self.members[index].ranks)
