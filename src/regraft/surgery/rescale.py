"""Correction of the norms after a cut, so that removing channels equals setting them to zero.

An RMS norm divides by sqrt(mean(x²) + ε). With n of N channels left, the mean is over fewer numbers: if the removed ones were zero, it
grows by N/n. Multiplying the weight by sqrt(N/n) and ε by N/n compensates this exactly. ε is one number for all norms of a model, so it is
multiplied when the residual width is cut. Norms inside the attention use the same ε but lose no channels; their inputs are multiplied by
sqrt(N/n) instead, which compensates the change of ε exactly. If heads are cut under a norm over all heads (OLMo 2), its input is
multiplied by sqrt(n/N) and its weight by sqrt(N/n), and ε does not change.

A layer norm also subtracts the mean, which no scaling can compensate: our own classes still count the removed channels (``norm_width``
in the config).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regraft.models.family import Family
from regraft.plans import Cut, Groups


def rescaled(state: Mapping[str, Tensor], groups: Groups, cuts: tuple[Cut, ...], family: Family, *, tied: bool) -> dict[str, Tensor]:
    """Returns a state dict whose norms, and the projections before them, are corrected for the removed channels.

    Args:
        state: State dict after the cut; parameters that are absent from it are skipped.
        groups: Groups of the model before the cut.
        cuts: The units to keep.
        family: Family of the model.
        tied: Whether the output projection is the token embedding.
    """
    result = dict(state)
    named = groups.named()
    for entry in cuts:
        group = named[entry.group]
        if not entry.kept or len(entry.kept) == group.units:
            continue
        if group.kind == "residual" and family.norm == "rms":
            _for_the_stream(result, [member.parameter for member in group.members], group.units / len(entry.kept), family, tied=tied)
        elif group.kind in ("heads", "query_heads"):
            norms = [member.parameter for member in group.members]
            _for_the_heads(result, norms, group.units / len(entry.kept), family)
    return result


def config_changes(groups: Groups, cuts: tuple[Cut, ...], family: Family, config: Any) -> dict[str, Any]:
    """Returns the changes of the config that the norms of the residual stream need after its width is cut."""
    named = groups.named()
    for entry in cuts:
        group = named[entry.group]
        if group.kind == "residual" and len(entry.kept) < group.units:
            if family.norm == "layer":
                return {"norm_width": getattr(config, "norm_width", None) or group.units}
            return {family.keys.norm_eps: getattr(config, family.keys.norm_eps) * group.units / len(entry.kept)}
    return {}


def _for_the_stream(state: dict[str, Tensor], members: list[str], ratio: float, family: Family, *, tied: bool) -> None:
    factor = math.sqrt(ratio)
    embedding, final = f"{family.embedding}.weight", f"{family.final_norm}.weight"
    for name in members:
        is_norm = name.endswith(".weight") and name in state and state[name].dim() == 1
        # A tied head multiplies by the scaled embedding once more, which the last norm compensates.
        if is_norm and not (name == final and tied and family.scaled_embedding):
            state[name] = _times(state[name], factor, family.norm_offset)
    if family.scaled_embedding:
        # The embedding is multiplied by the square root of the hidden size, which has become smaller.
        state[embedding] = _times(state[embedding], factor)
    for norm, projection in family.head_norms.items():
        for name in list(state):
            if name.endswith(f".{norm}.weight"):
                _scale_projection(state, name.removesuffix(f"{norm}.weight") + projection, factor)


def _for_the_heads(state: dict[str, Tensor], members: list[str], ratio: float, family: Family) -> None:
    factor = math.sqrt(ratio)
    for norm, projection in family.head_norms.items():
        for name in members:
            if name.endswith(f".{norm}.weight") and name in state:
                state[name] = _times(state[name], factor, family.norm_offset)
                _scale_projection(state, name.removesuffix(f"{norm}.weight") + projection, 1.0 / factor)


def _scale_projection(state: dict[str, Tensor], name: str, factor: float) -> None:
    for part in (f"{name}.weight", f"{name}.bias"):
        if part in state:
            state[part] = _times(state[part], factor)


def _times(tensor: Tensor, factor: float, offset: float = 0.0) -> Tensor:
    """Multiplies the effective value ``offset + tensor`` by a factor, in float64, and returns the new tensor."""
    return ((tensor.double() + offset) * factor - offset).to(tensor.dtype)
