"""Number formats of GGUF files: float types, and blocks of a few bits with a scale each.

Float types and ``Q8_0`` are written by gguf-py. The K types come from llama.cpp's own quantiser, the function
``ggml_quantize_chunk`` in the library of ``xllamacpp``, which also weighs the error of each input channel by an importance matrix.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.errors import InputError, MissingDependencyError
from regraft.export.gguf.source import Entry


@dataclass(frozen=True)
class Stored:
    """A number format of GGUF.

    Attributes:
        name: Name of the number format in GGUF.
        number: Number that stands for it in a file.
        block: Number of values that share a scale; 1 for float types.
        block_bytes: Bytes of a block.
    """

    name: str
    number: int
    block: int
    block_bytes: int


F32, F16, BF16 = Stored("F32", 0, 1, 4), Stored("F16", 1, 1, 2), Stored("BF16", 30, 1, 2)
Q5_0, Q8_0 = Stored("Q5_0", 6, 32, 22), Stored("Q8_0", 8, 32, 34)
Q3_K, Q4_K = Stored("Q3_K", 11, 256, 110), Stored("Q4_K", 12, 256, 144)
Q5_K, Q6_K = Stored("Q5_K", 13, 256, 176), Stored("Q6_K", 14, 256, 210)
FLOATS = (F32, F16, BF16)
QUANTIZATION_VERSION = 2
K_TYPES = (Q3_K, Q4_K, Q5_K, Q6_K)
CHUNK_VALUES = 1 << 18  # are converted to float32 at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Scheme:
    """The number formats of the matrices of a file.

    Attributes:
        name: Name as users write it, such as ``Q4_K_M``.
        usual: Number format of most matrices.
        better: Number format of the most sensitive matrices: half of the value and down projections, and the output projection.
        file_type: Number that the file states as its type.
        usual_rows: Number format for matrices whose rows do not divide into blocks of the usual one.
    """

    name: str
    usual: Stored
    better: Stored
    file_type: int
    usual_rows: Stored = F16

    @property
    def is_exact(self) -> bool:
        """Returns whether the file holds the weights as they are in float32."""
        return self.usual is F32

    @property
    def is_quantized(self) -> bool:
        """Returns whether weights are stored as blocks of integers."""
        return self.usual not in FLOATS


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("F32", F32, F32, 0),
        Scheme("F16", F16, F16, 1),
        Scheme("BF16", BF16, BF16, 32),
        Scheme("Q8_0", Q8_0, Q8_0, 7),
        Scheme("Q6_K", Q6_K, Q6_K, 18, Q8_0),
        Scheme("Q5_K_M", Q5_K, Q6_K, 17, Q8_0),
        Scheme("Q5_K_S", Q5_K, Q5_K, 16, Q8_0),
        Scheme("Q4_K_M", Q4_K, Q6_K, 15, Q5_0),
        Scheme("Q4_K_S", Q4_K, Q4_K, 14, Q5_0),
        Scheme("Q3_K_M", Q3_K, Q4_K, 12, Q5_0),
    )
}


def scheme_named(name: str) -> Scheme:
    """Returns a scheme by its name, in any case.

    Raises:
        InputError: There is none of this name.
    """
    found = SCHEMES.get(name.upper())
    if found is None:
        raise InputError(f"quantization '{name}' is not known; choose one of: {', '.join(SCHEMES)}")
    return found


def type_of(entry: Entry, scheme: Scheme, layers: int) -> Stored:
    """Returns how one tensor is stored.

    Rows that do not divide into blocks of the wanted type fall back to the next finer one that they divide into.
    """
    if entry.exact or len(entry.shape) == 1:
        return F32
    wanted = scheme.better if _suffers(entry, layers) else scheme.usual
    for candidate in (wanted, scheme.usual_rows, F16):
        if entry.shape[-1] % candidate.block == 0:
            return candidate
    raise AssertionError("every row divides into blocks of one value")


def _suffers(entry: Entry, layers: int) -> bool:
    """Returns whether rounding a matrix costs more than rounding others: the rule that llama.cpp's mixtures follow.

    The embedding counts, as it is the output projection where the two are tied.
    """
    if entry.layer < 0:
        return True
    if not any(part in entry.name for part in ("attn_v", "attn_qkv", "ffn_down")):
        return False
    edge = layers // 8
    return entry.layer < edge or entry.layer >= 7 * layers // 8 or (entry.layer - edge) % 3 == 2


def bytes_of(shape: tuple[int, ...], kind: Stored) -> int:
    """Returns how many bytes a tensor takes in the file."""
    return math.prod(shape) // kind.block * kind.block_bytes


def encode(tensor: Tensor, kind: Stored, importance: np.ndarray | None = None) -> np.ndarray:
    """Returns the bytes of a tensor, or its values for float32 and float16.

    Args:
        tensor: The tensor, of any float type.
        kind: Number format; the last axis divides into its blocks.
        importance: For K types, the weight of the error of each input channel, (in,).

    Raises:
        MissingDependencyError: A K type is wanted and llama.cpp is not installed.
    """
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    if kind is BF16:  # gguf-py rounds through integers; torch does the same at once
        return rows.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if kind in (F32, F16):
        return tensor.detach().to(torch.float32 if kind is F32 else torch.float16).contiguous().numpy()
    step = max(1, CHUNK_VALUES // rows.shape[1])
    chunks = [rows[start : start + step].to(torch.float32).contiguous().numpy() for start in range(0, rows.shape[0], step)]
    if kind in K_TYPES:
        return np.concatenate([_quantized(chunk, kind, importance) for chunk in chunks])
    if kind is Q8_0:
        return np.concatenate([_in_eight_bits(torch.from_numpy(chunk)) for chunk in chunks])
    gguf = require_gguf()
    return np.concatenate([gguf.quants.quantize(chunk, gguf.GGMLQuantizationType(kind.number)).view(np.uint8) for chunk in chunks])


def require_gguf() -> ModuleType:
    """Returns gguf-py, which writes and reads the format.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return import_module("gguf")
    except ImportError:
        raise MissingDependencyError("gguf", "gguf") from None


