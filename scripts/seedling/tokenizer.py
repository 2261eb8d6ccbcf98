"""The tokenizer of seedling: byte-level BPE, so that any text can be written and read back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, EOS, PAD]


def train_tokenizer(texts: Iterable[str], vocabulary_tokens: int) -> Tokenizer:
    """Trains byte-level BPE on the texts.

    Args:
        texts: The training split alone.
        vocabulary_tokens: Size with the three special tokens and the 256 bytes.

    Returns:
        A tokenizer that puts BOS before a text when special tokens are asked for, and decodes to the very text that was encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, window_tokens: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json as Hugging Face's fast tokenizer reads them."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=window_tokens,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(str(folder))
    # transformers 5 writes the name of a class that only it knows; this one is known to all versions and to other tools.
    file = folder / "tokenizer_config.json"
    stored = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    stored.pop("backend", None)
    file.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> list[NDArray[np.uint16]]:
    """Encodes each text as BOS, its tokens, EOS.

    Returns:
        One array a document, (n_tokens,) uint16.
    """
    eos = tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch(list(texts))
    return [np.asarray([*encoding.ids, eos], dtype=np.uint16) for encoding in encodings]
