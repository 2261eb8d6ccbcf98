"""Vocabulary of a tokenizer: what it needs to encode every text, and a tokenizer of some of its tokens.

A token of byte-pair encoding is made by merges, one after another, out of single characters (Sennrich et al., arXiv 1508.07909,
algorithm 1). The merges inside a token never depend on its neighbours in the text. So if a token stays with all tokens on its way, and the
order of merges stays, then every text whose tokens stay is encoded as before: at each step the merge that was the first of all is still
there, and still the first. Unigram and WordPiece choose the best or longest pieces; a choice that is still there is still the best.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from regraft.errors import InputError, ModelError
from regraft.models.tokenizer import load_tokenizer
from regraft.reading import list_in

# What a saved tokenizer is made of besides the two files with ids; everything else, such as vocab.json, repeats what is in these.
_KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer, read from its ``tokenizer.json``.

    Attributes:
        data: The contents of ``tokenizer.json``.
        ids: Token to id, added tokens included.
    """

    data: Mapping[str, Any]
    ids: Mapping[str, int] = field(repr=False)

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id to token."""
        return {number: token for token, number in self.ids.items()}

    @property
    def special(self) -> dict[int, str]:
        """Id to token of the added tokens, which are matched in a text before it is split."""
        return {entry["id"]: entry["content"] for entry in self.data["added_tokens"]}

    @cached_property
    def alphabet(self) -> frozenset[int]:
        """Ids without which some text could not be encoded: bytes, or single characters where there are no bytes to fall back to."""
        model = self.data["model"]
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        by_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
        falls_back = bool(model.get("byte_fallback")) and by_bytes <= self._own.keys() and not _by_byte_level(self.data["pre_tokenizer"])
        unknown = model.get("unk_token")
        found = {self._own[token] for token in by_bytes if token in self._own}
        found |= {self._own[unknown]} if unknown in self._own else set()
        found |= {model["unk_id"]} if model.get("unk_id") is not None else set()
        if not falls_back and model["type"] != "WordLevel":
            bare = {token: token.removeprefix(prefix).removesuffix(suffix) for token in self._own}
            found |= {self._own[token] for token, characters in bare.items() if len(characters) == 1}
        return frozenset(found)

    def with_parts(self, token: int) -> frozenset[int]:
        """Returns a token with all tokens on the way of its merges; the token alone if no merges make it."""
        if self.data["model"]["type"] != "BPE" or token in self.special or token not in self.tokens:
            return frozenset((token,))
        pairs = self._merges(self.tokens[token])
        return frozenset(self._own[part] for pair in pairs for part in pair if part in self._own) | {token}

    def halves(self, token: int) -> tuple[int, int] | None:
        """Returns the two tokens that the last merge makes a token of, which spell it where it is gone; None if no merges make it."""
        if self.data["model"]["type"] != "BPE" or token in self.special or token not in self.tokens:
            return None
        pairs = self._merges(self.tokens[token])
        first, second = (self._own.get(part) for part in pairs[-1]) if pairs else (None, None)
        return None if first is None or second is None else (first, second)

    @cached_property
    def _own(self) -> dict[str, int]:
        """Token to id of the model's own tokens."""
        return _own_tokens(self.data["model"])

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(_pairs(self.data["model"]))}

    def _merges(self, token: str) -> list[tuple[str, str]]:
        """Returns the merges that make a token out of its characters, in their order; none if they never make it."""
        model = self.data["model"]
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        symbols = _characters(token, prefix, suffix)
        made: list[tuple[str, str]] = []
        while len(symbols) > 1:
            ranked = [
                (self._ranks[pair], place)
                for place in range(len(symbols) - 1)
                if (pair := (symbols[place], symbols[place + 1])) in self._ranks
            ]
            if not ranked:
                return []
            _, place = min(ranked)
            first, second = symbols[place : place + 2]
            symbols[place : place + 2] = [first + second.removeprefix(prefix)]
            made.append((first, second))
        return made if symbols == [token] else []


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.

    Raises:
        InputError: It has no ``tokenizer.json``, or is of a kind that is not known here.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"the vocabulary of {type(tokenizer).__name__} is not kept in a tokenizer.json; convert the tokenizer first")
    data: dict[str, Any] = json.loads(backend.to_str())
    kind = data["model"].get("type")
    if kind not in _MODELS:
        raise InputError(f"tokenizers of type '{kind}' are not cut; {', '.join(_MODELS)} are")
    return Vocabulary(data, _own_tokens(data["model"]) | {entry["content"]: entry["id"] for entry in data["added_tokens"]})


def smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """Returns a tokenizer of some of the tokens, with new ids in the order of the old ones.

    Args:
        tokenizer: The tokenizer; it is not changed.
        vocabulary: Its vocabulary.
        kept: Old ids, ascending, with all of :attr:`Vocabulary.alphabet` and :attr:`Vocabulary.special`, and each with its parts. Ids
            without a token count as rows of the embedding that nothing is encoded to.

    Raises:
        ModelError: The smaller tokenizer cannot be loaded.
    """
    place = {old: new for new, old in enumerate(kept)}
    with tempfile.TemporaryDirectory(prefix="regraft-tokenizer-") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            if file.name not in _KEPT_FILES and file.suffix != ".jinja":
                file.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(_renumbered(vocabulary.data, place), ensure_ascii=False), encoding="utf-8")
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        decoder = config.get("added_tokens_decoder")
        if decoder:
            config["added_tokens_decoder"] = {str(place[int(old)]): entry for old, entry in decoder.items() if int(old) in place}
        config_file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        found = load_tokenizer(folder, len(kept), trust_remote_code=False)
    if found is None:
        raise ModelError(f"the tokenizer {type(tokenizer).__name__} cannot be loaded again after its vocabulary was cut")
    return found


def renumbered_ids(values: Mapping[str, Any], place: Mapping[int, int]) -> dict[str, Any]:
    """Returns the entries of a config that hold token ids, with new ids; tokens that are gone are left out of lists.

    Args:
        values: A config, or a generation config, as a dictionary.
        place: Old id to new id.
    """

    def new(value: Any) -> Any:
        match value:
            case list() | tuple():
                return [found for entry in value if (found := new(entry)) is not None and found != []]
            case bool():
                return value
            case int():
                return place.get(value)
            case _:
                return value

    return {key: new(value) for key, value in values.items() if holds_ids(key) and value is not None}


def ids_in(values: Mapping[str, Any]) -> set[int]:
    """Returns the token ids that a config names one by one, such as the end of a text."""

    def each(value: Any) -> Iterable[int]:
        match value:
            case list() | tuple():
                for entry in value:
                    yield from each(entry)
            case int() if not isinstance(value, bool):
                yield value
            case _:
                pass

    return {number for key, value in values.items() if key.endswith(("_token_id", "_token_ids")) for number in each(value) if number >= 0}


def holds_ids(key: str) -> bool:
    """Returns whether an entry of a config holds token ids."""
    return key.endswith(("_token_id", "_token_ids")) or key in (
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "force_words_ids",
    )


def _by_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Returns whether texts are split into bytes before anything is merged."""
    if not pre_tokenizer:
        return False
    return pre_tokenizer.get("type") == "ByteLevel" or any(_by_byte_level(part) for part in pre_tokenizer.get("pretokenizers") or ())


def _own_tokens(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, Mapping) else {piece: number for number, (piece, _) in enumerate(vocab)}


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the merges, the first first."""
    entries: list[Any] = [entry.split(" ", 1) if isinstance(entry, str) else entry for entry in model["merges"]]
    return [(first, second) for first, second in entries]


def _characters(token: str, prefix: str, suffix: str) -> list[str]:
    """Returns the symbols that a word begins as: its characters, with what marks the first or the last."""
    continues = bool(prefix) and token.startswith(prefix)
    ends = bool(suffix) and token.endswith(suffix)
    found = list(token.removeprefix(prefix).removesuffix(suffix))
    found = [character if place == 0 and not continues else prefix + character for place, character in enumerate(found)]
    return [*found[:-1], found[-1] + suffix] if ends and found else found


def _renumbered(data: Mapping[str, Any], place: Mapping[int, int]) -> dict[str, Any]:
    """Returns the contents of a ``tokenizer.json`` for the tokens that stay, with their new ids."""
    model = dict(data["model"])
    own = _own_tokens(model)
    stays = {token for token, old in own.items() if old in place}
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {token: place[own[token]] for token in sorted(stays, key=lambda token: own[token])}
    else:
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in stays]
    if model.get("unk_id") is not None:
        model["unk_id"] = place[model["unk_id"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [list(pair) for pair in _pairs(model) if {*pair, pair[0] + pair[1].removeprefix(prefix)} <= stays]
    added = [{**entry, "id": place[entry["id"]]} for entry in data["added_tokens"] if entry["id"] in place]
    padding = data.get("padding")
    return {
        **data,
        "model": model,
        "added_tokens": added,
        "post_processor": _with_new_ids(data.get("post_processor"), place),
        "padding": {**padding, "pad_id": place[padding["pad_id"]]} if padding else padding,
    }


def _with_new_ids(processor: Any, place: Mapping[int, int]) -> Any:
    """Returns a post-processor, which puts special tokens around a text, with new ids."""
    match processor:
        case dict():
            found = {key: _with_new_ids(value, place) for key, value in processor.items()}
            if ids := list_in(processor.get("ids")):
                found["ids"] = [place[old] for old in ids]
            for key in ("sep", "cls"):
                if entry := list_in(processor.get(key)):
                    found[key] = [entry[0], place[entry[1]]]
            return found
        case list():
            return [_with_new_ids(part, place) for part in processor]
        case _:
            return processor
