"""Safetensors folders, read by their headers: what is stored where, and whether the files are whole.

The format (https://huggingface.co/docs/safetensors): eight bytes, little-endian, with the length of a JSON header; the header,
which maps each tensor to its dtype, shape and byte range; the bytes, without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_HEADER_BYTES = 100_000_000  # the limit of the reference reader
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
CONVERT = "transformers.AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(OTHER_FOLDER)"
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor.

    Attributes:
        dtype: As safetensors writes it, such as ``BF16``.
        shape: Of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns what a safetensors file holds, after checking that the file is whole.

    Raises:
        ModelError: The file is truncated, damaged, a git-lfs pointer, or holds a number type that we do not read.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ModelError(f"'{path}' is a git-lfs pointer, not the weights; fetch them with: git lfs pull")
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < header_bytes <= min(LONGEST_HEADER_BYTES, size_bytes - 8):
            raise ModelError(f"'{path}' is truncated or damaged: {size_bytes} bytes, of which the header claims {header_bytes}; {AGAIN}")
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: (StoredTensor(e["dtype"], tuple(e["shape"])), tuple(e["data_offsets"])) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"'{path}' is damaged: its header cannot be read ({type(error).__name__}); {AGAIN}") from None
    _refuse_gaps(path, entries, size_bytes - 8 - header_bytes)
    return {name: tensor for name, (tensor, _) in entries.items()}


def _refuse_gaps(path: Path, entries: Mapping[str, tuple[StoredTensor, tuple[Any, ...]]], data_bytes: int) -> None:
    """Checks that the tensors fill the file without gaps and that each has as many bytes as its shape needs."""
    position = 0
    for name, (tensor, offsets) in sorted(entries.items(), key=lambda item: repr(item[1][1])):
        if tensor.dtype not in BYTES or (tensor.dtype not in FLOATS and name.endswith(".weight")):
            known = ", ".join(FLOATS)
            raise ModelError(f"'{path}' holds '{name}' as {tensor.dtype}, not as {known}; use a checkpoint that is not quantized")
        whole = all(isinstance(number, int) and number >= 0 for number in (*tensor.shape, *offsets)) and len(offsets) == 2
        if not whole or offsets[1] - offsets[0] != math.prod(tensor.shape) * BYTES[tensor.dtype]:
            raise ModelError(f"'{path}' is damaged: the bytes of '{name}' do not fit its shape {list(tensor.shape)}; {AGAIN}")
    for name, (_, offsets) in sorted(entries.items(), key=lambda item: item[1][1]):
        if offsets[0] != position:
            raise ModelError(f"'{path}' is damaged: '{name}' starts at byte {offsets[0]} of the data, not at {position}; {AGAIN}")
        position = offsets[1]
    if position != data_bytes:
        what = "truncated" if data_bytes < position else "damaged"
        raise ModelError(f"'{path}' is {what}: it holds {data_bytes} bytes of weights, its header promises {position}; {AGAIN}")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Returns the safetensors files of a model folder, sorted by name.

    Raises:
        ModelError: There are none, only pickles, or a shard that the index names is missing.
    """
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        names = sorted(set(_weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"'{folder}' lacks {len(missing)} of {len(names)} weight files, such as '{missing[0]}'; {AGAIN}")
        return tuple(folder / name for name in names)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"'{folder}' has its weights as a pickle ('{pickles[0]}'), which can run code when read; if you trust it, convert it "
            f"to safetensors: {CONVERT}"
        )
    if any(folder.glob("*.gguf")):
        raise ModelError(f"'{folder}' has its weights as GGUF; give that file itself")
    raise ModelError(f"'{folder}' has no {SINGLE} and no {INDEX}; give a folder with safetensors weights")


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in mapping.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"'{path}' is damaged: no list of weight files can be read ({type(error).__name__}); {AGAIN}") from None
    outside = [file for file in names.values() if Path(file).name != file]
    if outside or not names:
        raise ModelError(f"'{path}' names {outside[:1] or 'no file'}; weight files lie beside it: {AGAIN}")
    return names


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a model folder, after checking that all files are whole.

    Raises:
        ModelError: A file is missing or damaged, or does not hold what the index says.
    """
    found: dict[str, StoredTensor] = {}
    holder: dict[str, str] = {}
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in found:
                raise ModelError(f"'{folder}' holds '{name}' twice, in '{holder[name]}' and '{path.name}'; {AGAIN}")
            found[name], holder[name] = tensor, path.name
    if not found:
        raise ModelError(f"the weight files of '{folder}' are empty; {AGAIN}")
    if not (folder / SINGLE).is_file():
        for name, file in sorted(_weight_map(folder).items()):
            if holder.get(name) != file:
                raise ModelError(f"'{folder / INDEX}' says that '{file}' holds '{name}', but it does not; {AGAIN}")
    return found


def weights_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """Returns the number type that most weights are stored in; float64 is read as float32.

    Raises:
        ModelError: None of the tensors is of a floating-point type.
    """
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOATS:
            counts[FLOATS[tensor.dtype]] += math.prod(tensor.shape)
    if not counts:
        raise ModelError("none of the weights is of a floating-point type; use a checkpoint that is not quantized")
    return counts.most_common(1)[0][0]
