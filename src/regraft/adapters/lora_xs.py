"""LoRA-XS: a small trainable square matrix between the leading singular vectors of the weight.

    dW = alpha/r U_r R S_r V_r^T,   R (r, r) from N(0, 1e-5), everything else frozen

Only R is saved; U_r, S_r and V_r are recomputed from the weight. A recomputed decomposition may have other signs, or other vectors for
close singular values, and then the stored R would give another change. Therefore signs are canonical
(:func:`regraft.numerics.svd.canonical_signs`), and the file has a checksum: the products of the frames with fixed random vectors.

References:
    [BAL24] Balazy, Banaei, Aberer, Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
        arXiv 2405.17604, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from regraft.adapters.contract import ADAPTERS, Defaults, Delta, LowRank, Method, Spec
from regraft.errors import InputError
from regraft.numerics.counter import random_uniform
from regraft.numerics.svd import Triplets, randomized_triplets, top_triplets
from regraft.settings import Settings

FIRST_SCALE = 1e-5  # standard deviation of the initial R
EXACT_UP_TO = 1024  # largest smaller side of a weight that is decomposed exactly
ITERATIONS = 8
TOLERANCE = 1e-3  # relative tolerance of the checksum: rounding changes it by less, a flipped sign by far more
_PROBE, _SKETCH = 1, 2


class LoraXsOptions(Settings):
    """Options of LoRA-XS: none."""


@final
class LoraXsDelta(Delta):
    """The weight change ``scale * left R right``.

    Args:
        spec: Specification of the map and the adapter.
        left: U_r, ``(out, r)``.
        right: S_r V_r^T, ``(r, in)``.
        core: R, ``(r, r)``.
    """

    def __init__(self, spec: Spec, left: Tensor, right: Tensor, core: Tensor) -> None:
        super().__init__(spec)
        self.register_buffer("left", left.float().contiguous())
        self.register_buffer("right", right.float().contiguous())
        self.core = nn.Parameter(core.float())

    def _writer(self) -> Tensor:
        """Returns scale left R, ``(out, r)``."""
        return self.spec.scale * (cast(Tensor, self.left) @ self.core)

    def delta(self, x: Tensor) -> Tensor:
        """Returns scale left R right x."""
        return linear(linear(x, cast(Tensor, self.right)), self._writer())

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns scale left R times the columns of right at the ids."""
        return linear(embedding(ids, cast(Tensor, self.right).T), self._writer())

    def delta_weight(self) -> Tensor:
        """Returns the weight change scale left R right."""
        return self._writer() @ cast(Tensor, self.right)

    def low_rank(self) -> LowRank:
        """Returns the factors scale left R and right."""
        return LowRank(self._writer().detach(), cast(Tensor, self.right))

    def stored(self) -> dict[str, Tensor]:
        """Returns R and the checksum of the frames."""
        return {"core": self.core.detach(), "checksum": checksum(cast(Tensor, self.left), cast(Tensor, self.right))}


def frames_of(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns U_r and S_r V_r^T of a weight ``(out, in)``, decomposed in float64, signs canonical."""
    wide = weight.double()
    if min(weight.shape) <= EXACT_UP_TO:
        found: Triplets = top_triplets(wide, rank)
    else:  # a fixed sketch, so that the recomputed result is the same
        found = randomized_triplets(wide, rank, torch.Generator().manual_seed(_SKETCH), iterations=ITERATIONS)
    return found.left, found.values.unsqueeze(1) * found.right.T


def checksum(left: Tensor, right: Tensor) -> Tensor:
    """Returns a checksum of a decomposition: ``left^T p`` and ``right q`` for fixed random p and q, float32 ``(2, r)``."""
    sums = [left.T.cpu() @ random_uniform(_PROBE, 0, left.shape[0]), right.cpu() @ random_uniform(_PROBE, 0, right.shape[1])]
    return torch.stack(sums)


@final
class LoraXs(Method):
    """The method LoRA-XS."""

    name = "lora_xs"
    options = LoraXsOptions
    defaults = Defaults(lr=4e-3, alpha_per_rank=1.0, dropout=0.0)

    def check(self, spec: Spec) -> None:
        """Accepts every rank up to the smaller side."""

    def count(self, spec: Spec) -> int:
        """Returns r^2, for every width."""
        return spec.rank**2

    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Makes a change from the decomposition of the weight."""
        core = FIRST_SCALE * torch.randn(spec.rank, spec.rank, generator=spec.generator())
        return LoraXsDelta(spec, *frames_of(given, spec.rank), core.to(given.device))

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Decomposes the weight again and compares the checksum.

        Raises:
            InputError: The decomposition differs, so that R would give another change.
        """
        delta = LoraXsDelta(spec, *frames_of(weight, spec.rank), tensors["core"].to(weight.device))
        seen, kept = checksum(cast(Tensor, delta.left), cast(Tensor, delta.right)), tensors["checksum"]
        apart = float(((seen - kept).norm(dim=1) / kept.norm(dim=1)).max())
        if not apart <= TOLERANCE:
            raise InputError(
                f"the singular vectors of '{spec.name}' differ from those that the adapter was trained with ({apart:.1e} apart, limit "
                f"{TOLERANCE:.0e}); load the base in the number type and with the libraries of the training, or export the adapter there"
            )
        return delta


ADAPTERS.add(LoraXs.name, LoraXs())
