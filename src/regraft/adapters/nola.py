"""NOLA: both factors of LoRA are linear combinations of random matrices that are never stored.

    A = A_0 + 1/sqrt(k) sum_i a_i A_i,   B = 1/sqrt(k) sum_j b_j B_j,   dW = alpha/r B A

A_i ``(r, in)`` and B_j ``(out, r)`` are uniform in [-1, 1] and A_0 is Kaiming uniform. All are functions of a seed
(:mod:`regraft.numerics.counter`): they are made in chunks when needed, in the forward pass and again in the backward pass, with equal
values on every device. Only the 2 k coefficients are trained; only they and the seed are saved.

Without A_0 nothing would train, because at a = b = 0 both gradients are zero.

References:
    [KOO24] Koohpayegani, Navaneet, Nooralinejad, Kolouri, Pirsiavash, "NOLA: Compressing LoRA using Linear Combination of Random
        Basis", ICLR 2024, arXiv 2310.02556, equations 2 and 3, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from regraft.adapters.contract import ADAPTERS, Defaults, Delta, LowRank, Method, Spec
from regraft.adapters.seeding import derived_seed
from regraft.errors import InputError
from regraft.numerics.counter import MOST, random_uniform
from regraft.settings import Settings

CPU_CHUNK, GPU_CHUNK = 2**18, 2**22  # random numbers made at once: as many as fit a core's cache, and enough to use a GPU fully
BLOCK = 64  # coefficients that share a scale when they are quantised


class NolaOptions(Settings):
    """Settings of NOLA."""

    bases: int = Field(default=256, ge=1, le=2**16, description="random matrices k that each factor is a mixture of")
    bits: Literal["32", "4"] = Field(default="32", description="of a saved coefficient; 4 quantises them after training")


@final
class NolaDelta(Delta):
    """The weight change ``scale * mix(b) (A_0 + mix(a))``.

    Args:
        spec: Specification of the map and the adapter; its seed makes the bases.
        a: Coefficients of A's bases, ``(k,)``.
        b: Coefficients of B's bases, ``(k,)``.
    """

    def __init__(self, spec: Spec, a: Tensor, b: Tensor) -> None:
        super().__init__(spec)
        self.a = nn.Parameter(a.float())
        self.b = nn.Parameter(b.float())
        self._keys = {part: derived_seed(spec.seed, "nola", part) for part in ("A", "B", "start")}

    def right(self) -> Tensor:
        """Returns A, ``(r, in)``."""
        shape = (self.spec.rank, self.spec.columns)
        start = random_uniform(self._keys["start"], 0, shape[0] * shape[1], self.a.device).view(shape) / math.sqrt(shape[1])
        return start + _mixture(self.a, self._keys["A"], shape)

    def left(self) -> Tensor:
        """Returns alpha/r B, ``(out, r)``."""
        return self.spec.scale * _mixture(self.b, self._keys["B"], (self.spec.rows, self.spec.rank))

    def delta(self, x: Tensor) -> Tensor:
        """Returns alpha/r B A x."""
        return linear(linear(x, self.right()), self.left())

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns alpha/r B times the columns of A at the ids."""
        return linear(embedding(ids, self.right().T), self.left())

    def delta_weight(self) -> Tensor:
        """Returns the weight change alpha/r B A."""
        return self.left() @ self.right()

    def low_rank(self) -> LowRank:
        """Returns the factors alpha/r B and A."""
        with torch.no_grad():
            return LowRank(self.left(), self.right())

    def stored(self) -> dict[str, Tensor]:
        """Returns the coefficients, or their 4-bit codes with one scale for each block."""
        if self.spec.options.bits == "32":
            return {"a": self.a.detach(), "b": self.b.detach()}
        found: dict[str, Tensor] = {}
        for name, coefficients in (("a", self.a), ("b", self.b)):
            found[f"{name}.codes"], found[f"{name}.scales"] = quantised(coefficients.detach())
        return found

    def finished(self) -> Delta:
        """Returns itself, with coefficients rounded to the values that are saved."""
        if self.spec.options.bits == "4":
            with torch.no_grad():
                for coefficients in (self.a, self.b):
                    coefficients.copy_(dequantised(*quantised(coefficients), len(coefficients)))
        return self


