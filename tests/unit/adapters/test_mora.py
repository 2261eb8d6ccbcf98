"""MoRA against loops over entries, and PEFT's MiSS where the two are the same; every input has influence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import MissConfig, get_peft_model
from torch import Tensor, nn

from regraft.adapters import AdapterRequest, Delta, make_specs
from regraft.adapters.mora import ROPE_BASE, Mora, MoraOptions, RotationDelta, SharingDelta
from regraft.errors import InputError

SHAPES = [(24, 24), (12, 40), (40, 12), (17, 29), (9, 70)]


def made(shape: tuple[int, int], rank: int, form: str, seed: int | None = 0) -> Delta:
    request = AdapterRequest({"w": rank}, {"w": float(rank)}, 0.0, 1, MoraOptions.model_validate({"form": form}))
    spec = make_specs({"w": nn.Linear(shape[1], shape[0])}, request)["w"]
    Mora().check(spec)
    delta = Mora().make(spec, torch.zeros(shape))
    if seed is not None:
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return delta


def sharing(delta: SharingDelta, x: Tensor) -> Tensor:
    """Sums of inputs i = j mod s, times M, tiled; one entry at a time."""
    size = len(delta.matrix)
    sums = torch.zeros(size, dtype=torch.float64)
    for index, value in enumerate(x.double()):
        sums[index % size] += value
    outputs = delta.matrix.detach().double() @ sums
    return torch.stack([outputs[index % size] for index in range(delta.spec.rows)])


def rotation(delta: RotationDelta, x: Tensor) -> Tensor:
    """Chunks rotated as complex numbers, summed into the outputs there are, times M; repeated where they are too few."""
    size = len(delta.matrix)
    half, chunks_out = size // 2, math.ceil(delta.spec.rows / size)
    padded = torch.cat([x.double(), torch.zeros(-len(x) % size, dtype=torch.float64)]).view(-1, size)
    frequency = ROPE_BASE ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    written = [torch.zeros(size, dtype=torch.float64) for _ in range(min(len(padded), chunks_out))]
    for number, chunk in enumerate(padded):
        turned = torch.complex(chunk[:half], chunk[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), number * frequency)
        written[number % chunks_out] += delta.matrix.detach().double() @ torch.cat([turned.real, turned.imag])
    outputs = torch.cat([written[index % len(written)] for index in range(chunks_out)])
    return outputs[: delta.spec.rows]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["sharing", "rotation"])
def test_the_change_is_that_of_the_loops(shape: tuple[int, int], form: str) -> None:
    delta = made(shape, 1 if min(shape) < 12 else 2, form)
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(4))
    wanted = sharing(delta, x) if isinstance(delta, SharingDelta) else rotation(delta, x)  # type: ignore[arg-type]
    torch.testing.assert_close(delta(x).detach().double(), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(delta.delta_weight().detach().double() @ x.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["sharing", "rotation"])
def test_every_input_has_influence(shape: tuple[int, int], form: str) -> None:
    change = made(shape, 1, form).delta_weight().detach()
    assert float(change.abs().amax(0).min()) > 1e-3
    assert float(change.abs().amax(1).min()) > 1e-3


def test_the_released_code_would_ignore_inputs() -> None:
    """The control: with the chunks beyond the outputs cut off, most of a down projection's columns are zero."""
    delta = made((10, 61), 1, "rotation")
    assert isinstance(delta, RotationDelta)
    reached = delta.chunks_out * len(delta.matrix)
    assert reached < 61
    cut = delta.delta_weight().detach()[:, reached:]
    assert float(cut.abs().max()) > 1e-3  # ours reaches them


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_has_more_rank_than_its_matrix_and_sharing_has_not(shape: tuple[int, int]) -> None:
    for form, limit in (("sharing", True), ("rotation", False)):
        delta = made(shape, 1, form)
        size = len(next(delta.parameters()))
        rank = int(torch.linalg.matrix_rank(delta.delta_weight().detach().double()))
        chunks = min(math.ceil(side / size) for side in shape)
        assert rank == size if limit or chunks == 1 else rank > size


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("rows", "columns", "rank"), [(24, 24, 3), (16, 48, 1), (32, 32, 1)])
def test_sharing_is_peft_s_mini_miss_where_sizes_divide(rows: int, columns: int, rank: int) -> None:
    ours = made((rows, columns), rank, "sharing")
    assert isinstance(ours, SharingDelta)
    size = len(ours.matrix)
    if columns % size or rows % size:
        pytest.skip("the sizes do not divide")
    plain: Any = nn.Sequential(nn.Linear(columns, rows, bias=False))
    with torch.no_grad():
        plain[0].weight.zero_()
    theirs: Any = get_peft_model(plain, MissConfig(r=size, mini_r=size, target_modules=["0"], init_weights="mini"))
    block = next(parameter for name, parameter in theirs.named_parameters() if "miss_block" in name)
    with torch.no_grad():
        block.copy_(torch.randn(block.shape, generator=torch.Generator().manual_seed(1)))
        ours.matrix.copy_(block.T)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-4)


def test_a_matrix_beyond_the_weight_is_refused_with_the_rank_that_fits() -> None:
    with pytest.raises(InputError, match=r"rank 9 gives 'w' a matrix of side 19, above the limit 12 .* use `rank=3` or less"):
        made((12, 30), 9, "sharing")
    with pytest.raises(InputError, match="leave it out with `targets`"):
        made((6, 61), 1, "sharing")
    made((12, 30), 3, "sharing")
