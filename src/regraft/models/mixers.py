"""Mixers: parts of a decoder layer that are kept as they are, such as convolutions, linear attention, state space models and experts.

They hold weights with more than two axes (a convolution's kernel, a stack of experts), and compute what no table describes. What enters
and leaves them is as wide as the residual stream, so that everything beside them can be cut.

The heads of some mixers with a recurrent state are known: those of Gated DeltaNet (Yang et al., arXiv 2412.06464) and of Mamba-2 (Dao and
Gu, arXiv 2405.21060) where every key head, there called a group, has a norm of its own, or where there is no norm. A key head with the
value heads that read its state is computed without a look at the others; where nothing normalises them together, so is a value head alone.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from regraft.compat import own_parameters

NO_ATTENTION, NO_MLP = "NoAttn", "NoMlp"  # classes of models.uneven.modeling_regraft; a saved folder carries its own copies of them


def mixers_of(layer: nn.Module) -> tuple[str, ...]:
    """Returns the names of the parts of a layer that hold weights with more than two axes."""
    return tuple(name for name, part in layer.named_children() if any(weight.dim() > 2 for weight in part.parameters()))


def first_stack(layer: nn.Module) -> str:
    """Returns the first module of a layer that holds a weight with more than two axes, as ``'name' (Class)``; empty without one."""
    for name, module in layer.named_modules():
        if any(weight.dim() > 2 for weight in module.parameters(recurse=False)):
            return f"'{name}' ({type(module).__name__})"
    return ""


def shapes_of(layer: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns the names and shapes of the parameters of a layer: layers of one kind have the same ones."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


# Letters of a segment: what a key head owns there. Keys or queries; the values of all of its value heads; one number for each of these.
KEYS, VALUES, EACH = "k", "v", "h"


@dataclass(frozen=True)
class Layout:
    """Where a mixer holds its heads.

    Attributes:
        counts: Config keys of the numbers of key heads and of value heads.
        sizes: Config keys of the channels of a key head, and of a value head.
        parts: Matrices, kernels and vectors that the heads write, each with the segments of its first axis. A segment holds for one key
            head after another what its letters say.
        reader: The matrix that reads the value heads and writes the stream.
        shared: What serves all heads alike.
        evenly: Whether a unit is a value head of every key head, so that keys stay, in place of a key head with its value heads.
        total: Config key of the channels of all value heads; empty where the config computes them.
    """

    counts: tuple[str, str]
    sizes: tuple[str, str]
    parts: Mapping[str, tuple[str, ...]]
    reader: str
    shared: frozenset[str] = frozenset()
    evenly: bool = False
    total: str = ""

    @property
    def keys(self) -> set[str]:
        """Config keys without which this is not the layout."""
        return {*self.counts, *self.sizes, *([self.total] if self.total else [])}

    @property
    def names(self) -> set[str]:
        """Everything in the mixer that has parameters."""
        return {*self.parts, self.reader, *self.shared}


_DELTA_COUNTS, _DELTA_SIZES = ("linear_num_key_heads", "linear_num_value_heads"), ("linear_key_head_dim", "linear_value_head_dim")
_DELTA = {"conv1d": ("k", "k", "v"), "A_log": ("h",), "dt_bias": ("h",)}
LAYOUTS = (
    Layout(  # Qwen 3.5
        _DELTA_COUNTS,
        _DELTA_SIZES,
        {**_DELTA, "in_proj_qkv": ("k", "k", "v"), "in_proj_z": ("v",), "in_proj_a": ("h",), "in_proj_b": ("h",)},
        "out_proj",
        frozenset({"norm"}),
    ),
    Layout(  # Qwen3-Next
        _DELTA_COUNTS, _DELTA_SIZES, {**_DELTA, "in_proj_qkvz": ("kkvv",), "in_proj_ba": ("hh",)}, "out_proj", frozenset({"norm"})
    ),
    Layout(  # OLMo-Hybrid
        _DELTA_COUNTS,
        _DELTA_SIZES,
        {**_DELTA, "q_proj": ("k",), "k_proj": ("k",), "v_proj": ("v",), "g_proj": ("v",), "a_proj": ("h",), "b_proj": ("h",)},
        "o_proj",
        frozenset({"o_norm"}),
    ),
    Layout(  # Nemotron-H, whose norm is one for each group
        ("n_groups", "mamba_num_heads"),
        ("ssm_state_size", "mamba_head_dim"),
        {
            "in_proj": ("v", "v", "k", "k", "h"),
            "conv1d": ("v", "k", "k"),
            "norm": ("v",),
            "A_log": ("h",),
            "dt_bias": ("h",),
            "D": ("h",),
        },
        "out_proj",
    ),
    Layout(  # Falcon-H1, without a norm; most have one group
        ("mamba_n_groups", "mamba_n_heads"),
        ("mamba_d_state", "mamba_d_head"),
        {"in_proj": ("v", "v", "k", "k", "h"), "conv1d": ("v", "k", "k"), "A_log": ("h",), "dt_bias": ("h",), "D": ("h",)},
        "out_proj",
        evenly=True,
        total="mamba_d_ssm",
    ),
)


@dataclass(frozen=True)
class Mixer:
    """A mixer whose heads are known.

    Attributes:
        name: Name within the layer.
        module: The mixer.
        layout: Where its heads are.
        key_heads: Number of key heads.
        value_heads: Number of value heads, a multiple of it.
        widths: Channels of a letter of :class:`Layout`, for one key head.
    """

    name: str
    module: nn.Module
    layout: Layout
    key_heads: int
    value_heads: int
    widths: Mapping[str, int]

    @property
    def units(self) -> int:
        """Number of units that can be removed singly."""
        return self.value_heads // self.key_heads if self.layout.evenly else self.key_heads


def layout_by(known: Container[str]) -> Layout | None:
    """Returns the layout of a family's mixers from the keys of its config; families with the same keys hold their heads alike."""
    return next((layout for layout in LAYOUTS if all(key in known for key in layout.keys)), None)


