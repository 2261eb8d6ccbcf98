"""Deep LoRA: the weight change is a deep linear factorization, trained at full width, at narrow width or compressed.

Training of a deep overparameterised factorization finds changes of low rank by itself, and all learning remains in a subspace that the
first gradient determines. So the change is

    compressed   dW = left W_L ... W_1 right^T,  W_l (r, r) from eps I, left (out, r) and right (in, r) orthonormal at first
    narrow       dW = W_L ... W_1,               W_l of width r, semi-orthogonal times eps
    full         dW = W_L ... W_1,               W_l of width min(out, in)

We depart from the paper in one point: left and right come from a randomised SVD of the mean gradient with respect to W over a few batches
(:func:`regraft.numerics.frames.compact_frames`). This costs O(out in r) instead of decompositions of d x d factors, and is an instance of
the paper's construction for one random choice of the first factors.

References:
    [YAR24] Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation", ICML 2024,
        arXiv 2406.04112, section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from regraft.adapters.contract import ADAPTERS, Defaults, Delta, LowRank, Method, Spec
from regraft.errors import InputError
from regraft.numerics.chain import narrow_start, product
from regraft.numerics.frames import Frames, compact_frames
from regraft.numerics.svd import factored_triplets, randomized_triplets
from regraft.settings import Positive, Settings

ITERATIONS = 3  # subspace iterations; few are enough, because the spectra of first gradients fall fast
FULL_RATE = 1e-4  # learning rate of the full width in [YAR24]


class DeepLoraOptions(Settings):
    """Settings of Deep LoRA."""

    form: Literal["compressed", "narrow", "full"] = Field(default="compressed", description="width of the factorization")
    depth: int = Field(default=3, ge=2, le=16, description="number of inner factors")
    epsilon: float = Field(default=1e-3, gt=0.0, le=1.0, allow_inf_nan=False, description="scale of the first factors")
    gamma: float = Field(default=0.01, ge=0.0, allow_inf_nan=False, description="rate of the outer factors over that of the inner")
    batches: Positive = Field(default=4, description="training batches of the first gradient")
    trim: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="after training, cut singular values up to this share of the largest of all; 0: keep all"
    )


@final
class CompressedDelta(Delta):
    """The compressed form ``left W_L ... W_1 right^T``.

    Args:
        spec: Specification, whose ``rank`` is the width r of the inner factors.
        left: ``(out, r)``.
        right: ``(in, r)``.
        core: W_1 to W_L, each ``(r, r)``.
    """

    def __init__(self, spec: Spec, left: Tensor, right: Tensor, core: Sequence[Tensor]) -> None:
        super().__init__(spec)
        self.core = nn.ParameterList([_owned(factor) for factor in core])
        for name, factor in (("left", left), ("right", right)):
            if spec.options.gamma > 0:
                self.register_parameter(name, _owned(factor))
            else:
                self.register_buffer(name, _owned(factor).detach())

    def _inner(self) -> Tensor:
        """Returns W_L ... W_1 in float32, also under autocast, because float16 cannot represent the start eps^L."""
        return _product(tuple(self.core))

    def _reader(self) -> Tensor:
        """Returns core right^T, ``(r, in)``, which is LoRA's A, so that two products with the inputs are enough."""
        return self._inner() @ cast(Tensor, self.right).T

    def delta(self, x: Tensor) -> Tensor:
        """Returns left core right^T x."""
        return linear(linear(x, self._reader()), cast(Tensor, self.left))

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns left core times the rows of right at the ids."""
        return linear(linear(embedding(ids, cast(Tensor, self.right)), self._inner()), cast(Tensor, self.left))

    def delta_weight(self) -> Tensor:
        """Returns the weight change left core right^T."""
        return cast(Tensor, self.left) @ self._reader()

    def low_rank(self) -> LowRank:
        """Returns B = left and A = core right^T."""
        return LowRank(cast(Tensor, self.left).detach(), self._reader().detach())

    def stored(self) -> dict[str, Tensor]:
        """Returns all factors, because the gradient that gave the outer ones is not available later."""
        outer = {"left": cast(Tensor, self.left).detach(), "right": cast(Tensor, self.right).detach()}
        return outer | {f"core.{index}": factor.detach() for index, factor in enumerate(self.core)}

    def rates(self, lr: float | None, default: float) -> dict[str, float]:
        """Returns the rate of the core, and gamma times this rate for the outer factors; see :func:`scaled_rate`."""
        core = lr if lr is not None else scaled_rate(default, self.spec.shape, (self.spec.rank, self.spec.rank))
        return {name: core if name.startswith("core") else self.spec.options.gamma * core for name, _ in self.named_parameters()}

    def truncated(self, threshold: float) -> Delta | None:
        """Returns the compressed form at the numerical rank: ``U_k (S_k^(1/L))^L V_k^T``."""
        return _truncated(self.spec, self.low_rank(), len(self.core), threshold)


@final
class ChainDelta(Delta):
    """The full or narrow form ``W_L ... W_1``.

    Args:
        spec: Specification of the map and the adapter.
        factors: W_1 ``(w, in)`` to W_L ``(out, w)``.
    """

    def __init__(self, spec: Spec, factors: Sequence[Tensor]) -> None:
        super().__init__(spec)
        self.factors = nn.ParameterList([_owned(factor) for factor in factors])

    def _upper(self) -> Tensor:
        """Returns W_L ... W_2, ``(out, w)``, in float32."""
        return _product(tuple(self.factors)[1:])

    def delta(self, x: Tensor) -> Tensor:
        """Returns W_L ... W_1 x."""
        return linear(linear(x, self.factors[0]), self._upper())

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns W_L ... W_2 times the columns of W_1 at the ids."""
        return linear(embedding(ids, self.factors[0].T), self._upper())

    def delta_weight(self) -> Tensor:
        """Returns the weight change W_L ... W_1."""
        return self._upper() @ self.factors[0]

    def low_rank(self) -> LowRank:
        """Returns B = W_L ... W_2 and A = W_1."""
        if self.spec.options.form == "full":
            raise InputError(
                f"deep_lora of full width has rank {min(self.spec.shape)} in '{self.spec.name}'; trim it first, or fold it into "
                "the weights with `regraft export ADAPTER --to merged`"
            )
        return self.factored()

    def rates(self, lr: float | None, default: float) -> dict[str, float]:
        """Returns the rate of each factor; see :func:`scaled_rate`."""
        return {
            name: lr if lr is not None else scaled_rate(default, self.spec.shape, (factor.shape[0], factor.shape[1]))
            for name, factor in self.named_parameters()
        }

    def factored(self) -> LowRank:
        """Returns the factors W_L ... W_2 and W_1."""
        return LowRank(self._upper().detach(), self.factors[0].detach())

    def truncated(self, threshold: float) -> Delta | None:
        """Returns the compressed form at the numerical rank."""
        return _truncated(self.spec, self.factored(), len(self.factors), threshold)


