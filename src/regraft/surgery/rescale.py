"""Make up for what the norms lose with the channels that are cut, so that removing equals zeroing.

An RMS norm divides by sqrt(mean(x²) + ε). With n of N channels left the mean runs over fewer numbers: where the removed ones were
zero it grows by N/n. Multiplying the weight by sqrt(N/n) and ε by N/n undoes this exactly. ε is one number for all norms of a
model, so it is multiplied where the residual width is cut; norms inside the attention that use the same ε, but lose no channels,
have what they read multiplied by sqrt(N/n) instead, which changes their result by nothing. Where heads are cut under a norm that
runs over all of them (OLMo 2), what it reads is multiplied by sqrt(n/N) and its weight by sqrt(N/n), and ε stays.

A layer norm subtracts the mean as well, which no scaling can undo: our own classes go on counting the removed channels
(``norm_width`` in the config).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regraft.models.family import Family
from regraft.plans import Cut, Groups


def rescaled(state: Mapping[str, Tensor], groups: Groups, cuts: tuple[Cut, ...], family: Family, *, tied: bool) -> dict[str, Tensor]:
    """Returns a state dict whose norms, and what feeds them, make up for the channels that are gone.

    Args:
        state: After the cut, at its new sizes; parameters that are not there are passed over.
        groups: Of the model before.
        cuts: What stays.
        family: Of the model.
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
    """Returns what the norms of the residual stream need in the config once its width is cut."""
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
        # A tied head multiplies by the scaled embedding once more, which the last norm takes back.
        if is_norm and not (name == final and tied and family.scaled_embedding):
            state[name] = _times(state[name], factor, family.norm_offset)
    if family.scaled_embedding:
        # It is multiplied by the square root of the hidden size, which has become smaller.
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
    """Multiplies what a tensor stands for, ``offset + tensor``, in float64."""
    return ((tensor.double() + offset) * factor - offset).to(tensor.dtype)
