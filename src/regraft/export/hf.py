"""The export format ``hf``: a folder that transformers loads, with our code in it where no stock class holds the layers."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import InputError, OutputError
from regraft.export.contract import EXPORTERS, Holding, ModelFormat, Parity, Written
from regraft.export.parity import compare, our_log_probabilities, refuse_difference, sampled
from regraft.models.build import conform
from regraft.models.load import Loaded
from regraft.models.quiet import quiet
from regraft.models.save import mend_generation_config
from regraft.models.weights import stored_tensors
from regraft.settings import ExportSettings
from regraft.streaming.once import OnePass
from regraft.streaming.output import shards_of, write_all_but_weights
from regraft.streaming.skeleton import Skeleton
from regraft.streaming.writer import ShardWriter

PATIENCE_SECONDS = 1800.0


def write_folder(model: PreTrainedModel, loaded: Loaded, folder: Path, settings: ExportSettings) -> None:
    """Writes weights, config, code and tokenizer of a model, and reads back what was written.

    Raises:
        OutputError: What was written cannot be read.
    """
    with quiet():
        mend_generation_config(model)
        model.save_pretrained(folder, max_shard_size=shard_bytes(settings))
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
    if not stored_tensors(folder):
        raise OutputError(f"'{folder}' was not written as it is in memory; export again to another disk")


def is_own(model: PreTrainedModel) -> bool:
    """Returns whether a model is of our class rather than a stock one."""
    return str(model.config.model_type).startswith("regraft_")


def refuse(loaded: Loaded, settings: ExportSettings) -> None:
    """Refuses settings that this format does not have."""
    refuse_gguf_settings(settings)
    shard_bytes(settings)


def refuse_gguf_settings(settings: ExportSettings) -> None:
    """Refuses settings that belong to GGUF.

    Raises:
        InputError: One is given.
    """
    if settings.quantize or settings.architecture or settings.importance:
        raise InputError("`quantize`, `importance` and `architecture` belong to GGUF; use `to=gguf`, or `dtype` for float types")


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Written:
    """Writes the model as it is."""
    model = conform(loaded.model)
    write_folder(model, loaded, folder, settings)
    return Written(*described(type(model), is_own(model), folder))


def stream(skeleton: Skeleton, once: OnePass, folder: Path, settings: ExportSettings) -> Written:
    """Writes the checkpoint's tensors, one at a time, into files of at most the size of a shard."""
    parts = [(None, {name: shape}) for name, shape in skeleton.shapes.items()]
    shards = shards_of(parts, skeleton.dtype, shard_bytes(settings))
    files: dict[str, str] = {}
    for shard in shards:
        with ShardWriter(folder, shard) as writer:
            for name in shard.shapes:
                writer.write(name, once.pieces(name))
        files[shard.name] = writer.sha256
    config = skeleton.loaded.model.config
    found = write_all_but_weights(skeleton, folder, config, shards)
    own = str(config.model_type).startswith("regraft_")
    return Written(*described(found, own, folder), files=files)


def shard_bytes(settings: ExportSettings) -> int:
    """Returns the largest size of a weight file, in bytes.

    Raises:
        InputError: It is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", settings.shard_size.strip().upper())
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")) if found else 0
    if size < 1:
        raise InputError(f"`shard_size` '{settings.shard_size}' is not a size; give one such as 500MB or 5GB")
    return size


def described(kind: type[PreTrainedModel], own: bool, folder: Path) -> tuple[str, Path, tuple[str, ...]]:
    """Returns a description of a folder, the folder, and how it is loaded where that is not as usual."""
    words = f"a Hugging Face folder of {kind.__name__}, {'code in the folder' if own else 'a stock class'}"
    return words, folder, ("load it after `import regraft`, or with trust_remote_code=True",) if own else ()


def check(loaded: Loaded, folder: Path, written: Written, text: str, settings: ExportSettings) -> Parity:
    """Compares the folder with the model, in a fresh process that has transformers and not regraft."""
    return refuse_difference(in_transformers(loaded, written.file, text, settings), bits_of(loaded.model.dtype))


def bits_of(dtype: torch.dtype) -> float:
    """Returns the bits of a number type."""
    return float(torch.finfo(dtype).bits)


def in_transformers(loaded: Loaded, folder: Path, text: str, settings: ExportSettings) -> Parity:
    """Returns how a folder in transformers, without regraft, compares with a model."""
    if loaded.tokenizer is not None:
        text_ids = list(loaded.tokenizer(text, verbose=False).input_ids)
    else:
        generator = torch.Generator().manual_seed(0)
        embedding: Any = loaded.model.get_input_embeddings()
        rows = int(embedding.weight.shape[0])
        text_ids = torch.randint(0, rows, (512,), generator=generator).tolist()  # pyright: ignore[reportArgumentType]
    ids, lengths = sampled(loaded.model, text_ids, settings.check_positions)
    theirs = _theirs(folder, ids)[[length - 1 for length in lengths]].double().log_softmax(-1)
    ours = our_log_probabilities(loaded.model, ids, lengths)
    return compare(ours, theirs, [ids[length] for length in lengths], "transformers without regraft")


def _theirs(folder: Path, ids: Sequence[int]) -> Tensor:
    """Returns logits, (tokens, vocabulary), float32, from a process of its own.

    Raises:
        OutputError: transformers does not load the folder.
    """
    with tempfile.TemporaryDirectory() as place:
        wanted = {"folder": str(folder), "ids": list(ids), "output": str(Path(place) / "logits.safetensors")}
        command = [sys.executable, "-P", str(Path(__file__).with_name("stock_logits.py")), json.dumps(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
            raise OutputError(f"transformers does not load what was written: {last}; nothing was kept: export with `to=gguf`")
        return copy.deepcopy(load_file(wanted["output"])["logits"])


FORMAT = ModelFormat(
    "the master copy: safetensors and config, with code where layers differ",
    (
        Holding("transformers, stock classes", "all of docs/families.md", "", "float32, bfloat16, float16", "nothing", "run", "stock"),
        Holding(
            "transformers with the folder's code; vLLM with `vllm serve FOLDER --model-impl transformers`",
            "all of docs/families.md",
            "query heads, key-value heads, feed-forward width; attention or feed-forward network removed",
            "float32, bfloat16, float16",
            "nothing; trust_remote_code, or import regraft. vLLM: not run here, and it takes no layer without attention",
            "run",
            "own code",
        ),
    ),
    refuse,
    write,
    check,
    takes_factors=True,
    stream=stream,
)
EXPORTERS.add("hf", FORMAT)