def _in_eight_bits(values: Tensor) -> np.ndarray:
    """Returns rows, (rows, in) in float32, as Q8_0 stores them: for each block of 32 a float16 scale, and 32 whole numbers.

    Halves are rounded away from zero, as C's ``roundf`` does.
    """
    blocks = values.reshape(-1, Q8_0.block)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    exact = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    size = exact.abs()
    whole = size.floor()
    whole += size.sub_(whole).mul_(2).floor_()
    found = torch.empty(len(blocks), Q8_0.block_bytes, dtype=torch.uint8)
    found[:, :2] = scale.to(torch.float16).view(torch.uint8)
    found[:, 2:] = whole.copysign_(exact).to(torch.int8).view(torch.uint8)
    return found.reshape(len(values), -1).numpy()


def _quantized(rows: np.ndarray, kind: Stored, importance: np.ndarray | None) -> np.ndarray:
    """Returns rows, (rows, in) in float32, as llama.cpp's quantiser stores them."""
    count, width = rows.shape
    found = np.zeros((count, bytes_of((width,), kind)), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    pointer = ctypes.POINTER(ctypes.c_float)
    _quantizer()(
        kind.number,
        rows.ctypes.data_as(pointer),
        found.ctypes.data_as(ctypes.c_void_p),
        0,
        count,
        width,
        None if weights is None else weights.ctypes.data_as(pointer),
    )
    return found


@cache
def _quantizer() -> Any:
    spec = find_spec("xllamacpp.xllamacpp") if find_spec("xllamacpp") is not None else None
    if spec is None or spec.origin is None:
        raise MissingDependencyError("xllamacpp", "gguf")
    try:
        function = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise InputError(f"this xllamacpp has no quantiser ({error}); install the pinned one, or use `quantize=Q8_0`") from None
    number = ctypes.c_int64
    function.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_float),
        ctypes.c_void_p,
        number,
        number,
        number,
        ctypes.POINTER(ctypes.c_float),
    ]
    function.restype = ctypes.c_size_t
    return function
