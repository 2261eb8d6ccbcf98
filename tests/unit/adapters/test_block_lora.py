"""Block-diagonal LoRA against a loop over its blocks, plain LoRA where there is one block, and planted effective ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regraft.adapters import AdapterRequest, Spec, make_specs
from regraft.adapters.block_lora import BlockLora, BlockLoraDelta, BlockLoraOptions, blocks_for, effective_rank
from regraft.errors import InputError

SHAPES = [(24, 24), (17, 29), (40, 12)]


def spec_of(shape: tuple[int, int], rank: int, blocks: int | str) -> Spec:
    request = AdapterRequest({"w": rank}, {"w": 3.0 * rank}, 0.0, 1, BlockLoraOptions.model_validate({"blocks": blocks}))
    return make_specs({"w": nn.Linear(shape[1], shape[0])}, request)["w"]


def made(shape: tuple[int, int], rank: int, blocks: int) -> BlockLoraDelta:
    delta = BlockLora().make(spec_of(shape, rank, blocks), torch.zeros(shape))
    assert isinstance(delta, BlockLoraDelta)
    with torch.no_grad():
        delta.left.copy_(torch.randn(delta.left.shape, generator=torch.Generator().manual_seed(2)))
    return delta


def by_loops(delta: BlockLoraDelta, blocks: int) -> Tensor:
    """The change of the weight, entry by entry; the first parts are the larger ones."""
    rows, columns = delta.spec.shape

    def owner(index: int, length: int) -> int:
        small, larger = divmod(length, blocks)
        return index // (small + 1) if index < larger * (small + 1) else larger + (index - larger * (small + 1)) // small

    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            if owner(row, rows) == owner(column, columns):
                weight[row, column] = 3.0 * (delta.left[row].double() @ delta.right[:, column].double())
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_the_change_is_that_of_the_loops(shape: tuple[int, int], blocks: int) -> None:
    delta = made(shape, 2, blocks)
    expected = by_loops(delta, blocks)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(delta.delta(x).double(), x.double() @ expected.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta.delta_weight().double(), expected, rtol=1e-5, atol=1e-6)
    factors = delta.low_rank()
    assert factors.right.shape[0] == 2 * blocks
    torch.testing.assert_close((factors.left @ factors.right).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.linalg.matrix_rank(expected) == min(2 * blocks, *shape), "blocks multiply the rank"
    assert sum(parameter.numel() for parameter in delta.parameters()) == BlockLora().count(delta.spec) == 2 * sum(shape)


def test_it_starts_at_zero_with_the_bounds_of_each_block() -> None:
    delta = BlockLora().make(spec_of((24, 26), 4, 4), torch.zeros(24, 26))
    assert isinstance(delta, BlockLoraDelta)
    assert not delta.delta_weight().any()
    right = delta.right.detach()
    for part, size in zip(right.split([7, 7, 6, 6], dim=1), [7, 7, 6, 6], strict=True):
        assert 0.6 * size**-0.5 < part.abs().max() <= size**-0.5


def test_the_blocks_follow_the_gradients_effective_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    for rank in (1, 5, 16, 33):
        planted = frame[:, :rank] @ frame[:rank]
        assert effective_rank(planted) == pytest.approx(rank, rel=1e-6)
        expected = {1: 1, 5: 1, 16: 4, 33: 8}[rank]
        assert blocks_for(planted, 4) == expected
        delta = BlockLora().make(spec_of((64, 64), 4, "auto"), planted)
        assert isinstance(delta, BlockLoraDelta)
        assert delta.blocks == expected
    assert blocks_for(torch.zeros(8, 8), 2) == 1


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"5 blocks of rank 4 do not fit into 'w' \(17 x 29\); give 4 blocks or fewer"):
        BlockLora().check(spec_of((17, 29), 4, 5))
    delta = made((12, 12), 2, 3)
    stored = delta.stored() | {"blocks": torch.tensor([13])}
    with pytest.raises(InputError, match="has 13 blocks"):
        BlockLora().restore(delta.spec, stored, torch.zeros(12, 12))
