"""The interface of compressors: from a weight and statistics of its inputs and outputs to factors at every rank with their price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics.moments import Moments
from regraft.numerics.pooled import PooledMoments
from regraft.numerics.truncation import Truncation
from regraft.numerics.whitening import Metric
from regraft.registry import NamedRegistry

LooksAt = Literal["weights", "inputs", "gradients"]
"""Evidence that a method needs in addition to the weights: none, the layer's inputs, or these and gradients at its outputs."""
Unit = Literal["squared error", "nats"]


@dataclass(frozen=True)
class Evidence:
    """The inputs of a compressor.

    Attributes:
        name: Full name of the projection, for messages.
        weight_OI: Its weight, (out, in), of any float dtype.
        inputs: Moments of its inputs; None for methods that look at weights alone.
        gradients: Moments of the gradients at its outputs of the log-likelihood of tokens drawn from the model's own predictions; None for
            methods that look at inputs alone.
    """

    name: str
    weight_OI: Tensor
    inputs: PooledMoments | None = None
    gradients: Moments | None = None

    def seen(self) -> PooledMoments:
        """Returns the moments of the inputs.

        Raises:
            InputError: There are none.
        """
        if self.inputs is None or not self.inputs.count:
            raise InputError(f"the inputs of '{self.name}' were not seen; give calibration text with `calibration`")
        return self.inputs

    def felt(self) -> Moments:
        """Returns the moments of the gradients at the outputs.

        Raises:
            InputError: There are none.
        """
        if self.gradients is None or not self.gradients.count:
            raise InputError(f"no gradients were seen at the outputs of '{self.name}'; give calibration text with `calibration`")
        return self.gradients

    def second(self) -> Metric:
        """Returns the second moments of the inputs, not centred, as a metric."""
        seen = self.seen()
        return Metric(seen.square_DD, what=f"inputs of '{self.name}'", scale=1.0 / seen.count)

    def covariance(self) -> Metric:
        """Returns the pooled covariance of the inputs as a metric; the identity where no group has two rows."""
        seen = self.seen()
        scale, sums_GD = seen.pooling()
        what = f"inputs of '{self.name}'"
        if not scale:
            return Metric(torch.zeros_like(seen.square_DD), what=what)
        return Metric(seen.square_DD, what=what, scale=scale, sums_GD=sums_GD)

    def fisher(self, damping: float) -> Metric:
        """Returns the second moments of the gradients at the outputs as a metric, with a share of the identity mixed in."""
        felt = self.felt()
        return Metric(felt.square_DD, damping, f"gradients at '{self.name}'", 1.0 / felt.count)


@dataclass(frozen=True)
class Compressor:
    """A named way to decompose a weight.

    Attributes:
        name: Name of the method, as on the command line.
        looks_at: Evidence that it needs in addition to the weights.
        unit: Unit of its prices: nats of divergence per token, which add up over layers, or the squared error of the layer's output
            (``svd``: of the weight; ``asvd``: in its own scaling), which compare within one layer only.
        adds_bias: Whether a factored layer gets a bias that keeps the mean of its outputs.
        truncate: Decomposes one weight.
    """

    name: str
    looks_at: LooksAt
    unit: Unit
    adds_bias: bool
    truncate: Callable[[Evidence], Truncation]


COMPRESSORS: NamedRegistry[Compressor] = NamedRegistry("compression method", group="regraft.compressors", of=Compressor)
