"""Heads of mixers with a recurrent state: a key head with its value heads is one unit, in every layer that has such a mixer.

No key head sees the state of another, and the norm of the outputs is that of a head or of a key head. Removing units therefore equals
setting to zero what they write, and needs no correction. Where there is no norm at all, one value head of every key head is a unit.
"""

from __future__ import annotations

import math

from regraft.groups.traced import Refusal
from regraft.models.mixers import KEYS, VALUES, Mixer, mixer_of, recurrent_of
from regraft.models.view import ModelView
from regraft.plans import Group, Member, Side

KIND = "mixer_heads"


def mixer_head_groups(view: ModelView) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
    """Returns a group for each layer with a mixer whose heads are known, and why others are not cut.

    Args:
        view: The model.
    """
    groups: list[Group] = []
    refused: dict[str, Refusal] = {}
    for index, layer in enumerate(view.layers):
        mixer = mixer_of(layer, view.model.config) if view.family.mixed and view.family.keys.mixer else None
        if mixer is not None:
            groups.append(_group(view, index, mixer))
        elif (found := recurrent_of(layer)) is not None:
            name, module = found
            kind = type(module).__name__
            why = f"'{view.layer_name(index)}.{name}' ({kind}) is none of the mixers whose heads are known here"
            refused.setdefault(kind, Refusal(KIND, index, why))
    return tuple(groups), tuple(refused.values())


def _group(view: ModelView, index: int, mixer: Mixer) -> Group:
    prefix = f"{view.layer_name(index)}.{mixer.name}"
    members: list[Member] = []
    size = 0
    for part, weight in mixer.module.named_parameters():
        here = _members(mixer, f"{prefix}.{part}", part.removesuffix(".weight").removesuffix(".bias"), weight.dim())
        members += here
        size += sum(member.width * math.prod(weight.shape) // weight.shape[member.axis] for member in here)
    return Group(f"layers.{index}.{KIND}", KIND, index, mixer.units, tuple(members), size)


def _members(mixer: Mixer, name: str, stem: str, axes: int) -> list[Member]:
    """Returns the members of a parameter: one for each segment that the heads write, or the columns that read them."""
    if stem == mixer.layout.reader:
        return [_member(mixer, name, "in", 0, mixer.widths[VALUES])] if axes == 2 else []
    found: list[Member] = []
    offset = 0
    for segment in mixer.layout.parts.get(stem, ()):
        size = sum(mixer.widths[letter] for letter in segment)
        if not (mixer.layout.evenly and KEYS in segment):
            found.append(_member(mixer, name, "out", offset, size))
        offset += size * mixer.key_heads
    return found


def _member(mixer: Mixer, name: str, side: Side, offset: int, size: int) -> Member:
    """Returns the member of a segment that holds ``size`` channels for each key head."""
    axis = int(side == "in")
    if not mixer.layout.evenly:
        return Member(name, axis, side, offset=offset, size=size)
    return Member(name, axis, side, offset, size // mixer.units, repeats=mixer.key_heads, stride=size)
