"""Write a GGUF file tensor by tensor, so that memory holds one tensor at a time, or blocks of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.export.gguf.importance import Importance
from regraft.export.gguf.numbers import QUANTIZATION_VERSION, Scheme, Stored, bytes_of, encode, require_gguf, type_of
from regraft.export.gguf.source import Layout
from regraft.export.gguf.vocabulary import Vocabulary
from regraft.streaming.writer import HashedFile


def write_file(
    path: Path,
    layout: Layout,
    vocabulary: Vocabulary,
    scheme: Scheme,
    about: Mapping[str, Any],
    importance: Importance | None = None,
) -> tuple[tuple[str, ...], str]:
    """Writes a file.

    Args:
        path: The file to write.
        layout: Metadata and tensors of the file.
        vocabulary: The model's vocabulary.
        scheme: Number formats of the matrices.
        about: Keys below ``general.``.
        importance: Mean square of each input channel, by name of the module.

    Returns:
        What a user should know of how it was stored, and the file's SHA-256.
    """
    kinds = [type_of(entry, scheme, int(layout.metadata["block_count"])) for entry in layout.entries]
    writer = require_gguf().GGUFWriter(path, layout.architecture)
    try:
        for key, value in ({f"general.{key}": value for key, value in about.items()}).items():
            _add(writer, key, value)
        _add(writer, "general.file_type", int(scheme.file_type))
        if scheme.is_quantized:
            _add(writer, "general.quantization_version", QUANTIZATION_VERSION)
        for key, value in layout.metadata.items():
            _add(writer, f"{layout.architecture}.{key}", value)
        for key, value in vocabulary.metadata().items():
            _add(writer, key, value)
        for entry, kind in zip(layout.entries, kinds, strict=True):
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), bytes_of(entry.shape, kind), raw_dtype=kind.number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    head = path.read_bytes()
    with HashedFile(path) as file:
        file.write(head)
        for entry, kind in zip(layout.entries, kinds, strict=True):
            file.pad(writer.data_alignment)
            weights = (importance or {}).get(entry.reads) if entry.reads else None
            for piece in entry.pieces() if entry.pieces else (entry.make(),):
                file.write(encode(piece, kind, weights).reshape(-1).view(np.uint8).data)
        file.pad(writer.data_alignment)
    return _remarks(layout, kinds, scheme), file.sha256


def _remarks(layout: Layout, kinds: Sequence[Stored], scheme: Scheme) -> tuple[str, ...]:
    """Returns what a user should know of how matrices were stored."""
    coarse = [
        entry.name
        for entry, kind in zip(layout.entries, kinds, strict=True)
        if kind not in (scheme.usual, scheme.better) and not entry.exact
    ]
    if coarse:
        block = scheme.usual.block
        remark = (
            f"{len(coarse)} matrices, such as '{coarse[0]}', have rows that do not divide into blocks of {block}, and are stored finer "
            f"than {scheme.name}; prune with `align={block}` to avoid it where it comes from pruning"
        )
        return (remark,)
    return ()


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds a key with the GGUF type of its value; non-negative whole numbers are unsigned, as readers expect."""
    adders: tuple[tuple[type, Callable[[str, Any], None]], ...] = (
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (bytes, writer.add_array),
        (list, writer.add_array),
    )
    next(add for kind, add in adders if isinstance(value, kind))(key, value)
