"""The contract of a criterion, and the common reduction of weights' saliencies to scores of units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.importance.passes import Passes, WholeModel
from regraft.models.precision import float32_on_cpu
from regraft.plans import Group, GroupKind, Groups, Member, Scores
from regraft.registry import NamedRegistry
from regraft.settings import Reduction

Granularity = Literal["element", "vector"]
LooksAt = Literal["nothing", "weights", "channels", "moments", "gradients"]
Readable = Literal["seed", "order", "granularity", "reduce", "consecutive"]
EVERYTHING: frozenset[Readable] = frozenset({"seed", "order", "granularity", "reduce", "consecutive"})
WIDTHS: tuple[GroupKind, ...] = ("heads", "query_heads", "mixer_heads", "ffn", "residual")
Saliency = Callable[[str], Tensor]
"""A function from a parameter name to the signed saliency of each weight, in the parameter's shape."""


@dataclass(frozen=True)
class Evidence:
    """Inputs of a criterion.

    Attributes:
        model: The model in evaluation mode; criteria restore it, gradients included.
        groups: The groups to score.
        windows: Calibration text, int64 (samples, tokens); None for criteria without text.
        seed: Seed for criteria with random draws.
        order: Order of the Taylor expansion.
        granularity: Position of the absolute value: on each weight, or on the sum over a row or column.
        reduce: Method of combining the members of a group.
        consecutive: Number of consecutive layers to remove, for criteria that compare runs of layers.
        passes: Source of weights, inputs and gradients; None for the model in memory.
    """

    model: PreTrainedModel
    groups: Groups
    windows: Tensor | None
    seed: int = 0
    order: Literal["first", "second", "mixed"] = "first"
    granularity: Granularity = "element"
    reduce: Reduction = "sum"
    consecutive: int = 1
    passes: Passes | None = None

    def how(self) -> Passes:
        """Returns the source of weights, inputs and gradients."""
        return self.passes or WholeModel(self.model, self.windows)


@dataclass(frozen=True)
class Criterion:
    """A named method of scoring units.

    Attributes:
        name: Name on the command line.
        needs_text: Whether calibration windows are required.
        units: Evidence to one float64 tensor of shape (units,) for each group name.
        looks_at: What decides how much memory a layer takes: its weights, or with them a number for each input channel, whole
            second moments of the inputs, or gradients.
        scores: Kinds of groups that it can score.
        reads: The fields of :class:`Evidence` that its scores depend on, besides the model, the groups and the windows. Scores are cached
            by their values. The criterion sees the defaults of all other fields (:meth:`seen`), so that a field that is missing here
            cannot give a wrong cache hit. Left out: all fields, which is always right.
        in_nats: Whether the scores of a group, added up from the lowest, are what the predictions lose, in nats for each token.
        between_layers: Whether scores are prices in the loss, which a selector compares between layers and kinds as they are. False: it
            compares what share of its group's total a unit carries.
    """

    name: str
    needs_text: bool
    units: Callable[[Evidence], Mapping[str, Tensor]]
    looks_at: LooksAt = "moments"
    scores: tuple[GroupKind, ...] = WIDTHS
    reads: frozenset[Readable] = EVERYTHING
    in_nats: bool = False
    between_layers: bool = False

    def seen(self, evidence: Evidence) -> Evidence:
        """Returns the evidence with its default in every field that this criterion does not read."""
        whole = Evidence(evidence.model, evidence.groups, evidence.windows if self.needs_text else None, passes=evidence.passes)
        return replace(whole, **self.key(evidence))

    def key(self, evidence: Evidence) -> dict[str, Any]:
        """Returns the values of the fields that this criterion reads, as plain JSON types, for the key of the score cache."""
        values = {
            "seed": evidence.seed,
            "order": evidence.order,
            "granularity": evidence.granularity,
            "reduce": evidence.reduce,
            "consecutive": evidence.consecutive,
        }
        return {name: value for name, value in values.items() if name in self.reads}


CRITERIA: NamedRegistry[Criterion] = NamedRegistry("criterion", group="regraft.criteria", of=Criterion)


def score(criterion: str, evidence: Evidence) -> Scores:
    """Scores every unit of every group. On a CPU, passes of text are computed in float32 for weights of any dtype.

    Args:
        criterion: Name of a registered criterion.
        evidence: The model, its groups and the calibration text.

    Raises:
        InputError: The criterion is unknown, does not score a group's kind, or needs text and got none.
        PlanError: A score is not finite.
    """
    chosen = CRITERIA.get(criterion)
    if chosen.needs_text and evidence.windows is None:
        raise InputError(f"criterion '{criterion}' needs calibration text; give one with `calibration`")
    strange = [group for group in evidence.groups.groups if group.kind not in chosen.scores]
    if strange:
        able = ", ".join(name for name in CRITERIA if strange[0].kind in CRITERIA.get(name).scores)
        raise InputError(f"criterion '{criterion}' does not score {strange[0].kind} ({strange[0].name}); use one of {able}")
    with float32_on_cpu(evidence.model) if chosen.needs_text else nullcontext():
        values = chosen.units(chosen.seen(evidence))
    settings = f"granularity={evidence.granularity}, reduce={evidence.reduce}"
    if chosen.needs_text:
        settings = f"order={evidence.order}, {settings}"
    ordered = {group.name: tuple(values[group.name].tolist()) for group in evidence.groups.groups}
    return Scores(evidence.groups.fingerprint, f"{criterion}({settings})", ordered)


def reduce_saliency(group: Group, saliency: Saliency, granularity: Granularity, how: Reduction) -> Tensor:
    """Reduces the saliencies of single weights to the scores of a group's units.

    Granularity ``element``: the absolute values of all weights of a unit are summed for each member. Granularity ``vector``: the saliency
    is first summed along each row (output side, with the bias) or column (input side), and the absolute values of these sums are summed
    over the unit's rows or columns. Last, the members' scores are combined (LLM-Pruner, arXiv 2305.11627, section 3.2, equations 5, 6).

    Args:
        group: The coupled axes.
        saliency: Signed saliency of each weight.
        granularity: Position of the absolute value.
        how: Method of combining members; ``last`` takes the last projection that reads the channels.

    Returns:
        float64 (units,).
    """
    per_module: dict[str, Tensor] = {}
    for member in sorted(group.members, key=lambda member: member.side == "in"):
        module = member.parameter.rpartition(".")[0]
        vectors = _vectors(saliency(member.parameter), member, granularity)
        owned = torch.tensor([list(member.indices(unit)) for unit in range(group.units)], device=vectors.device)
        per_channel = vectors[owned]
        key = f"{module}@{member.offset}"
        per_module[key] = per_module[key] + per_channel if key in per_module else per_channel
    per_unit = torch.stack([channels.abs().sum(dim=1).cpu() for channels in per_module.values()])
    return _combine(per_unit, how)


def _vectors(saliency: Tensor, member: Member, granularity: Granularity) -> Tensor:
    """Returns one float64 number per index along the member's axis."""
    values = saliency.abs() if granularity == "element" else saliency
    if values.dim() == 1:
        return values.double()
    return values.sum(dim=[axis for axis in range(values.dim()) if axis != member.axis], dtype=torch.float64)


def _combine(per_unit_MU: Tensor, how: Reduction) -> Tensor:
    """Combines the scores of M members for U units."""
    if how == "sum":
        return per_unit_MU.sum(dim=0)
    if how == "mean":
        return per_unit_MU.mean(dim=0)
    if how == "max":
        return per_unit_MU.amax(dim=0)
    if how == "product":
        return per_unit_MU.prod(dim=0)
    return per_unit_MU[-1]