def recurrent_of(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Returns the mixer of a layer that has a recurrent state with a decay for each head, with its name within the layer."""
    return next(((name, module) for name, module in layer.named_modules() if "A_log" in own_parameters(module)), None)


def mixer_of(layer: nn.Module, config: Any) -> Mixer | None:
    """Returns the mixer of a layer whose heads are known; its numbers are read from its weights.

    Args:
        layer: A decoder layer.
        config: Config of the model, for the channels of a head.
    """
    found = recurrent_of(layer)
    if found is None:
        return None
    name, module = found
    shapes = {part: tuple(weight.shape) for part, weight in module.named_parameters()}
    names = {_stem(part) for part in shapes}
    values = config.to_dict()
    layout = next((layout for layout in LAYOUTS if layout.names == names and layout.keys <= values.keys()), None)
    if layout is None:
        return None
    of_key, of_value = (int(values[key]) for key in layout.sizes)
    value_heads = shapes["A_log"][0]
    key_heads = (shapes["conv1d.weight"][0] - value_heads * of_value) // (2 * of_key)
    if key_heads < 1 or value_heads % key_heads:
        return None
    each = value_heads // key_heads
    mixer = Mixer(name, module, layout, key_heads, value_heads, {KEYS: of_key, VALUES: each * of_value, EACH: each})
    return mixer if all(_fits(mixer, part, shape) for part, shape in shapes.items()) else None


def _stem(part: str) -> str:
    """Returns the name of a module from that of its weight or bias; that of a parameter of the mixer itself as it is."""
    return part.removesuffix(".weight").removesuffix(".bias")


def _fits(mixer: Mixer, part: str, shape: tuple[int, ...]) -> bool:
    layout, stem = mixer.layout, _stem(part)
    if stem in layout.parts:
        return shape[0] == mixer.key_heads * sum(mixer.widths[letter] for segment in layout.parts[stem] for letter in segment)
    return stem in layout.shared or len(shape) == 1 or shape[1] == mixer.key_heads * mixer.widths[VALUES]
