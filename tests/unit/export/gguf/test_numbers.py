"""Stored numbers are those of the format, and what is stored reads back as it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.export.gguf.numbers import (
    BF16,
    F16,
    F32,
    K_TYPES,
    Q5_0,
    Q8_0,
    QUANTIZATION_VERSION,
    SCHEMES,
    Stored,
    bytes_of,
    encode,
    type_of,
)
from regraft.export.gguf.source import Entry

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q5_0, Q8_0, *K_TYPES], ids=lambda kind: kind.name)
def test_the_types_are_those_of_the_format(kind: Stored) -> None:
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert (int(theirs), gguf.GGML_QUANT_SIZES[theirs]) == (kind.number, (kind.block, kind.block_bytes))


def test_the_schemes_are_those_of_the_format() -> None:
    for name, scheme in SCHEMES.items():
        theirs = gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]
        assert int(theirs) == scheme.file_type
    assert gguf.GGML_QUANT_VERSION == QUANTIZATION_VERSION


@pytest.mark.parametrize(
    ("kind", "error"), [(F16, 1e-3), (BF16, 1e-2), (Q8_0, 0.01), (Q5_0, 0.1), *zip(K_TYPES, (0.3, 0.15, 0.08, 0.04), strict=True)]
)
def test_numbers_read_back(kind: Stored, error: float) -> None:
    values = torch.randn(6, 512)
    stored = encode(values, kind)
    assert stored.nbytes == bytes_of((6, 512), kind)
    back = gguf.quants.dequantize(stored.view(np.uint8).reshape(6, -1), gguf.GGMLQuantizationType[kind.name])
    assert np.abs(back - values.numpy()).mean() < error


def test_eight_bits_are_those_of_gguf_py() -> None:
    halves = torch.tensor([127.0, 0.5, -0.5, 1.5, -2.5, 0.49999997, *[3.5] * 26])
    values = torch.cat([torch.randn(64, 96), torch.zeros(1, 96), halves.repeat(1, 3), torch.full((1, 96), 1e-30), 1e6 * torch.randn(1, 96)])
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(encode(values, Q8_0), theirs)
    assert np.array_equal(encode(values.bfloat16(), Q8_0), gguf.quants.quantize(values.bfloat16().float().numpy(), theirs_of(Q8_0)))


def theirs_of(kind: Stored) -> int:
    return gguf.GGMLQuantizationType[kind.name]


def test_importance_moves_the_error_to_the_channels_that_matter_less() -> None:
    values = torch.randn(64, 256)
    importance = np.where(np.arange(256) % 2 == 0, 100.0, 0.01).astype(np.float32)
    errors = []
    for weights in (None, importance):
        back = gguf.quants.dequantize(encode(values, SCHEMES["Q3_K_M"].usual, weights).reshape(64, -1), gguf.GGMLQuantizationType.Q3_K)
        errors.append(float((np.square(back - values.numpy()) * importance).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_rows_that_do_not_divide_are_stored_finer() -> None:
    scheme = SCHEMES["Q4_K_M"]
    for width, name in ((512, "Q4_K"), (96, "Q5_0"), (40, "F16")):
        entry = Entry("blk.3.attn_q.weight", (8, width), lambda: torch.zeros(1), layer=3)
        assert type_of(entry, scheme, 8).name == name
    assert type_of(Entry("blk.3.attn_norm.weight", (8, 8), lambda: torch.zeros(1), exact=True), scheme, 8) is F32
