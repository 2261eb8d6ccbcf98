"""Mixers: parts of a decoder layer that are kept as they are, such as convolutions, linear attention, state space models and experts.

They hold weights with more than two axes (a convolution's kernel, a stack of experts), and compute what no table describes. What enters
and leaves them is as wide as the residual stream, so that everything beside them can be cut.
"""

from __future__ import annotations

from torch import nn

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
