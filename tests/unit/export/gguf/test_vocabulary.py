"""Tokenizers in GGUF: the splitting rule is found by behaviour, llama.cpp gives the same ids, and the file is read back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gguf_toys import as_loaded, byte_level_tokenizer, spaced_tokenizer, toy
from regraft.errors import InputError, ModelError, OutputError
from regraft.export.gguf.vocabulary import vocabulary_of
from regraft.export.parity import mixed_text
from regraft.models.gguf_tokenizer import NAMES, RULES, WHOLE_PIECES, splitter, tokenizer_of
from regraft.pipelines.export import export
from regraft.settings import ExportSettings

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

FEW = ExportSettings(check_positions=8)
TEXT = "the king and the other thing in the morning: def f(x): return x  # and on it went, is it? " * 3
# llama.cpp's own patterns for these split before combining marks, which the tokenizers do not.
APPROXIMATED = ("tekken", "gpt-4o")


@pytest.fixture(scope="module")
def crossing() -> dict[str, Any]:
    """Returns a stored byte-level BPE tokenizer whose merges cross words, numbers and signs, so that every split shows."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    text, alphabet = mixed_text((), 20_000), sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([text[start : start + 200] for start in range(0, len(text), 200)], trainer)
    return json.loads(core.to_str())


def split_by(stored: dict[str, Any], rule: str) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(json.dumps(stored | {"model": stored["model"] | {"ignore_merges": rule in WHOLE_PIECES}}))
    core.pre_tokenizer = splitter(RULES[rule])
    return as_fast(core)


def as_fast(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=10**6)


def small(tokenizer: PreTrainedTokenizerFast) -> Any:
    return as_loaded(toy("llama", vocab_size=len(tokenizer), num_hidden_layers=1), tokenizer)


def assert_read_back(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    fields = gguf.GGUFReader(file).fields
    back = tokenizer_of(lambda key: fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else None)
    text = mixed_text(["<s>", "</s>"], 5000)
    assert back is not None
    assert back(text).input_ids == tokenizer(text).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in APPROXIMATED])
def test_a_rule_is_found_by_what_it_does_and_llama_cpp_does_the_same(tmp_path: Path, crossing: dict[str, Any], rule: str) -> None:
    tokenizer = split_by(crossing, rule)
    assert vocabulary_of(tokenizer, len(tokenizer)).pre == rule
    done = export(small(tokenizer), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.characters == 10_000
    assert_read_back(tmp_path / "out" / "model.gguf", tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("rule", APPROXIMATED)
def test_what_llama_cpp_only_approximates_is_refused(tmp_path: Path, crossing: dict[str, Any], rule: str) -> None:
    tokenizer = split_by(crossing, rule)
    assert vocabulary_of(tokenizer, len(tokenizer)).pre == rule
    with pytest.raises(OutputError, match=r"the tokenizer in llama\.cpp differs"):
        export(small(tokenizer), tmp_path / "out", "gguf", settings=FEW, check=TEXT)


@pytest.mark.slow
def test_whole_pieces_count_only_where_merges_do_not_make_them(crossing: dict[str, Any]) -> None:
    reachable = crossing | {"model": crossing["model"] | {"ignore_merges": True}}
    core = Tokenizer.from_str(json.dumps(reachable))
    core.pre_tokenizer = splitter(RULES["qwen2"])
    assert vocabulary_of(as_fast(core), 1500).pre == "qwen2"
    beyond = reachable["model"] | {"vocab": reachable["model"]["vocab"] | {"quizzical": 1500}}
    core = Tokenizer.from_str(json.dumps(reachable | {"model": beyond}))
    core.pre_tokenizer = splitter(RULES["qwen2"])
    with pytest.raises(InputError, match="through merges"):
        vocabulary_of(as_fast(core), 1501)


def unigram(normalizer: Any = None, scheme: str = "never", byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    text = mixed_text((), 8000)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    core.train_from_iterator([text[start : start + 200] for start in range(0, len(text), 200)], trainer)
    if byte_fallback:
        stored = json.loads(core.to_str())
        stored["model"]["vocab"] += [[f"<0x{byte:02X}>", -9.0] for byte in range(256)]
        core = Tokenizer.from_str(json.dumps(stored | {"model": stored["model"] | {"byte_fallback": True}}))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return as_fast(core)


def without_prefix() -> PreTrainedTokenizerFast:
    tokenizer = spaced_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind"),
    [(spaced_tokenizer, "llama"), (without_prefix, "llama"), (unigram, "t5")],
    ids=["a space first", "no space", "unigram"],
)
def test_sentencepiece_is_written_and_read_back(tmp_path: Path, make: Any, kind: str) -> None:
    tokenizer = make()
    done = export(small(tokenizer), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.characters == 10_000
    assert gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields["tokenizer.ggml.model"].contents() == kind
    assert_read_back(tmp_path / "out" / "model.gguf", tokenizer)


def test_a_space_that_llama_cpp_puts_elsewhere_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the tokenizer in llama\.cpp differs"):
        export(small(unigram(scheme="first")), tmp_path / "out", "gguf", settings=FEW, check=TEXT)


def with_prefix_space() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def of_words(model: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(model)
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return as_fast(core)


NOTHING = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: of_words(models.WordPiece(NOTHING, unk_token="<unk>")), "of type WordPiece"),
        (lambda: of_words(models.WordLevel(NOTHING, unk_token="<unk>")), "of type WordLevel"),
        (lambda: of_words(models.BPE(NOTHING, [], end_of_word_suffix="</w>")), "neither byte-level"),
        (lambda: unigram(byte_fallback=True), "Unigram with byte tokens"),
        (with_prefix_space, "add_prefix_space"),
    ],
)
def test_what_gguf_has_no_form_for_is_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        vocabulary_of(make(), 600)


def test_a_rule_that_is_not_known_is_not_guessed() -> None:
    keys = {"ggml.model": "gpt2", "ggml.pre": "tomorrow", "ggml.tokens": ["a"]}
    with pytest.raises(ModelError, match="rule 'tomorrow'"):
        tokenizer_of(keys.get)
    assert set(NAMES.values()) == set(RULES)
