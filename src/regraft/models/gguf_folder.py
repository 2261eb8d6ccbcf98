"""A GGUF file as a model folder: weights dequantised by transformers' own reader, tokenizer and chat template taken from the file.

The folder lies in a cache, one for each content of a file, so that everything that reads model folders reads GGUF files, too.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from regraft.atomic import atomic_folder
from regraft.claims import claimed
from regraft.compat import dequantized
from regraft.errors import MissingDependencyError, ModelError
from regraft.models.family import families, family_of
from regraft.models.folder import write_folder
from regraft.models.gguf_config import complete_config
from regraft.models.gguf_header import FLOATS, GgufHeader, read_gguf_header
from regraft.models.gguf_tokenizer import tokenizer_of
from regraft.models.provenance import FILE, versions
from regraft.models.quiet import in_one_line, quiet
from regraft.plans import Provenance

CACHE = "REGRAFT_CACHE"
SUFFIX = ".gguf"
# Architectures whose name is not that of the family; all others are looked for as they are.
NAMES = {"gemma3": "gemma3_text"}
WITHOUT_TABLE = ("lfm2",)  # families that are read, and inferred
_UNPACKING_SECONDS = 600.0  # how long a second process waits for the first
_LAYER = re.compile(r"blk\.([0-9]{1,9})\.")


def is_gguf(path: Path) -> bool:
    """Returns whether a path is that of a GGUF file, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def unpacked(path: Path) -> Path:
    """Returns the folder of a GGUF file, which is made when it is first asked for.

    Weights become float32, but for files of one 16-bit type, which keep it. ``regraft.json`` in the folder says from which types they were
    dequantised.

    Raises:
        ModelError: The file is damaged, or of an architecture that is not known.
        MissingDependencyError: gguf-py is not installed.
    """
    header = read_gguf_header(path)
    _check(path, header)
    status = path.stat()
    key = hashlib.sha256(f"2 {path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "regraft") / "gguf" / f"{path.stem}-{key}"
    if not (folder / FILE).is_file():
        with claimed(folder, wait_seconds=_UNPACKING_SECONDS):
            if not (folder / FILE).is_file():  # another process may have unpacked it meanwhile
                _unpack(path, header, folder)
    return folder


def _check(path: Path, header: GgufHeader) -> None:
    """Refuses what the reader would make a wrong model of, or a model that does not fit the file.

    Raises:
        ModelError: The architecture is not known, or the sizes that the keys claim are not those of the tensors.
    """
    if not _is_read(header.architecture):
        known = [name for name in sorted(GGUF_SUPPORTED_ARCHITECTURES) if NAMES.get(name, name) in (*families(), *WITHOUT_TABLE)]
        raise ModelError(
            f"'{path}' is of the GGUF architecture '{header.architecture}', which is not read (read are: {', '.join(known)}); "
            "give the Hugging Face folder that it was made from"
        )
    embedding = header.tensors.get("token_embd.weight")
    layers = max((int(match[1]) for name in header.tensors if (match := _LAYER.match(name))), default=-1) + 1
    said = {key: header.metadata.get(f"{header.architecture}.{key}") for key in ("block_count", "embedding_length")}
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"'{path}' has no token_embd.weight; give a GGUF file of a language model")
    if said["block_count"] != layers or said["embedding_length"] != embedding.shape[1]:
        raise ModelError(
            f"'{path}' says {said['block_count']} layers of width {said['embedding_length']}, its tensors are of {layers} layers of width "
            f"{embedding.shape[1]}; copy or download it again"
        )
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if tokens != embedding.shape[0]:
        raise ModelError(f"'{path}' has {tokens} tokens for {embedding.shape[0]} rows of the embedding; copy or download it again")


def _is_read(architecture: str) -> bool:
    """Returns whether transformers' reader and we know an architecture."""
    try:
        return architecture in GGUF_SUPPORTED_ARCHITECTURES and bool(family_of(NAMES.get(architecture, architecture)))
    except ModelError:
        return False


def _unpack(path: Path, header: GgufHeader, folder: Path) -> None:
    try:
        gguf = import_module("gguf")  # transformers' reader needs it, too
    except ImportError:
        raise MissingDependencyError("gguf", "gguf") from None
    matrices = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(next(iter(matrices)), torch.float32) if len(matrices) == 1 else torch.float32
    auto, tokenizers = (AutoModelForCausalLM, AutoTokenizer)
    arguments: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        # The reader shows progress, whatever the settings of transformers are.
        with quiet(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            config: Any = AutoConfig.from_pretrained(str(path.parent), **arguments)
            complete_config(config, header, path)
            loaded: Any = auto.from_pretrained(
                str(path.parent),
                config=config,
                dtype=dtype,
                output_loading_info=True,
                **arguments,
                **dequantized(),
            )
            model, report = loaded
            tokenizer = _tokenizer(path, gguf) or tokenizers.from_pretrained(str(path.parent), **arguments)
    except ModelError as error:
        raise ModelError(f"'{path}': {error}") from None
    except Exception as error:  # the reader trusts its input: whatever it stumbles on
        raise ModelError(
            f"'{path}' cannot be read as '{header.architecture}': {in_one_line(error)}; give the Hugging Face folder it was made from"
        ) from error
    for names in (report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"]):
        if names:
            raise ModelError(f"'{path}' does not hold what its keys ask for: '{min(names, key=str)}'; copy or download it again")
    _refuse_left_over(path, header, model)
    kinds = header.kinds()
    with atomic_folder(folder) as partial:
        with quiet():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        provenance = Provenance(
            command=f"read {path.name}",
            source=str(path),
            source_fingerprint="",
            seed=0,
            versions=versions(),
            settings={"dequantised from": {kind: count for kind, count in kinds.items() if kind not in FLOATS}, "stored as": kinds},
        )
        write_folder(partial, provenance, None)


def _refuse_left_over(path: Path, header: GgufHeader, model: PreTrainedModel) -> None:
    """Refuses a file with more weights than the model that was made of it.

    Raises:
        ModelError: The reader left some out.
    """
    there = sum(math.prod(tensor.shape) for name, tensor in header.tensors.items() if not name.startswith("rope_"))
    taken = sum(parameter.numel() for parameter in model.parameters())
    if there > taken:
        raise ModelError(
            f"'{path}' holds {there:,} weights, of which a {header.architecture} of its sizes has {taken:,}; "
            "give the Hugging Face folder that it was made from"
        )


def _tokenizer(path: Path, gguf: Any) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer as the file has it; None where only transformers' reader can guess it.

    transformers adds tokens that a file does not have, knows few rules for splitting text, and puts spaces where llama.cpp does not.
    """
    fields = gguf.GGUFReader(path).fields

    def value(key: str) -> Any:
        field = fields.get(f"tokenizer.{key}")
        return None if field is None else field.contents()

    return tokenizer_of(value)
