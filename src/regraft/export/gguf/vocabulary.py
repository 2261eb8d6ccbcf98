"""A tokenizer as GGUF holds it: byte-level BPE with merges and the name of its splitting rule, or SentencePiece with scores.

llama.cpp knows splitting rules by name and has no others. Which name a tokenizer has is found by behaviour: the rule that splits a
probe of mixed text as the tokenizer itself does.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from regraft.errors import InputError
from regraft.export.parity import mixed_text
from regraft.models.gguf_tokenizer import RULES, WHOLE_PIECES, TokenType, splitter
from regraft.models.tokenizer import PROBE

NO_HOME = "GGUF holds byte-level BPE and SentencePiece tokenizers; export with `to=hf`"
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "\u2581"
CONTRACTIONS = "'tis 'Sir I'Dare you'llama we'reach x'S y'M\n \n\n"  # where rules with and without them differ
PROBE_CHARACTERS = 3000
UNREACHABLE = -1e6  # score of a piece that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer as a file describes it.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for BPE and ``t5`` for Unigram of SentencePiece.
        pre: Name of the splitting rule.
        tokens: The tokens by id, one for each row of the embedding.
        types: Type of each token, as GGUF numbers them.
        merges: Merges of byte-level BPE, in order.
        scores: Scores of SentencePiece.
        ids: Special ids by the name of their key.
        flags: Whether a beginning, an end, and a leading space are added; for Unigram, whether runs of spaces become one.
        charsmap: The table by which SentencePiece's Unigram normalises characters; empty for none.
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
    charsmap: bytes = b""
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
        if self.charsmap:
            found["tokenizer.ggml.precompiled_charsmap"] = self.charsmap
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
    if kind not in ("BPE", "Unigram"):
        raise InputError(f"the tokenizer is of type {kind}; {NO_HOME}")
    form = _unigram if kind == "Unigram" else _byte_level if _is_byte_level(stored) else _spaced
    found = form(core, stored, rows)
    return dataclasses.replace(
        found,
        flags={**found.flags, **_added(tokenizer)},
        ids=_special_ids(tokenizer, ends),
        template=_template(tokenizer),
        normal_form=_normal_form(stored["normalizer"]),
    )


def _byte_level(core: Tokenizer, stored: dict[str, Any], rows: int) -> Vocabulary:
    """Returns byte-level BPE."""
    affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if stored["model"].get(name)]
    if affixes:
        raise InputError(f"the tokenizer marks pieces by {affixes[0]}, which GGUF does not know; export with `to=hf`")
    if core.encode("the", add_special_tokens=False).tokens[0].startswith("\u0120"):
        raise InputError(
            "the tokenizer puts a space before every text (add_prefix_space), as llama.cpp's byte-level BPE does not; export with `to=hf`"
        )
    tokens, types = _tokens(core, stored, rows)
    merges = tuple(" ".join(merge) for merge in _merges(stored))
    return Vocabulary("gpt2", _rule(core, stored), tokens, types, merges=merges, flags={"add_space_prefix": False})


def _spaced(core: Tokenizer, stored: dict[str, Any], rows: int) -> Vocabulary:
    """Returns BPE of SentencePiece."""
    if not stored["model"].get("byte_fallback") or SPACE not in "".join(core.encode(" a b", add_special_tokens=False).tokens):
        raise InputError(f"the tokenizer is BPE, but neither byte-level nor with byte tokens and '{SPACE}' for spaces; {NO_HOME}")
    tokens, types = _tokens(core, stored, rows)
    scores = _scores(tokens, _merges(stored))
    return Vocabulary("llama", "default", tokens, types, scores=scores, flags={"add_space_prefix": _starts_with_space(core)})


def _unigram(core: Tokenizer, stored: dict[str, Any], rows: int) -> Vocabulary:
    """Returns Unigram of SentencePiece, as llama.cpp has it from T5."""
    if stored["model"].get("byte_fallback"):
        raise InputError("the tokenizer is Unigram with byte tokens, which llama.cpp's Unigram never uses; export with `to=hf`")
    if SPACE not in "".join(core.encode(" a b", add_special_tokens=False).tokens):
        raise InputError(f"the tokenizer is Unigram without '{SPACE}' for spaces; {NO_HOME}")
    tokens, types = _tokens(core, stored, rows)
    known = {piece: float(score) for piece, score in stored["model"]["vocab"]}
    maps = [step["precompiled_charsmap"] for step in _steps(stored["normalizer"], "normalizers") if step["type"] == "Precompiled"]
    joined = core.encode("a   b", add_special_tokens=False).ids == core.encode("a b", add_special_tokens=False).ids
    return Vocabulary(
        "t5",
        "default",
        tokens,
        types,
        scores=tuple(known.get(token, 0.0) for token in tokens),
        flags={"add_space_prefix": _starts_with_space(core), "remove_extra_whitespaces": joined},
        charsmap=base64.b64decode(maps[0]) if maps and maps[0] else b"",
    )


def _merges(stored: dict[str, Any]) -> list[tuple[str, ...]]:
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in stored["model"]["merges"]]


def _starts_with_space(core: Tokenizer) -> bool:
    return core.encode("the", add_special_tokens=False).tokens[0].startswith(SPACE)


def _tokens(core: Tokenizer, stored: dict[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    known = {number: token for token, number in core.get_vocab(with_added_tokens=True).items()}
    added = {entry["id"]: entry for entry in stored["added_tokens"]}
    unknown = stored["model"].get("unk_token")
    if stored["model"].get("unk_id") is not None:
        unknown = stored["model"]["vocab"][stored["model"]["unk_id"]][0]
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


def _rule(core: Tokenizer, stored: dict[str, Any]) -> str:
    """Returns the name of the rule by which a byte-level tokenizer splits text.

    Raises:
        InputError: llama.cpp has none that does the same on the probe.
    """
    assert core.pre_tokenizer is not None
    probe = PROBE + CONTRACTIONS + mixed_text((), PROBE_CHARACTERS)
    text = core.normalizer.normalize_str(probe) if core.normalizer is not None else probe
    wanted = core.pre_tokenizer.pre_tokenize_str(text)
    alike = [name for name, patterns in RULES.items() if splitter(patterns).pre_tokenize_str(text) == wanted]
    if not alike:
        known = ", ".join(RULES)
        raise InputError(f"the tokenizer splits text by a rule that llama.cpp has no name for (known: {known}); export with `to=hf`")
    whole = bool(stored["model"].get("ignore_merges"))
    fitting = [name for name in alike if (name in WHOLE_PIECES) == whole]
    if not fitting and not _merges_make_all(core, stored):
        raise InputError(
            f"llama.cpp's splitting rule '{alike[0]}' takes pieces {'through merges' if whole else 'that are tokens whole'}, the "
            f"tokenizer does not; export with `to=hf`"
        )
    return (fitting or alike)[0]


def _merges_make_all(core: Tokenizer, stored: dict[str, Any]) -> bool:
    """Returns whether the merges make every token of the vocabulary from its own text, so that taking it whole changes nothing."""
    model = BPE(vocab=stored["model"]["vocab"], merges=[(first, second) for first, second in _merges(stored)])
    added = {entry["content"] for entry in stored["added_tokens"]}
    return all([piece.value for piece in model.tokenize(token)] == [token] for token in stored["model"]["vocab"] if token not in added)
