"""A tokenizer of known behaviour: one token a character, BOS in front."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:#é"


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
