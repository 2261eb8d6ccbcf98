"""Scores of the channels of the residual stream from activations: the losses of all matrices that read a channel, summed.

Nothing is re-fitted when the stream becomes narrower. Therefore ``surgeon``, which assumes re-fitting, uses the scores of ``energy`` here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from regraft.compat import own_parameters
from regraft.importance.criteria import Evidence
from regraft.models.layerwise import watched_inputs
from regraft.numerics.moments import ChannelMoments
from regraft.plans import Group

WINDOWS = 8  # windows of one forward pass


def reading_matrices(evidence: Evidence, group: Group) -> Iterator[tuple[Tensor, int, ChannelMoments]]:
    """Yields every matrix that reads the residual stream, its input axis, and the moments of its inputs.

    Args:
        evidence: Evidence with calibration windows.
        group: The group of the residual width.
    """
    model, windows = evidence.model, evidence.windows
    assert windows is not None
    axes = _readers(model, group)
    seen: dict[str, ChannelMoments] = {}

    def see(name: str, rows: Tensor) -> None:
        if name not in seen:
            seen[name] = ChannelMoments.empty(rows.shape[-1], rows.device)
        seen[name].add(rows)

    with torch.no_grad(), watched_inputs({name: model.get_submodule(name) for name in axes}, see):
        for ids in windows.split(WINDOWS):
            model(input_ids=ids.to(model.device), use_cache=False)
    for name, axis in axes.items():
        yield model.get_parameter(f"{name}.weight").detach(), axis, seen[name]


def _readers(model: nn.Module, group: Group) -> dict[str, int]:
    """Returns the modules that read the residual stream, including a head tied to the embedding, with their input axes."""
    axes = {member.parameter: (member.axis, member.side) for member in group.members}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        weight = own_parameters(module).get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding) or names[id(weight)] not in axes:
            continue
        axis, side = axes[names[id(weight)]]
        tied = names[id(weight)] != f"{name}.weight"
        if side == "in" or tied:
            found[name] = axis
    return found


def stream_scores(evidence: Evidence, group: Group, channel_score: Callable[[ChannelMoments], Tensor], power: int) -> Tensor:
    """Returns ``sum over readers of score(x_j) * sum |W_j|^power``, float64 (units,)."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for weight, axis, moments in reading_matrices(evidence, group):
        total += (channel_score(moments) * weight.double().abs().pow(power).sum(dim=1 - axis)).cpu()
    return total
