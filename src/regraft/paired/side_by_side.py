"""Training of several LoRA adapters on one frozen model in one pass: each adapter has its own repetition of the batch's rows.

A row's output depends only on that row and its adapter's factors. Therefore the summed loss of all repetitions gives every adapter exactly
the gradient that it would have in a separate training.

Legend of shapes: K adapters, B rows of a batch, T tokens, I input and O output features, R the largest rank of any of the K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.adapters import AdapterRequest
from regraft.adapters.linear_like import shape_of
from regraft.adapters.nested_init import first_rows
from regraft.errors import InputError
from regraft.models.trainable import replaced_forwards

SCALES: Mapping[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / rank**0.5,
}
"""Scale of ``B A`` as a function of alpha and rank, for the adapters that can be trained in one pass."""


def check_adapter(adapter: str) -> None:
    """Refuses an adapter that cannot be trained with others in one pass.

    Raises:
        InputError: The adapter is not supported; the message names those that are.
    """
    if adapter not in SCALES:
        raise InputError(f"ranks are compared with {' or '.join(SCALES)}, not with `adapter={adapter}`; leave `adapter` out")


@dataclass(frozen=True)
class Factors:
    """The factors of K adapters on one module: the k-th adds ``scale[k] * B[k] A[k] x``.

    Attributes:
        a_KRI: LoRA's A.
        b_KOR: LoRA's B.
        scale_K11: Scale of each adapter.
    """

    a_KRI: Tensor
    b_KOR: Tensor
    scale_K11: Tensor


@contextmanager
def adapted(sites: Mapping[str, nn.Module], factors: Callable[[str], Factors], dropout: Callable[[], float]) -> Iterator[None]:
    """Adds the adapters' outputs to those of the modules inside the block; the modules' weights are not changed.

    Batches inside hold K repetitions of B rows, one repetition after the other. All repetitions share one dropout mask, which is the one
    that PEFT draws for B rows.

    Args:
        sites: The adapted modules, by name.
        factors: Returns the present factors of a module; called on every forward pass.
        dropout: Returns the present dropout rate of the inputs.
    """
    with replaced_forwards({site: _forward(name, site.forward, factors, dropout) for name, site in sites.items()}):
        yield


def _forward(
    name: str, original: Callable[[Tensor], Tensor], factors: Callable[[str], Factors], dropout: Callable[[], float]
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        found, share, output = factors(name), dropout(), original(x)
        count = len(found.scale_K11)
        x_KNI = x.reshape(count, -1, x.shape[-1]).to(found.a_KRI.dtype)
        if share > 0.0:
            mask = F.dropout(torch.ones((x.shape[0] // count, *x.shape[1:]), dtype=x_KNI.dtype, device=x.device), share)
            x_KNI = x_KNI * mask.reshape(1, -1, x.shape[-1])
        change_KNO = torch.bmm(torch.bmm(x_KNI, found.a_KRI.mT), found.b_KOR.mT) * found.scale_K11
        return output + change_KNO.reshape(output.shape).to(output.dtype)

    return forward


@final
class Stack:
    """K adapters of different ranks in common tensors, which are as wide as the largest rank.

    Smaller ranks are padded with zeros in A and in B. Both paddings remain zero during training: the gradient of a row of A is a multiple
    of its column of B and vice versa, and Adam does not change a parameter whose gradients are always zero.

    Args:
        sites: All modules that a request names, by name.
        requests: One request for each adapter, all with one seed.
        adapter: ``lora`` or ``rslora``.
        device: Device of the model.
    """

    def __init__(self, sites: Mapping[str, nn.Module], requests: Sequence[AdapterRequest], adapter: str, device: torch.device) -> None:
        self.requests = tuple(requests)
        self.factors: dict[str, Factors] = {}
        for name, site in sites.items():
            ranks = [request.ranks.get(name, 0) for request in requests]
            scales = [SCALES[adapter](request.alphas[name], rank) if rank else 0.0 for request, rank in zip(requests, ranks, strict=True)]
            rows, columns = shape_of(site)
            start_RI = first_rows(name, max(ranks), columns, requests[0].seed)
            a_KRI = torch.stack([torch.cat([start_RI[:rank], torch.zeros_like(start_RI[rank:])]) for rank in ranks])
            self.factors[name] = Factors(
                nn.Parameter(a_KRI.to(device)),
                nn.Parameter(torch.zeros(len(ranks), rows, max(ranks), device=device)),
                torch.tensor(scales, device=device).reshape(-1, 1, 1),
            )

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def first(self) -> list[nn.Parameter]:
        """All parameters A."""
        return [factor.a_KRI for factor in self.factors.values() if isinstance(factor.a_KRI, nn.Parameter)]

    @property
    def second(self) -> list[nn.Parameter]:
        """All parameters B."""
        return [factor.b_KOR for factor in self.factors.values() if isinstance(factor.b_KOR, nn.Parameter)]

    def taken(self, index: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Returns CPU copies of one adapter's factors and of their Adam moments, by name, without the padding."""
        found: dict[str, Tensor] = {}
        for name, parameter, part in self._parts(index):
            moments = optimizer.state.get(parameter, {})
            tensors = {"value": parameter.detach(), **{key: moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}}
            found |= {f"{name}.{key}": tensor[index][part].to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        return found

    def put(self, index: int, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Restores the result of :meth:`taken`, as the state after ``steps`` optimizer steps."""
        for name, parameter, part in self._parts(index):
            if steps and not optimizer.state.get(parameter):
                fresh: dict[str, Any] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **fresh}
            with torch.no_grad():
                parameter[index][part].copy_(tensors[f"{name}.value"])
                if steps:
                    for key in ("exp_avg", "exp_avg_sq"):
                        optimizer.state[parameter][key][index][part].copy_(tensors[f"{name}.{key}"])

    def _parts(self, index: int) -> Iterator[tuple[str, Tensor, tuple[slice, slice]]]:
        """Yields a name, the common parameter, and the slices of the adapter's own part without padding."""
        for name, factor in self.factors.items():
            rank = self.requests[index].ranks.get(name, 0)
            yield f"{name}.A", factor.a_KRI, (slice(rank), slice(None))
            yield f"{name}.B", factor.b_KOR, (slice(None), slice(rank))


def clip_each(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Clips the gradient of each adapter of a stack separately, as ``clip_grad_norm_`` does for one model.

    Args:
        parameters: The stacked parameters, each ``(K, ...)``.
        limit: Largest norm of one adapter's gradient.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    norm_K = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    share_K = (limit / (norm_K + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(share_K[:, None, None])
