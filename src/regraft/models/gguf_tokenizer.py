"""Tokenizers in GGUF: the rules by which llama.cpp splits text, by name, and a tokenizer from the keys of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from regraft.errors import ModelError

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s+(?!\S)|\s+"
_TAIL = rf"\s*[\r\n]+|{_SPACES}"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_MIXED = r"[^\r\n\p{L}\p{N}]?"
_ANY_CASE = rf"(?i:{_CONTRACTIONS})|{_MIXED}\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_THREES = rf"{_ANY_CASE}|\p{{N}}{{1,3}}|{_SIGNS}|{_TAIL}"
# Rules that are applied one after the other, by the name that llama.cpp has for them.
RULES: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2 + r"|\s+",),
    "smollm": (r"\p{N}", _GPT2 + r"|\s+"),
    "llama-bpe": (_THREES,),
    "dbrx": (_THREES,),
    "qwen2": (rf"{_ANY_CASE}|\p{{N}}|{_SIGNS}|{_TAIL}",),
    "qwen35": (rf"(?i:{_CONTRACTIONS})|{_MIXED}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}",),
    "tekken": (rf"{_MIXED}{_UPPER}*{_LOWER}+|{_MIXED}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",),
    "gpt-4o": (
        rf"{_MIXED}{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?|{_MIXED}{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + rf"|{_TAIL}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2 + r"|\s+", r"[0-9][0-9][0-9]"),
    "bloom": (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",),
    "seed-coder": (rf"{_ANY_CASE}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",),
    "ufakzeka": (rf"{_MIXED}\p{{L}}+|\p{{N}}|{_SIGNS}|{_TAIL}",),
}
# Further names of these rules; files may use any of them.
_ALSO = {
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "dbrx": "smaug-bpe glm4 chatglm-bpe",
    "qwen2": "deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2 bailingmoe bailingmoe2 llada-moe",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "bloom": "poro-chat gpt3-finnish",
}
NAMES: Mapping[str, str] = {name: rule for rule, names in _ALSO.items() for name in names.split()} | {rule: rule for rule in RULES}

# Under these rules a piece that is a token as it stands is not built up by merges.
WHOLE_PIECES = ("llama-bpe", "tekken")


class TokenType(IntEnum):
    """Kind of a token, numbered as in GGUF."""

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


Value = Callable[[str], Any]
"""Returns the value of a key below ``tokenizer.``, or None where the file does not have it."""

SPACE = "\u2581"


def tokenizer_of(value: Value) -> PreTrainedTokenizerFast | None:
    """Returns the tokenizer of a GGUF file as llama.cpp would run it; None where the file does not say what llama.cpp would do.

    Args:
        value: The keys of the file.

    Raises:
        ModelError: The file names a rule for splitting text that is not known here, or its lists do not fit each other.
    """
    kind, rule = value("ggml.model"), value("ggml.pre")
    tokens, scores = list(value("ggml.tokens") or []), list(value("ggml.scores") or [])
    if kind == "gpt2" and rule not in (None, "default"):
        if rule not in NAMES:
            raise ModelError(
                f"the tokenizer splits text by the rule '{rule}', which is not known here ({', '.join(sorted(NAMES))}); "
                "give the Hugging Face folder that the file was made from"
            )
        return _finished(_byte_level(value, tokens, NAMES[rule]), value, tokens)
    if kind in ("llama", "t5") and len(scores) == len(tokens) > 0:
        core = _sentencepiece(value, tokens, scores) if kind == "llama" else _unigram(value, tokens, scores)
        return _finished(core, value, tokens)
    return None


def _byte_level(value: Value, tokens: list[str], rule: str) -> Tokenizer:
    if not value("ggml.merges"):
        raise ModelError("the tokenizer has no merges, without which every text is spelled in bytes; convert the file again")
    merges = [tuple(merge.split(" ", 1)) for merge in value("ggml.merges") or []]
    core = Tokenizer(models.BPE(vocab=_numbered(tokens), merges=merges, ignore_merges=rule in WHOLE_PIECES))
    core.pre_tokenizer = splitter(RULES[rule])
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(value: Value, tokens: list[str], scores: list[float]) -> Tokenizer:
    """Returns BPE of SentencePiece: of all pairs that make a token, the one of the best score is joined first."""
    numbers = _numbered(tokens)
    plain = {token for token, kind in zip(tokens, _types(value, tokens), strict=True) if kind == TokenType.NORMAL}
    merges = [
        (-score, number, numbers[token[:cut]], (token[:cut], token[cut:]))
        for number, (token, score) in enumerate(zip(tokens, scores, strict=True))
        if token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    unknown = _token(value, "unknown", tokens)
    core = Tokenizer(
        models.BPE(vocab=numbers, merges=[merge for *_, merge in sorted(merges)], unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    spaced = value("ggml.add_space_prefix") is not False  # by default there is a space before every text
    core.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE)] if spaced else []), normalizers.Replace(" ", SPACE)])
    bytes_first = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*bytes_first, *([decoders.Strip(" ", 1, 0)] if spaced else [])])
    return core


def _unigram(value: Value, tokens: list[str], scores: list[float]) -> Tokenizer:
    unknown = value("ggml.unknown_token_id")
    core = Tokenizer(models.Unigram(list(zip(tokens, scores, strict=True)), unknown, byte_fallback=False))
    charsmap = value("ggml.precompiled_charsmap")
    steps: list[Any] = [normalizers.Precompiled(bytes(charsmap))] if charsmap is not None else []
    if value("ggml.remove_extra_whitespaces"):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    core.normalizer = normalizers.Sequence(steps)
    scheme = "never" if value("ggml.add_space_prefix") is False else "always"
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return core


def _finished(core: Tokenizer, value: Value, tokens: list[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with its special tokens, what it puts around a text, and its chat template."""
    types = _types(value, tokens)
    for kinds, add in (
        ((TokenType.CONTROL, TokenType.UNKNOWN), core.add_special_tokens),
        ((TokenType.USER_DEFINED,), core.add_tokens),
    ):
        special = add == core.add_special_tokens
        add([AddedToken(token, special=special, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind in kinds])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: _token(value, key, tokens) for name, key in names.items()}
    special_tokens = {name: token for name, token in found.items() if token is not None}
    starts = value("ggml.add_bos_token")
    starts = value("ggml.model") == "llama" if starts is None else starts
    before = [special_tokens["bos_token"]] if starts and "bos_token" in special_tokens else []
    after = [special_tokens["eos_token"]] if value("ggml.add_eos_token") and "eos_token" in special_tokens else []
    if before or after:
        numbers = _numbered(tokens)
        single = " ".join([*before, "$A", *after])
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(t, numbers[t]) for t in {*before, *after}])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=value("chat_template") or None, **special_tokens)


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _types(value: Value, tokens: list[str]) -> list[int]:
    """Returns the types of the tokens; all are normal where the file has none."""
    types: list[int] = [int(kind) for kind in value("ggml.token_type") or [TokenType.NORMAL] * len(tokens)]
    if len(types) != len(tokens):
        raise ModelError(f"the file has {len(types)} token types for {len(tokens)} tokens; copy or download it again")
    return types


def _token(value: Value, key: str, tokens: list[str]) -> str | None:
    number = value(f"ggml.{key}_token_id")
    return tokens[number] if number is not None and 0 <= number < len(tokens) else None
