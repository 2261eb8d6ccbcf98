"""A tiny tokenizer, a record of provenance, and ways to spoil a saved folder."""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from regraft.data.text import SEPARATOR, Split, read_corpus
from regraft.models.provenance import versions
from regraft.plans import Provenance
from slicing import Kept

UNEVEN = [Kept((1,), range(0, 64, 3)), Kept((0, 1, 2), range(64)), Kept((0, 2), range(7, 50))]


def tiny_tokenizer(vocabulary: int = 97) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with ids 0 to ``vocabulary - 1``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocabulary - 3]
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + index for index, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_pair_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with merges, of 620 tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=_byte_pairs(), unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>")


@cache
def _byte_pairs() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(read_corpus(None, "train").documents[:40], trainer)
    return core


def provenance() -> Provenance:
    return Provenance("regraft test", "tiny", "0" * 16, 0, versions())


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of a safetensors file and leaves the bytes behind it alone."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@cache
def text_file(split: Split = "validation") -> Path:
    """Returns a file with the text that comes with seedling, for models that have none: made once a process, removed at its end."""
    path = Path(tempfile.mkdtemp(prefix="regraft-tests-")) / f"{split}.txt"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    path.write_text(SEPARATOR.join(read_corpus(None, split).documents), encoding="utf-8")
    return path