def scaled_rate(full: float, change: tuple[int, int], factor: tuple[int, int]) -> float:
    """Returns the learning rate at which a small factor moves as far as a full-width factor at the rate ``full``.

    Adam moves every entry by about the rate, and so a p x q factor by about ``rate * sqrt(p q)`` in the spectral norm. The full-width
    factor is d x d, so that equal motion needs ``full * d / sqrt(p q)``. For the r x r factors of the compressed form that is a factor
    d / r, as in [YAR24] (1e-2 against 1e-4 at d = 768, r = 8). For an m x n change d is sqrt(m n).
    """
    return full * math.sqrt(change[0] * change[1]) / math.sqrt(factor[0] * factor[1])


@final
class DeepLora(Method):
    """The method Deep LoRA."""

    name = "deep_lora"
    options = DeepLoraOptions
    defaults = Defaults(lr=FULL_RATE, alpha_per_rank=None, dropout=0.0, eps=1e-6)

    def check(self, spec: Spec) -> None:
        """Refuses an odd rank in the compressed form, because r is twice the rank of the gradient."""
        if spec.options.form == "compressed" and spec.rank % 2:
            near = f"{spec.rank - 1} or {spec.rank + 1}" if spec.rank > 1 else "2"
            raise InputError(f"rank {spec.rank} of '{spec.name}' is odd; compressed deep_lora takes even ranks: use {near}")

    def gradient_batches(self, options: Settings) -> int:
        """Returns the batches of the first gradient, which only the compressed form needs."""
        chosen = cast(DeepLoraOptions, options)
        return chosen.batches if chosen.form == "compressed" else 0

    def trim_tolerance(self, options: Settings) -> float:
        """Returns the tolerance of the options."""
        return cast(DeepLoraOptions, options).trim

    def count(self, spec: Spec) -> int:
        """Returns L r^2, plus r (out + in) if the outer factors train; for other forms, the sizes of the chain."""
        depth, (rows, columns) = spec.options.depth, spec.shape
        width = min(spec.shape) if spec.options.form == "full" else spec.rank
        if spec.options.form == "compressed":
            return depth * width**2 + (width * (rows + columns) if spec.options.gamma > 0 else 0)
        return width * (rows + columns) + (depth - 2) * width**2

    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Makes the compressed form from the first gradient, or a random chain."""
        options, generator = cast(DeepLoraOptions, spec.options), spec.generator()
        if options.form != "compressed":
            width = min(spec.shape) if options.form == "full" else spec.rank
            chain = narrow_start(spec.shape, width, options.depth, options.epsilon, generator)
            return ChainDelta(spec, chain.factors).to(given.device)
        frames = first_frames(given, spec.rank, generator)
        core = options.epsilon * torch.eye(spec.rank, device=given.device)
        return CompressedDelta(spec, frames.left, frames.right, [core] * options.depth)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Makes a change from its stored factors."""
        if "left" not in tensors:
            return ChainDelta(spec, [tensors[f"factors.{index}"] for index in range(len(tensors))])
        return CompressedDelta(spec, tensors["left"], tensors["right"], [tensors[f"core.{index}"] for index in range(len(tensors) - 2)])


