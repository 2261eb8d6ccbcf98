"""Tokenizers in GGUF: the rules by which llama.cpp splits text, by name, and a byte-level tokenizer from the keys of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_ANY_CASE = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_MIXED = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Rules that are applied one after the other, by the name that llama.cpp has for them; the first that fits is taken.
RULES: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2 + r"|\s+",),
    "smollm": (r"\p{N}", _GPT2 + r"|\s+"),
    "llama-bpe": (rf"{_ANY_CASE}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",),
    "qwen2": (rf"{_ANY_CASE}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",),
    "qwen35": (rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}",),
    "tekken": (rf"{_MIXED}{_UPPER}*{_LOWER}+|{_MIXED}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",),
    "gpt-4o": (
        rf"{_MIXED}{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?|{_MIXED}{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
    ),
}

# Under these rules a piece that is a token as it stands is not built up by merges.
WHOLE_PIECES = ("llama-bpe", "tekken")


class TokenType(IntEnum):
    """What a token is, as GGUF numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def splitter(patterns: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Returns what splits text by one pattern after the other and then spells it in bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(value: Callable[[str], Any]) -> PreTrainedTokenizerFast | None:
    """Returns the tokenizer of a GGUF file; None where it is not byte-level BPE by a rule that is known here.

    Args:
        value: Returns the value of a key below ``tokenizer.``, or None where the file does not have it.
    """
    rule = value("ggml.pre")
    if value("ggml.model") != "gpt2" or rule not in RULES:
        return None
    tokens, types = list(value("ggml.tokens")), list(value("ggml.token_type") or [])
    merges = [tuple(merge.split(" ", 1)) for merge in value("ggml.merges") or []]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in WHOLE_PIECES))
    core.pre_tokenizer = splitter(RULES[rule])
    core.decoder = decoders.ByteLevel()
    for kinds, add in (
        ((TokenType.CONTROL, TokenType.UNKNOWN), core.add_special_tokens),
        ((TokenType.USER_DEFINED,), core.add_tokens),
    ):
        special = add == core.add_special_tokens
        add([AddedToken(t, special=special, normalized=False) for t, kind in zip(tokens, types, strict=False) if kind in kinds])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    numbers = {name: value(f"ggml.{key}_token_id") for name, key in names.items()}
    special_tokens = {name: tokens[number] for name, number in numbers.items() if number is not None and 0 <= number < len(tokens)}
    before = [special_tokens["bos_token"]] if value("ggml.add_bos_token") and "bos_token" in special_tokens else []
    after = [special_tokens["eos_token"]] if value("ggml.add_eos_token") and "eos_token" in special_tokens else []
    if before or after:
        single = " ".join([*before, "$A", *after])
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(t, vocabulary[t]) for t in {*before, *after}])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=value("chat_template") or None, **special_tokens)
