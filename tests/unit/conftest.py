"""Fixtures of the unit tests: tokenizers with one token a character, a tiny model, and texts whose loss must fall."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.data.records import Record
from regraft.data.text import Corpus
from regraft.settings import RecoverSettings

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:#é"
ALPHABET = [chr(code) for code in range(32, 127)] + ["\n"]


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Returns ``make(bos=True, merges=())``: ids 0, 1 and 2 are unk, BOS and EOS, the characters follow in order."""

    def make(bos: bool = True, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
        symbols = ["<unk>", "<s>", "</s>", *CHARACTERS, *("".join(pair) for pair in merges)]
        vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>"))
        tokenizer.decoder = decoders.Fuse()
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")

    return make


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: 0 unknown, 1 BOS, 2 EOS, then the alphabet."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *ALPHABET])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def make_tiny(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """Returns ``make(**config)``: the same random model each time."""

    def make(**config: Any) -> LlamaForCausalLM:
        values = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(11)
            model = LlamaForCausalLM(LlamaConfig(**values | config))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.copy_(0.2 * torch.randn(parameter.shape))
        return model.eval()

    return make


@pytest.fixture
def repeating() -> tuple[Corpus, Corpus]:
    """Text that repeats, to train on and held out: its loss must fall."""
    documents = tuple("abcdefgh" * 12 for _ in range(12))
    return Corpus("repeating", "train", documents), Corpus("repeating", "held-out", documents[:3])


@pytest.fixture
def records() -> tuple[Corpus, Corpus]:
    """Instructions with answers that follow from them."""
    made = tuple(Record(f"Say {letter}.", "now" if letter in "aeiou" else "", letter * 3) for letter in "abcdefghijklmnop")
    return Corpus("records", "train", records=made), Corpus("records", "held-out", records=made[:5])


@pytest.fixture
def quick() -> Callable[..., RecoverSettings]:
    """Returns ``quick(**settings)``: settings of a run of a second."""

    def make(**settings: Any) -> RecoverSettings:
        values = {"rank": 4, "lr": 1e-2, "steps": 20, "batch": 4, "seq_len": 24, "eval_every": 5, "held_out_windows": 4}
        return RecoverSettings(**values | settings)

    return make
