"""The export format ``gguf``: chooses an architecture that holds the layers, writes the file, and compares it in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import torch

from regraft.errors import InputError
from regraft.export.contract import Holding, ModelFormat, Parity, Written
from regraft.export.gguf.catalogue import ARCHITECTURES, choose
from regraft.export.gguf.importance import Importance, channel_energy
from regraft.export.gguf.numbers import FLOATS, K_TYPES, SCHEMES, Scheme, require_gguf, scheme_named
from regraft.export.gguf.source import Source, source_of
from regraft.export.gguf.vocabulary import Vocabulary, vocabulary_of
from regraft.export.gguf.write import write_file
from regraft.export.llama_cpp import Runtime
from regraft.export.parity import compare, mixed_text, our_log_probabilities, refuse_difference, refuse_other_ids, sampled
from regraft.models.load import Loaded
from regraft.settings import ExportSettings
from regraft.streaming.once import OnePass
from regraft.streaming.skeleton import Skeleton

FILE = "model.gguf"
RUNTIME = "llama.cpp"
UNWEIGHED = "K quantization weighed the errors of all channels alike; `importance` takes a text that says which matter more"


def scheme_of(dtype: torch.dtype, settings: ExportSettings) -> Scheme:
    """Returns how matrices are stored: as asked for, or as they are in the model."""
    if settings.quantize:
        return scheme_named(settings.quantize)
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return SCHEMES[names[dtype]]


def refuse(loaded: Loaded, settings: ExportSettings) -> None:
    """Refuses what no file can hold.

    Raises:
        InputError: No architecture takes the layers, GGUF has no form for the tokenizer, the quantization is not known, or a setting
            would change nothing.
        MissingDependencyError: gguf-py is not installed.
    """
    scheme = scheme_of(loaded.model.dtype, settings)
    if settings.importance is not None and scheme.usual not in K_TYPES:
        raise InputError(
            f"`importance` weighs the errors of K quantization, and {scheme.name} has none; add `quantize=Q4_K_M`, or leave it out"
        )
    if "shard_size" in settings.model_dump(exclude_defaults=True):
        raise InputError("`shard_size` belongs to the Hugging Face formats, and GGUF is one file; leave it out")
    require_gguf()
    source = source_of(loaded.model)
    choose(source, settings.architecture)
    _vocabulary(loaded, source.vocabulary)


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Written:
    """Writes ``model.gguf``."""
    scheme = scheme_of(loaded.model.dtype, settings)
    weighs = scheme.usual in K_TYPES and settings.importance is not None
    importance = channel_energy(loaded, settings.importance) if weighs and settings.importance is not None else None
    return _write(loaded, source_of(loaded.model), scheme, folder, settings, importance)


def stream(skeleton: Skeleton, once: OnePass, folder: Path, settings: ExportSettings) -> Written:
    """Writes ``model.gguf`` from a checkpoint."""
    source = source_of(skeleton.loaded.model, once)
    return _write(skeleton.loaded, source, scheme_of(skeleton.dtype, settings), folder, settings, None)


def _write(
    loaded: Loaded, source: Source, scheme: Scheme, folder: Path, settings: ExportSettings, importance: Importance | None
) -> Written:
    layout = choose(source, settings.architecture).lay_out(source)
    about = {"type": "model", "name": Path(loaded.source).name, "quantized_by": "regraft"}
    if not scheme.is_quantized:
        about.pop("quantized_by")
    notes, sha256 = write_file(folder / FILE, layout, _vocabulary(loaded, source.vocabulary), scheme, about, importance)
    size = (folder / FILE).stat().st_size
    return Written(
        f"GGUF of architecture '{layout.architecture}' in {scheme.name}, {size / 1e6:.1f} MB",
        folder / FILE,
        (*layout.notes, *notes, *((UNWEIGHED,) if scheme.usual in K_TYPES and importance is None else ())),
        {"architecture": layout.architecture, "context": layout.context, "weighed": importance is not None},
        files={FILE: sha256},
    )


def check(loaded: Loaded, folder: Path, written: Written, text: str, settings: ExportSettings) -> Parity:
    """Compares the file in llama.cpp with the model.

    Raises:
        MissingDependencyError: llama.cpp is not installed.
        OutputError: Token ids or distributions differ.
    """
    tokenizer, scheme = loaded.tokenizer, scheme_of(loaded.model.dtype, settings)
    assert tokenizer is not None
    vocabulary = _vocabulary(loaded, 0)
    text_ids = tokenizer(text, verbose=False).input_ids
    ids, lengths = sampled(loaded.model, text_ids, settings.check_positions, written.facts["context"])
    ours = our_log_probabilities(loaded.model, ids, lengths)
    with Runtime(written.file, context=len(ids) + 8, exact=True) as runtime:
        mixed = mixed_text([token for token in tokenizer.all_special_tokens if token], form=vocabulary.normal_form)
        refuse_other_ids(tokenizer(mixed, verbose=False).input_ids, runtime.token_ids(mixed), tokenizer, RUNTIME)
        theirs = torch.stack([runtime.log_probabilities(ids[:length], ours.shape[-1]) for length in lengths])
    parity = compare(ours, theirs, [ids[length] for length in lengths], RUNTIME, len(mixed))
    return refuse_difference(parity, _bits(scheme))


def _bits(scheme: Scheme) -> float:
    if scheme.usual in FLOATS:
        return 32.0 if scheme.is_exact else 16.0
    return float(scheme.name[1])


def _vocabulary(loaded: Loaded, rows: int) -> Vocabulary:
    ends = loaded.model.generation_config.eos_token_id if loaded.model.generation_config is not None else None
    return vocabulary_of(loaded.tokenizer, rows, tuple(ends) if isinstance(ends, list) else (ends,) if ends is not None else ())


def _holdings() -> tuple[Holding, ...]:
    numbers = ", ".join(SCHEMES)
    return tuple(
        Holding(
            f"llama.cpp, architecture `{entry.name}`" + (" (by name only)" if entry.asked_for else ""),
            ", ".join(entry.families),
            entry.uneven,
            numbers,
            entry.lost,
            "run",
            entry.name,
        )
        for entry in ARCHITECTURES
    )


FORMAT = ModelFormat("one GGUF file for llama.cpp, LM Studio and others", _holdings(), refuse, write, check, stream=stream)
