"""Tokenizers of known behaviour: one token a character."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:#é"


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Returns ``make(bos=True)``: ids 0, 1 and 2 are unk, BOS and EOS, then one for each of 69 characters."""

    def make(bos: bool = True) -> PreTrainedTokenizerFast:
        vocabulary = {symbol: index for index, symbol in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
        tokenizer.decoder = decoders.Fuse()
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")

    return make
