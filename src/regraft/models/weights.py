"""Safetensors folders, read by their headers: where each tensor is stored, and whether the files are complete.

The format (https://huggingface.co/docs/safetensors): eight bytes, little-endian, with the length of a JSON header; the header,
which maps each tensor to its dtype, shape and byte range; the bytes, without gaps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.errors import ModelError, RegraftError, shown
from regraft.reading import AGAIN, read_object, read_safetensors_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_EMPTY_SIDE = 1 << 20  # a tensor without values takes no byte of the file, whatever its other sides promise
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
CONVERT = "transformers.AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(OTHER_FOLDER)"


@dataclass(frozen=True)
class StoredTensor:
    """A header's entry for one tensor.

    Attributes:
        dtype: Number type in the words of safetensors, such as ``BF16``.
        shape: The tensor's shape.
        path: The file that holds it.
        offset: Position of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors that a safetensors file holds, by name, after checking that the file is complete.

    Raises:
        ModelError: The file is truncated, damaged, a git-lfs pointer, or holds a number type that we do not read.
    """
    header, header_bytes, size_bytes = read_safetensors_header(path, ModelError)
    try:
        entries = {key: _entry(value, path, 8 + header_bytes) for key, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ModelError(f"'{shown(path)}' is damaged: its header cannot be read ({type(error).__name__}); {AGAIN}") from None
    _refuse_gaps(path, entries, size_bytes - 8 - header_bytes)
    return {key: tensor for key, (tensor, _) in entries.items()}


def _entry(value: Any, path: Path, start: int) -> tuple[StoredTensor, tuple[Any, ...]]:
    """Returns the tensor that a header's entry describes, and its byte range."""
    offsets = tuple(value["data_offsets"])
    return StoredTensor(str(value["dtype"]), tuple(value["shape"]), path, start + int(offsets[0])), offsets


def _refuse_gaps(path: Path, entries: Mapping[str, tuple[StoredTensor, tuple[Any, ...]]], data_bytes: int) -> None:
    """Checks that the tensors fill the file without gaps and that each has as many bytes as its shape needs."""
    position, shown_path = 0, shown(path)
    for key, (tensor, offsets) in sorted(entries.items(), key=lambda item: repr(item[1][1])):
        name = shown(key)
        if tensor.dtype not in DTYPES or (tensor.dtype not in FLOATS and key.endswith(".weight")):
            known = ", ".join(FLOATS)
            raise ModelError(
                f"'{shown_path}' holds '{name}' as {shown(tensor.dtype)}, not as {known}; use a checkpoint that is not quantized"
            )
        whole = all(type(number) is int and 0 <= number < 1 << 62 for number in (*tensor.shape, *offsets)) and len(offsets) == 2
        if not whole or offsets[1] - offsets[0] != tensor.numel * DTYPES[tensor.dtype].itemsize:
            raise ModelError(f"'{shown_path}' is damaged: the bytes of '{name}' do not fit its shape {list(tensor.shape)}; {AGAIN}")
        if not tensor.numel and max(tensor.shape) > LARGEST_EMPTY_SIDE:
            raise ModelError(f"'{shown_path}' is damaged: '{name}' has the shape {list(tensor.shape)} and no value; {AGAIN}")
    for key, (_, offsets) in sorted(entries.items(), key=lambda item: item[1][1]):
        if offsets[0] != position:
            raise ModelError(
                f"'{shown_path}' is damaged: '{shown(key)}' starts at byte {offsets[0]} of the data, not at {position}; {AGAIN}"
            )
        position = offsets[1]
    if position != data_bytes:
        what = "truncated" if data_bytes < position else "damaged"
        raise ModelError(f"'{shown_path}' is {what}: it holds {data_bytes} bytes of weights, its header promises {position}; {AGAIN}")