def _mixture(coefficients: Tensor, key: int, shape: tuple[int, int]) -> Tensor:
    """Returns 1/sqrt(k) times the linear combination of k random matrices of a shape."""
    mixed = cast(Tensor, _Mixture.apply(coefficients, key, shape[0] * shape[1]))
    return mixed.view(shape) / math.sqrt(len(coefficients))


@final
class _Mixture(torch.autograd.Function):
    """A vector of ``size`` numbers, the j-th ``sum_i c_i u(j k + i)``; the backward pass makes the random numbers u again."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, key: int, size: int) -> Tensor:
        """Returns the linear combination, computed in chunks of outputs."""
        ctx.key, ctx.bases = key, len(coefficients)
        mixed = torch.empty(size, dtype=torch.float32, device=coefficients.device)
        for start, basis in _chunks(key, ctx.bases, size, coefficients.device):
            torch.mv(basis, coefficients.detach(), out=mixed[start : start + len(basis)])
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Returns the gradient of the coefficients."""
        flowing = gradients[0].float()
        total = torch.zeros(ctx.bases, dtype=torch.float32, device=flowing.device)
        for start, basis in _chunks(ctx.key, ctx.bases, len(flowing), flowing.device):
            total.addmv_(basis.T, flowing[start : start + len(basis)])
        return total, None, None


def _chunks(key: int, bases: int, size: int, device: torch.device) -> Any:
    """Yields (first output, random numbers ``(outputs, k)``)."""
    step = max(1, (GPU_CHUNK if device.type == "cuda" else CPU_CHUNK) // bases)
    for start in range(0, size, step):
        count = min(step, size - start)
        yield start, random_uniform(key, start * bases, count * bases, device).view(count, bases)


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds numbers to 4 bits: -8 to 7 times the scale of their block of 64. The number of largest magnitude is exact.

    Quantising dequantised numbers gives the same codes and scales, because the number of largest magnitude is -8 times the scale.

    Args:
        values: float32 ``(n,)``.

    Returns:
        Codes, uint8, two in each byte; scales, float32, one for each block.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scales = largest / -8.0
    ratios = torch.where(scales == 0, torch.zeros_like(blocks), blocks / torch.where(scales == 0, torch.ones_like(scales), scales))
    codes = (ratios.round().clamp_(-8, 7) + 8).to(torch.uint8).view(-1, 2)
    return codes[:, 0] | (codes[:, 1] << 4), scales.view(-1)


def dequantised(codes: Tensor, scales: Tensor, count: int) -> Tensor:
    """Returns the numbers of codes and scales, float32 ``(count,)``."""
    pairs = torch.stack([codes & 15, codes >> 4], dim=1).view(-1, BLOCK)
    return ((pairs.to(torch.float32) - 8) * scales.view(-1, 1)).view(-1)[:count]


@final
class Nola(Method):
    """The method NOLA."""

    name = "nola"
    options = NolaOptions
    defaults = Defaults(lr=5e-3, alpha_per_rank=1.0, dropout=0.0)

    def check(self, spec: Spec) -> None:
        """Refuses bases with more random numbers than one key gives."""
        needed = spec.options.bases * spec.rank * max(spec.shape)
        if needed > MOST:
            limit = MOST // (spec.rank * max(spec.shape))
            raise InputError(f"{spec.options.bases} bases of rank {spec.rank} for '{spec.name}' are too many numbers; use at most {limit}")

    def count(self, spec: Spec) -> int:
        """Returns 2 k, for every rank and width."""
        return 2 * spec.options.bases

    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Makes a change of zero."""
        zeros = torch.zeros(spec.options.bases, device=given.device)
        return NolaDelta(spec, zeros, zeros.clone())

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Makes a change from its stored coefficients or their codes."""
        if spec.options.bits == "4":
            count = spec.options.bases
            a, b = (dequantised(tensors[f"{name}.codes"], tensors[f"{name}.scales"], count) for name in ("a", "b"))
            return NolaDelta(spec, a, b)
        return NolaDelta(spec, tensors["a"], tensors["b"])


ADAPTERS.add(Nola.name, Nola())
