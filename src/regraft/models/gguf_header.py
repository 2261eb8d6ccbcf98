"""GGUF files, read by their headers: what is stored where, and whether the file is whole.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: ``GGUF``, a version, the numbers of tensors and of
keys; the keys with typed values; the table of tensors with shapes, types and offsets; padding; the bytes. Every count and length is
compared with the bytes that are there before anything of that size is made.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import ModelError

AGAIN = "copy or download it again"
# By number: name, values in a block, bytes of a block.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}
FLOATS = ("F32", "F16", "BF16")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LEAST_KEY, _LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # bytes of the shortest entry
_MOST_DIMENSIONS, _MOST_ALIGNMENT, _LONGEST_NAME = 4, 1 << 20, 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """Entry of one tensor in the table of a file.

    Attributes:
        kind: Name of the stored type, such as ``Q4_K``.
        shape: Sizes, in torch's order.
        start: First byte, from the start of the file.
        size: Number of bytes.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and table of tensors of a GGUF file.

    Attributes:
        metadata: Scalars, texts, and for lists their length.
        tensors: Entries of the tensors, by name.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Name of the architecture."""
        return str(self.metadata.get("general.architecture", ""))

    def kinds(self) -> dict[str, int]:
        """Returns how many tensors are stored in each type."""
        return dict(sorted(Counter(tensor.kind for tensor in self.tensors.values()).items()))


class _Bytes:
    """A place in a file that never goes beyond its end."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content, self.path, self.place = content, path, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.place

    def refuse(self, what: str) -> ModelError:
        return ModelError(f"'{self.path}' is truncated or damaged: {what} at byte {self.place} of {len(self.content)}; {AGAIN}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.refuse(f"{what} takes {count} bytes, {self.left} are left")
        self.place += count
        return self.content[self.place - count : self.place]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        length = self.number("<Q", what)
        if longest is not None and length > longest:
            raise self.refuse(f"{what} claims a length of {length} bytes")
        return self.take(length, what).decode("utf-8", "replace")

    def count(self, number: int, least: int, what: str) -> int:
        """Returns a count of entries once that many could be there."""
        if number * least > self.left:
            raise self.refuse(f"{what} claims {number} entries, of which {self.left} bytes hold at most {self.left // least}")
        return number


def read_gguf_header(path: Path) -> GgufHeader:
    """Returns what a GGUF file holds, after checking that the file is whole.

    Raises:
        ModelError: It is no GGUF, truncated, damaged, or holds a type that is not read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            if start[:4] != b"GGUF":
                raise ModelError(f"'{path}' is not a GGUF file; give a model folder or a .gguf file")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _header(_Bytes(content, path))
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}; check its permissions") from error


def _header(data: _Bytes) -> GgufHeader:
    data.take(4, "the magic word")
    version = data.number("<I", "the version")
    if version not in (2, 3):
        raise ModelError(f"'{data.path}' is GGUF of version {version}; versions 2 and 3 are read, little-endian: convert it again")
    tensors, keys = data.number("<Q", "the header"), data.number("<Q", "the header")
    data.count(tensors, _LEAST_TENSOR, "the list of tensors")
    data.count(keys, _LEAST_KEY, "the list of keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = data.text("a key", _LONGEST_NAME)
        if key in metadata:
            raise data.refuse(f"the key '{key[:80]}' is there twice")
        metadata[key] = _value(data, data.number("<I", "the type of a value"), key[:80])
    table = [_entry(data) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
        raise data.refuse(f"an alignment of {alignment}")
    first = -(-data.place // alignment) * alignment
    return GgufHeader(metadata, _placed(data, table, first, alignment))


def _value(data: _Bytes, kind: int, key: str) -> Any:
    """Returns one value; of a list, its length."""
    if kind in _SCALARS:
        return data.number(_SCALARS[kind], f"'{key}'")
    if kind == _STRING:
        return data.text(f"'{key}'")
    if kind != _ARRAY:
        raise data.refuse(f"'{key}' is of the unknown type {kind}")
    inner, length = data.number("<I", f"'{key}'"), data.number("<Q", f"'{key}'")
    if inner in _SCALARS:
        size = struct.calcsize(_SCALARS[inner])
        data.take(data.count(length, size, f"'{key}'") * size, f"'{key}'")
    elif inner == _STRING:
        for _ in range(data.count(length, 8, f"'{key}'")):
            data.take(data.number("<Q", f"'{key}'"), f"a text in '{key}'")
    else:
        raise data.refuse(f"'{key}' is a list of the unknown type {inner}")
    return length


def _entry(data: _Bytes) -> tuple[str, tuple[int, ...], int, int]:
    """Returns name, shape, number of the type, and offset of a tensor."""
    name = data.text("the name of a tensor", _LONGEST_NAME)
    dimensions = data.number("<I", f"'{name[:80]}'")
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise data.refuse(f"'{name[:80]}' has {dimensions} dimensions")
    shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", data.take(8 * dimensions, f"the shape of '{name[:80]}'"))))
    return name, shape, data.number("<I", f"'{name[:80]}'"), data.number("<Q", f"'{name[:80]}'")


def _placed(data: _Bytes, table: list[tuple[str, tuple[int, ...], int, int]], first: int, alignment: int) -> dict[str, GgufTensor]:
    """Returns the tensors once each has its own bytes within the file."""
    found: dict[str, GgufTensor] = {}
    for name, shape, number, offset in table:
        if number not in TYPES:
            known = ", ".join(kind for kind, _, _ in TYPES.values())
            raise ModelError(f"'{data.path}' holds '{name[:80]}' in type {number}, which is not read ({known}); use another quantization")
        kind, block, block_bytes = TYPES[number]
        count = 1
        for size in shape:  # Python's integers do not overflow
            count *= size
        size = count // block * block_bytes
        end = first + offset + size
        if not count or shape[-1] % block or name in found or offset % alignment or end > len(data.content):
            raise data.refuse(f"the tensor '{name[:80]}' of shape {list(shape)} in {kind} does not lie within the file, ends at byte {end}")
        found[name] = GgufTensor(kind, shape, first + offset, size)
    _check_gapless(data, found, first, alignment)
    return found


def _check_gapless(data: _Bytes, tensors: Mapping[str, GgufTensor], first: int, alignment: int) -> None:
    """Refuses tensors that overlap, and bytes that belong to none, as a tensor of a changed type or shape leaves them.

    ggml asks for the same: each tensor begins where the one before it ends, up to the alignment.

    Raises:
        ModelError: The message names the tensor.
    """
    ends, padded, last = first, first, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < ends:
            raise data.refuse(f"the tensor '{name[:80]}' lies over {last}")
        if tensor.start > padded:
            raise _hole(data, tensor.start - ends, f"between {last} and '{name[:80]}'")
        ends, last = tensor.start + tensor.size, f"'{name[:80]}' (shape {list(tensor.shape)}, {tensor.kind})"
        padded = -(-ends // alignment) * alignment
    if len(data.content) > padded:
        raise _hole(data, len(data.content) - ends, f"after {last}")


def _hole(data: _Bytes, count: int, where: str) -> ModelError:
    return ModelError(f"'{data.path}' is damaged: {count} bytes {where} belong to no tensor, so that a type or a shape is wrong; {AGAIN}")
