"""Decomposition of every linear layer of a model, once for all ranks: the price of each rank, and the factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from regraft.compression.contract import Compressor, Evidence
from regraft.compression.space import Priced
from regraft.numerics.truncation import Truncation
from regraft.plans import FactorLayout
from regraft.progress import Say, say_nothing


@dataclass(frozen=True)
class Decomposed:
    """A layer with its price at every rank, and its factors up to the largest rank that saves anything.

    Attributes:
        priced: Sizes and prices.
        truncation: The factors, in float32.
        rows_seen: Calibration tokens that the decomposition rests on; 0 where it looked at the weights alone.
        has_bias: Whether the dense layer has one.
    """

    priced: Priced
    truncation: Truncation
    rows_seen: int
    has_bias: bool


def decompose(
    evidence: Iterable[Evidence],
    compressor: Compressor,
    layout: FactorLayout,
    layer_of: Callable[[str], int],
    has_bias: Callable[[str], bool],
    say: Say = say_nothing,
) -> list[Decomposed]:
    """Decomposes one layer after the other; moments are freed after each layer, and its factors are kept.

    Args:
        evidence: Evidence of every layer, in the order of the model.
        compressor: The method.
        layout: How factors will be stored: decides up to which rank they can save anything.
        layer_of: Returns the index of the decoder layer for the name of a linear layer.
        has_bias: Returns whether the linear layer of a name has a bias.
        say: Called with a line of progress at intervals.
    """
    found: list[Decomposed] = []
    layer = -1
    for one in evidence:
        if layer_of(one.name) != layer:
            layer = layer_of(one.name)
            say(f"decomposing layer {layer + 1}")
        found.append(decompose_one(one, compressor, layout, layer, has_bias=has_bias(one.name)))
    return found


def decompose_one(one: Evidence, compressor: Compressor, layout: FactorLayout, layer: int, *, has_bias: bool) -> Decomposed:
    """Decomposes one linear layer.

    Args:
        one: Its evidence.
        compressor: The method.
        layout: How factors will be stored.
        layer: Index of its decoder layer.
        has_bias: Whether it has a bias.
    """
    rows, columns = one.weight_OI.shape
    whole = compressor.truncate(one)
    most = min(rows, columns) if layout == "pifa" else rows * columns // (rows + columns)
    new_bias = rows if whole.mean_I is not None and not has_bias else 0
    priced = Priced(one.name, layer, rows, columns, new_bias, whole.damage().cpu())
    seen = one.inputs.count if one.inputs is not None else 0
    return Decomposed(priced, whole.shortened(most, torch.float32), seen, has_bias)
