"""Export of a checkpoint tensor by tensor: memory holds two tensors, whatever the model's size, and the files are the same to the byte."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from regraft.atomic import atomic_folder
from regraft.export import ModelFormat
from regraft.models.load import Loaded, device_named, free_bytes
from regraft.models.weights import DTYPES, FLOATS, stored_tensors
from regraft.pipelines.export_model import ModelExport, finish, refuse_factors
from regraft.settings import ExportSettings, LoadSettings
from regraft.streaming.memory import in_words
from regraft.streaming.once import OnePass
from regraft.streaming.skeleton import open_skeleton

SPARE = 1.2  # buffers, activations of the comparison, and the other program


def memory_of_check(folder: Path, load: LoadSettings) -> int:
    """Returns how many bytes the comparison of a model with its export takes: the model, and a float32 copy where it is not in float32."""
    wanted = None if load.dtype == "auto" else getattr(torch, load.dtype)
    total = 0
    for tensor in stored_tensors(folder).values():
        size = (wanted or FLOATS.get(tensor.dtype, DTYPES[tensor.dtype])).itemsize
        total += prod(tensor.shape) * (size + (4 if size < 4 else 0))
    return int(total * SPARE)


def free_memory(load: LoadSettings) -> int:
    """Returns the bytes that are free where the model would be."""
    return free_bytes(device_named(load.device))


def why_not_compared(folder: Path, load: LoadSettings) -> str:
    """Returns why a model cannot be compared with its export on this machine; an empty text where it can."""
    needed, free = memory_of_check(folder, load), free_memory(load)
    if needed <= free:
        return ""
    return (
        f"the export was not compared with the model, which takes {in_words(needed)} of memory, {in_words(free)} are free: it was written "
        "tensor by tensor; `check` compares it all the same"
    )


def export_streamed(
    folder: Path, output: Path, to: str, form: ModelFormat, settings: ExportSettings, load: LoadSettings, *, source: str, command: str
) -> ModelExport:
    """Writes a checkpoint in a format that takes its tensors one at a time.

    Args:
        folder: The checkpoint.
        output: A folder to write.
        to: Name of the format, for the record.
        form: The format.
        settings: How it is written.
        load: How it would be loaded; the dtype is that of the written weights.
        source: How the user named the checkpoint, for the record.
        command: How this was called, for the record.

    Raises:
        InputError: The format cannot hold the model.
        ModelError: The checkpoint is damaged, or holds NaN; nothing is left of the output.
        OutputError: The output exists or cannot be written.
    """
    assert form.stream is not None
    skeleton = open_skeleton(folder, load, fingerprint=False)
    opened = skeleton.loaded
    skeleton.loaded = Loaded(opened.model, opened.tokenizer, source, "", opened.provenance)
    if not form.takes_factors:
        refuse_factors(skeleton.loaded, to)
    form.refuse(skeleton.loaded, settings)
    with atomic_folder(output) as partial:
        with OnePass(skeleton) as once:
            written = form.stream(skeleton, once, partial, settings)
            skeleton.loaded.fingerprint = once.fingerprint()
        finish(skeleton.loaded, partial, to, settings, written, None, command)
    return ModelExport(written.words, written.notes)