def read_tensor(stored: StoredTensor) -> Tensor:
    """Reads a stored tensor into new memory. The file is not mapped, so it may change afterwards.

    Raises:
        ModelError: The file ended meanwhile.
    """
    found = torch.empty(stored.numel, dtype=DTYPES[stored.dtype])
    with stored.path.open("rb", buffering=0) as stream:
        fill(found, stream, stored, 0)
    return found.reshape(stored.shape)


def fill(tensor: Tensor, stream: FileIO, stored: StoredTensor, first: int) -> int:
    """Fills a tensor with the values of a stored one, from value ``first`` onwards; returns the bytes that were read.

    Raises:
        ModelError: The file ended meanwhile.
    """
    buffer = memory_of(tensor)
    stream.seek(stored.offset + first * tensor.dtype.itemsize)
    done = 0
    while done < len(buffer):
        got = stream.readinto(buffer[done:])
        if not got:
            raise ModelError(f"'{shown(stored.path)}' ended while it was read, {len(buffer) - done} bytes too early; {AGAIN}")
        done += got
    return done


def memory_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, to be read and written in place."""
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # a single value that was expanded counts as contiguous and cannot be seen as bytes
        flat = flat.clone(memory_format=torch.contiguous_format)
    values: Any = flat.view(torch.uint8).numpy()
    return memoryview(values)


def read_tensors(path: Path, error: type[RegraftError] = ModelError) -> dict[str, Tensor]:
    """Returns all tensors of one safetensors file, by name.

    Raises:
        RegraftError: The file is missing, truncated or damaged; the exception has the given type.
    """
    try:
        return {name: read_tensor(stored) for name, stored in read_header(path).items()}
    except OSError as failure:
        raise error(f"'{shown(path)}' cannot be read: {failure.strerror}; check its permissions") from None
    except ModelError as failure:
        raise error(str(failure)) from None


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
            raise ModelError(f"'{folder}' lacks {len(missing)} of {len(names)} weight files, such as '{shown(missing[0])}'; {AGAIN}")
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
        mapping = read_object(path, ModelError)["weight_map"]
        names = {str(name): str(file) for name, file in mapping.items()}
    except ModelError:
        raise ModelError(f"'{path}' is damaged: no list of weight files can be read (not JSON); {AGAIN}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' is damaged: no list of weight files can be read ({type(error).__name__}); {AGAIN}") from None
    outside = [file for file in names.values() if Path(file).name != file or not file.endswith(".safetensors")]
    if outside or not names:
        what = f"'{shown(outside[0])}'" if outside else "no file"
        raise ModelError(f"'{path}' names {what}; weight files lie beside it and end in .safetensors: {AGAIN}")
    return names


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a model folder, by name, after checking that all files are complete.

    Raises:
        ModelError: A file is missing or damaged, or does not hold what the index says.
    """
    found: dict[str, StoredTensor] = {}
    holder: dict[str, str] = {}
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in found:
                raise ModelError(f"'{folder}' holds '{shown(name)}' twice, in '{holder[name]}' and '{path.name}'; {AGAIN}")
            found[name], holder[name] = tensor, path.name
    if not found:
        raise ModelError(f"the weight files of '{folder}' are empty; {AGAIN}")
    if not (folder / SINGLE).is_file():
        for name, file in sorted(_weight_map(folder).items()):
            if holder.get(name) != file:
                raise ModelError(f"'{folder / INDEX}' says that '{file}' holds '{name}', but it does not; {AGAIN}")
    return found


def weights_dtype(tensors: Mapping[str, StoredTensor], wanted: str = "auto") -> torch.dtype:
    """Returns the number type to read weights in.

    Args:
        tensors: What is stored.
        wanted: Name of a type of torch; ``auto`` for the one that most weights are stored in, where float64 is read as float32.

    Raises:
        ModelError: None of the tensors is of a floating-point type.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOATS:
            counts[FLOATS[tensor.dtype]] += tensor.numel
    if not counts:
        raise ModelError("none of the weights is of a floating-point type; use a checkpoint that is not quantized")
    return counts.most_common(1)[0][0]
