"""Checks that every compression method must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from regraft.compression import Compressor, Evidence
from regraft.errors import InputError
from regraft.numerics.moments import Moments
from regraft.numerics.pooled import PooledMoments
from regraft.numerics.truncation import Truncation
from regraft.testing.require import generators_left_alone, require

SHAPES = ((8, 12), (12, 8), (9, 9))
GROUPS, ROWS = 4, 50


@dataclass(frozen=True)
class Watched:
    """A planted linear layer with every row that went through it, for dense formulas.

    Attributes:
        weight_OI: Its weight, float64 (out, in).
        inputs_GNI: Inputs in groups of calibration text, float64 (4, 50, in).
        gradients_NO: Gradients at its outputs, float64 (200, out).
    """

    weight_OI: Tensor
    inputs_GNI: Tensor
    gradients_NO: Tensor

    def evidence(self, compressor: Compressor) -> Evidence:
        """Returns the evidence that the method asks for, and no other."""
        seen, felt = None, None
        if compressor.looks_at != "weights":
            seen = PooledMoments.empty(self.inputs_GNI.shape[-1], GROUPS)
            for group, rows in enumerate(self.inputs_GNI):
                seen.add(rows, group)
        if compressor.looks_at == "gradients":
            felt = Moments.empty(self.gradients_NO.shape[-1])
            felt.add(self.gradients_NO)
        return Evidence("planted", self.weight_OI.clone(), seen, felt)


Lost = Callable[[Watched, Tensor, Tensor], float]
"""What a method minimises, written out densely: from a layer, ``W' - W`` (out, in) and the added bias (out,) to a number."""


def check_compressor(compressor: Compressor, lost: Lost) -> None:
    """Checks a compression method on planted layers: a wide, a high and a square one, and one with a channel that never varies.

    1. One decomposition holds all ranks: float64 terms, the factors of each rank are the first ones of the next.
    2. The full rank gives the weight back, with a bias of zero.
    3. The predicted error falls with every rank, down to zero.
    4. At every rank the predicted error is what ``lost`` says of the dense product of the factors.
    5. A bias is added exactly if the method says so, and only ever one for each output.
    6. The same evidence gives the same terms to the bit; the evidence and the global generators are left alone.
    7. A weight with NaN is refused with our error.

    Args:
        compressor: The method.
        lost: The error that its prices speak of, as a dense formula on the rows themselves.

    Raises:
        NonconformingError: With what the method did.
    """
    who = f"compression method '{compressor.name}'"
    for (rows, columns), still in product(SHAPES, (False, True)):
        layer = planted(rows, columns, still=still)
        case = f"{who}, {rows} x {columns}"
        evidence = layer.evidence(compressor)
        with generators_left_alone(who):
            found = compressor.truncate(evidence)
        require(torch.equal(evidence.weight_OI, layer.weight_OI), f"{case}: the weight that it is given is changed")
        _check_terms(case, found, compressor, (rows, columns))
        again = compressor.truncate(layer.evidence(compressor))
        pairs = ((found.left_OK, again.left_OK), (found.right_KI, again.right_KI), (found.price_K, again.price_K))
        require(all(torch.equal(one, other) for one, other in pairs), f"{case}: other terms for the same evidence")
        _check_ranks(case, found, layer, lost)
    _check_refusal(who, compressor)


def planted(rows: int, columns: int, *, still: bool = False) -> Watched:
    """Returns a random layer whose input channels differ in size and have means; with ``still`` channel 1 is always 0.5."""
    draw = torch.Generator().manual_seed(rows * 100 + columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs = normal(GROUPS, ROWS, columns) * torch.linspace(0.1, 2.0, columns, dtype=torch.float64) + normal(columns)
    if still:
        inputs[..., 1] = 0.5
    return Watched(normal(rows, columns), inputs, normal(GROUPS * ROWS, rows) @ normal(rows, rows))


def _check_terms(case: str, found: Truncation, compressor: Compressor, shape: tuple[int, int]) -> None:
    (rows, columns), full = shape, min(shape)
    sizes = tuple(found.left_OK.shape), tuple(found.right_KI.shape), tuple(found.price_K.shape)
    require(sizes == ((rows, full), (full, columns), (full,)), f"{case}: terms of shapes {sizes} for a full rank of {full}")
    for what, tensor in (("left factor", found.left_OK), ("right factor", found.right_KI), ("prices", found.price_K)):
        require(tensor.dtype == torch.float64, f"{case}: the {what} is {tensor.dtype}; float64 is wanted")
        require(bool(torch.isfinite(tensor).all()), f"{case}: the {what} holds NaN or infinity")
    require(bool((found.price_K >= 0).all()), f"{case}: the price of a term is negative")
    has_bias = found.mean_I is not None and found.mean_O is not None
    require(has_bias == compressor.adds_bias, f"{case}: it says adds_bias={compressor.adds_bias}, and its terms say {has_bias}")


def _check_ranks(case: str, found: Truncation, layer: Watched, lost: Lost) -> None:
    """Compares the predicted error of every rank with the dense formula, and consecutive ranks with each other."""
    weight = layer.weight_OI
    rows, full = weight.shape[0], found.full_rank
    predicted = found.damage()
    nothing = lost(layer, -weight, weight @ found.mean_I if found.mean_I is not None else weight.new_zeros(rows))
    tolerance = 1e-7 * max(nothing, float(predicted[0]))
    require(bool((predicted.diff() <= 0).all()), f"{case}: the predicted error grows with the rank")
    require(
        abs(float(predicted[0]) - nothing) <= 10 * tolerance, f"{case}: rank 0 is predicted to lose {predicted[0]:g} and loses {nothing:g}"
    )
    before = found.at(1)
    for rank in range(1, full + 1):
        here = found.at(rank)
        require(
            torch.equal(here.left_OR[:, : before.left_OR.shape[1]], before.left_OR),
            f"{case}: rank {rank} has other terms than rank {rank - 1}",
        )
        bias = here.bias_O if here.bias_O is not None else weight.new_zeros(rows)
        require(tuple(bias.shape) == (rows,), f"{case}: a bias of shape {tuple(bias.shape)} for {rows} outputs")
        really = lost(layer, here.left_OR @ here.right_RI - weight, bias)
        says = float(predicted[rank])
        require(abs(says - really) <= 10 * tolerance, f"{case}: rank {rank} is predicted to lose {says:g} and loses {really:g}")
        before = here
    whole = found.at(full)
    size = float(weight.abs().max())
    require(
        float((whole.left_OR @ whole.right_RI - weight).abs().max()) <= 1e-6 * size, f"{case}: the full rank does not give the weight back"
    )
    if whole.bias_O is not None:
        require(float(whole.bias_O.abs().max()) <= 1e-6 * size, f"{case}: the full rank adds a bias")


def _check_refusal(who: str, compressor: Compressor) -> None:
    layer = planted(*SHAPES[0])
    layer.weight_OI[2, 3] = float("nan")
    try:
        compressor.truncate(layer.evidence(compressor))
    except InputError:
        return
    require(False, f"{who} decomposes a weight that holds NaN")
