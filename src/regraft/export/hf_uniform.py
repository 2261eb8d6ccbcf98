"""The export format ``hf-uniform``: a stock class of transformers, with uneven layers padded with zeros to equal sizes."""

from __future__ import annotations

from pathlib import Path

from regraft.errors import InputError
from regraft.export.contract import EXPORTERS, Holding, ModelFormat, Parity, Written
from regraft.export.hf import bits_of, described, in_transformers, is_own, refuse_gguf_settings, stream, write_folder
from regraft.export.padding import next_even, padded, refuse_fused, uniform_sizes
from regraft.export.parity import refuse_difference
from regraft.models.build import conform
from regraft.models.load import Loaded
from regraft.models.view import ModelView, parameter_count
from regraft.settings import ExportSettings


def refuse(loaded: Loaded, settings: ExportSettings) -> None:
    """Refuses families whose layers cannot be filled up.

    Raises:
        InputError: The model's layers differ and its projections are kept in one matrix.
    """
    refuse_gguf_settings(settings)
    if is_own(conform(loaded.model)):
        refuse_fused(loaded.model)


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Written:
    """Writes the model as a stock class.

    Raises:
        InputError: No stock class has layers of these sizes.
    """
    model, notes = conform(loaded.model), tuple[str, ...]()
    if is_own(model):
        view = ModelView(model)
        sizes = [view.sizes(index) for index in range(len(view.layers))]
        before = parameter_count(model)
        target = uniform_sizes(sizes)
        wide = next_even(target, view.width)
        model = padded(model, [target] * len(sizes))
        if is_own(model) and wide is not None:  # the stock class asks for heads that divide the width
            model = padded(model, [wide] * len(sizes))
        if is_own(model):
            raise InputError(f"no stock class of family '{view.family.model_type}' has layers of these sizes; export with `to=hf`")
        notes = (
            f"layers were filled up with zeros, {before:,} to {parameter_count(model):,} parameters: the same function, but "
            "neither smaller nor faster than the largest layer everywhere",
        )
    write_folder(model, loaded, folder, settings)
    words, *_ = described(type(model), False, folder)
    return Written(words, folder, notes)


def check(loaded: Loaded, folder: Path, written: Written, text: str, settings: ExportSettings) -> Parity:
    """Compares the folder with the model, in a fresh process that has transformers and not regraft."""
    return refuse_difference(in_transformers(loaded, written.file, text, settings), bits_of(loaded.model.dtype))


FORMAT = ModelFormat(
    "a stock class, for programs that know no other",
    (
        Holding(
            "whatever loads the stock class: transformers, vLLM, SGLang, ONNX, ExecuTorch",
            "Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3; others where all layers are alike",
            "filled up with zeros",
            "float32, bfloat16, float16",
            "for uneven layers, the smaller size and the speed",
            "run",
        ),
    ),
    refuse,
    write,
    check,
    stream=stream,
    streams_uneven=False,
)
EXPORTERS.add("hf-uniform", FORMAT)