def first_frames(gradient: Tensor, rank: int, generator: torch.Generator) -> Frames:
    """Returns the outer factors of a compressed change of width ``rank`` from the first gradient ``(out, in)``, float64."""
    leading = randomized_triplets(gradient.double(), rank // 2, generator, iterations=ITERATIONS)
    return compact_frames(leading, generator)


def _owned(factor: Tensor) -> nn.Parameter:
    """Returns a parameter with its own memory, so that equal initial factors are separate tensors."""
    return nn.Parameter(factor.detach().to(torch.float32, copy=True).contiguous())


def _product(factors: Sequence[Tensor]) -> Tensor:
    """Returns the product of the factors without autocast, which is only switched off if it is on, because that costs time."""
    kind = factors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return product(factors)
    with torch.autocast(kind, enabled=False):
        return product(factors)


def _truncated(spec: Spec, factors: LowRank, depth: int, threshold: float) -> Delta | None:
    leading = factored_triplets(factors.left.double(), factors.right.double().T)
    rank = int((leading.values > threshold).sum())
    if rank == 0:
        return None
    core = torch.diag(leading.values[:rank] ** (1.0 / depth))
    options = spec.options.model_copy(update={"form": "compressed"})
    kept = dataclasses.replace(spec, rank=rank, alpha=float(rank), options=options)
    return CompressedDelta(kept, leading.left[:, :rank], leading.right[:, :rank], [core] * depth)


ADAPTERS.add(DeepLora.name, DeepLora())
