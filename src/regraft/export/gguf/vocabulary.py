"""A tokenizer as GGUF holds it: byte-level BPE with merges and the name of its splitting rule, or SentencePiece with scores.

llama.cpp knows splitting rules by name and has no others. Which name a tokenizer has is found by behaviour: the rule that splits a
probe of mixed text as the tokenizer itself does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from regraft.errors import InputError
from regraft.models.gguf_tokenizer import RULES, TokenType, splitter
from regraft.models.tokenizer import PROBE

NO_HOME = "GGUF holds byte-level BPE and SentencePiece tokenizers; export with `to=hf`"
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "\u2581"
UNREACHABLE = -1e6  # score of a piece that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer as a file describes it.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece.
        pre: Name of the splitting rule.
        tokens: The tokens by id, one for each row of the embedding.
        types: Type of each token, as GGUF numbers them.
        merges: Merges of byte-level BPE, in order.
        scores: Scores of SentencePiece.
        ids: Special ids by the name of their key.
        flags: Whether a beginning, an end, and a leading space are added.
        template: Chat template in Jinja; empty for none.
        normal_form: Unicode normal form, such as ``NFC``, that the tokenizer applies first and the runtime does not; empty for none.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict[str, int])
    flags: Mapping[str, bool] = field(default_factory=dict[str, bool])
    template: str = ""
    normal_form: str = ""

    def metadata(self) -> dict[str, Any]:
        """Returns the keys of the file, in full."""
        found: dict[str, Any] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": list(self.types),
        }
        if self.merges:
            found["tokenizer.ggml.merges"] = list(self.merges)
        if self.scores:
            found["tokenizer.ggml.scores"] = list(self.scores)
        found |= {f"tokenizer.ggml.{name}_token_id": value for name, value in self.ids.items()}
        found |= {f"tokenizer.ggml.{name}": value for name, value in self.flags.items()}
        return found | ({"tokenizer.chat_template": self.template} if self.template else {})


def vocabulary_of(tokenizer: PreTrainedTokenizerBase | None, rows: int, ends: tuple[int, ...] = ()) -> Vocabulary:
    """Returns a tokenizer as GGUF holds it.

    Args:
        tokenizer: The model's tokenizer.
        rows: Rows of the embedding; those beyond the tokenizer's last id become unused tokens.
        ends: Ids at which generation stops, the tokenizer's own first.

    Raises:
        InputError: There is no tokenizer, or GGUF has no form for it.
    """
    if tokenizer is None:
        raise InputError("the model has no tokenizer, which a GGUF file holds; copy tokenizer.json and tokenizer_config.json to it")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{type(tokenizer).__name__} has no tokenizer.json; {NO_HOME}")
    core: Tokenizer = tokenizer.backend_tokenizer
    stored = json.loads(core.to_str())
    kind = stored["model"]["type"]
    if kind != "BPE":
        raise InputError(f"the tokenizer is of type {kind}; {NO_HOME}")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in stored["model"]["merges"]]
    tokens, types = _tokens(core, stored, rows)
    common = {
        "ids": _special_ids(tokenizer, ends),
        "template": _template(tokenizer),
        "normal_form": _normal_form(stored["normalizer"]),
    }
    flags = _added(tokenizer)
    if _is_byte_level(stored):
        pre, text = _rule(core), tuple(" ".join(merge) for merge in merges)
        flags |= {"add_space_prefix": False}
        return Vocabulary("gpt2", pre, tokens, types, merges=text, flags=flags, **common)
    if not stored["model"].get("byte_fallback") or SPACE not in "".join(core.encode(" a b", add_special_tokens=False).tokens):
        raise InputError(f"the tokenizer is BPE, but neither byte-level nor with byte tokens and '{SPACE}' for spaces; {NO_HOME}")
    flags |= {"add_space_prefix": core.encode("the", add_special_tokens=False).tokens[0].startswith(SPACE)}
    return Vocabulary("llama", "default", tokens, types, scores=_scores(tokens, merges), flags=flags, **common)


def _tokens(core: Tokenizer, stored: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    known = {number: token for token, number in core.get_vocab(with_added_tokens=True).items()}
    added = {entry["id"]: entry for entry in stored["added_tokens"]}
    unknown = stored["model"].get("unk_token")
    tokens, types = list[str](), list[int]()
    for number in range(max(rows, max(known, default=-1) + 1)):
        token = known.get(number)
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif token == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        else:
            kind = TokenType.BYTE if BYTE.fullmatch(token) and stored["model"].get("byte_fallback") else TokenType.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tuple(tokens), tuple(types)


def _scores(tokens: tuple[str, ...], merges: list[tuple[str, ...]]) -> tuple[float, ...]:
    """Returns scores under which SentencePiece, which joins the pair of the best score, follows the merges."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault("".join(merge), place)
    return tuple(-float(rank[token]) if token in rank else (0.0 if len(token) == 1 else UNREACHABLE) for token in tokens)


def _special_ids(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> dict[str, int]:
    found: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    further = [number for number in ends if number != tokenizer.eos_token_id]
    if tokenizer.eos_token_id is None and further:
        found["eos"] = further.pop(0)
    if further:
        found["eot"] = further[0]
    return {name: int(number) for name, number in found.items() if number is not None}


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Returns whether the tokenizer puts its special tokens around a text."""
    ids = list(tokenizer("a").input_ids)
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    return {
        "add_bos_token": len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id,
    }


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default", "")
    return str(template or "")


def _steps(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or of a way to split text."""
    if part is None:
        return []
    return [step for inner in part[inside] for step in _steps(inner, inside)] if part["type"] == "Sequence" else [part]


def _normal_form(normalizer: dict[str, Any] | None) -> str:
    forms = [step["type"] for step in _steps(normalizer, "normalizers") if step["type"] in ("NFC", "NFKC", "NFD", "NFKD")]
    return forms[-1] if forms else ""


def _is_byte_level(stored: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(stored["pre_tokenizer"], "pretokenizers"))


def _rule(core: Tokenizer) -> str:
    """Returns the name of the rule by which a byte-level tokenizer splits text.

    Raises:
        InputError: llama.cpp has none that does the same on the probe.
    """
    assert core.pre_tokenizer is not None
    text = core.normalizer.normalize_str(PROBE) if core.normalizer is not None else PROBE
    wanted = core.pre_tokenizer.pre_tokenize_str(text)
    for name, patterns in RULES.items():
        if splitter(patterns).pre_tokenize_str(text) == wanted:
            return name
    raise InputError(f"the tokenizer splits text by a rule that llama.cpp has no name for (known: {', '.join(RULES)}); export with `to=hf`")
