"""Fewer tokens: a text of kept tokens is encoded as before, every text still is, whatever the tokenizer's kind."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from regraft.data.text import read_corpus
from regraft.models.vocabulary import ids_in, renumbered_ids, smaller_tokenizer, vocabulary_of

SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ("bytes", "fallback", "unigram", "wordpiece", "suffix")


def lines(split: str) -> list[str]:
    return [line for text in read_corpus(None, "train" if split == "train" else "test").documents for line in text.splitlines() if line][
        :400
    ]


@cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one kind, trained on the built-in text."""
    by_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    common = {"vocab_size": 900, "special_tokens": SPECIAL + (by_bytes if kind == "fallback" else []), "show_progress": False}
    if kind == "bytes":
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    elif kind == "fallback":
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        core.normalizer = normalizers.Replace(" ", "▁")
        core.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(**common)
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **common)
    elif kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**common)
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", **common)
    core.train_from_iterator(lines("train"), trainer)
    if kind == "fallback":  # these are no special tokens, but tokens that nothing merges
        data = PreTrainedTokenizerFast(tokenizer_object=core).backend_tokenizer
        contents = json.loads(data.to_str())
        contents["added_tokens"] = [entry for entry in contents["added_tokens"] if entry["content"] in SPECIAL]
        core = Tokenizer.from_str(json.dumps(contents))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def some(kind: str, share: float) -> tuple[list[int], Any]:
    """Some tokens with all that they and every text need, and the tokenizer of these."""
    tokenizer = trained(kind)
    vocabulary = vocabulary_of(tokenizer)
    drawn = random.Random(7).sample(sorted(vocabulary.tokens), int(share * len(vocabulary.tokens)))
    kept = set(vocabulary.special) | {part for token in (*vocabulary.alphabet, *drawn) for part in vocabulary.with_parts(token)}
    return sorted(kept), smaller_tokenizer(tokenizer, vocabulary, sorted(kept))


def words() -> Iterator[str]:
    for line in lines("test"):
        yield line
        yield from line.split()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_are_found_as_before(kind: str) -> None:
    tokenizer = trained(kind)
    kept, smaller = some(kind, 0.4)
    assert len(kept) < 0.95 * len(tokenizer)
    assert len(smaller) == len(kept)
    same = other = 0
    for text in words():
        before = tokenizer.encode(text, add_special_tokens=False)
        after = [kept[new] for new in smaller.encode(text, add_special_tokens=False)]
        if set(before) <= set(kept):
            assert after == before, text
            same += 1
        else:
            assert tokenizer.decode(after) == tokenizer.decode(before), "more tokens say the same"
            other += 1
    assert same > 100
    assert other > 100


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_every_text_is_encoded_and_comes_back(kind: str) -> None:
    tokenizer = trained(kind)
    kept, smaller = some(kind, 0.05)
    for text in ("naïve 日本語 Привет 🙂 \x00\t\r\n end", "zzzqqq", "e\u0301"):
        ids = smaller.encode(text, add_special_tokens=False)
        assert smaller.unk_token_id not in ids
        assert smaller.decode(ids) == tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    assert smaller.convert_ids_to_tokens([kept.index(token) for token in (0, 1, 2)]) == SPECIAL


@pytest.mark.slow
def test_without_the_parts_of_tokens_texts_change() -> None:
    """The negative control: a token whose merges are not all there is not found any more."""
    tokenizer = trained("bytes")
    vocabulary = vocabulary_of(tokenizer)
    kept, _ = some("bytes", 0.4)
    parts = {part for token in kept for part in vocabulary.with_parts(token) - {token}} - vocabulary.alphabet - set(vocabulary.special)
    fewer = sorted(set(kept) - parts)
    smaller = smaller_tokenizer(tokenizer, vocabulary, fewer)
    texts = [text for text in words() if set(tokenizer.encode(text, add_special_tokens=False)) <= set(fewer)]
    assert any(
        [fewer[new] for new in smaller.encode(text, add_special_tokens=False)] != tokenizer.encode(text, add_special_tokens=False)
        for text in texts
    )


def test_what_a_tokenizer_puts_around_a_text_has_its_new_id() -> None:
    tokenizer: Any = trained("bytes")
    kept, smaller = some("bytes", 0.3)
    assert smaller.encode("a")[0] == smaller.bos_token_id == kept.index(tokenizer.bos_token_id)


def test_ids_in_configs_are_renumbered() -> None:
    values = {"eos_token_id": [7, 5], "pad_token_id": None, "bad_words_ids": [[5, 9], [9]], "max_length": 7, "suppress_tokens": [9, 7]}
    assert ids_in(values) == {5, 7}
    assert renumbered_ids(values, {5: 0, 7: 1}) == {"eos_token_id": [1, 0], "bad_words_ids": [[0]], "suppress_tokens": [1]}
