"""GGUF files are read as models, and hostile or damaged ones refused in one line by arithmetic on the bytes that are there."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_toys import as_loaded, byte_level_tokenizer, spaced_tokenizer, toy
from regraft.cli.app import run
from regraft.errors import ModelError
from regraft.export.gguf.catalogue import choose
from regraft.export.gguf.numbers import SCHEMES
from regraft.export.gguf.source import source_of
from regraft.export.gguf.vocabulary import vocabulary_of
from regraft.export.gguf.write import write_file
from regraft.models.gguf_folder import CACHE
from regraft.models.gguf_header import TYPES, read_gguf_header
from regraft.models.load import load
from regraft.pipelines.export import export
from regraft.settings import ExportSettings

gguf = pytest.importorskip("gguf")

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


def written(folder: Path, quantize: str = "F32", family: str = "llama", spaced: bool = False) -> Path:
    tokenizer = spaced_tokenizer() if spaced else byte_level_tokenizer(TEMPLATE)
    export(as_loaded(toy(family), tokenizer), folder, "gguf", settings=ExportSettings(quantize=quantize), check=None)
    return folder / "model.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_is_read_as_the_model_it_was_made_from(tmp_path: Path, family: str) -> None:
    model = toy(family)
    loaded = load(written(tmp_path / "out", family=family))
    ids = torch.arange(30)[None] + 5
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer is not None
    text = "the thing in the morning,  and 12 more\n\tthings <s>"
    assert loaded.tokenizer(text).input_ids == byte_level_tokenizer()(text).input_ids
    assert loaded.tokenizer.chat_template == TEMPLATE


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + index / 8 for index in range(8)],
    "long_factor": [2.0 + index / 4 for index in range(8)],
    "original_max_position_embeddings": 64,
}
SMALL_GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_inner": 96}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}}),
    "llama 3 of its own": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3, "low_freq_factor": 2.0}},
    ),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "yarn of its own": ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0, "attention_factor": 1.2}}),
    "linear": ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
    "gemma 2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 10, "final_logit_softcapping": None}),
    "gemma 3": ("gemma3_text", {"sliding_window": 24, "query_pre_attn_scalar": 10, "num_hidden_layers": 7}),
    "phi 3": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}),
    "gpt 2": ("gpt2", SMALL_GPT2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_scales_caps_and_rotations_of_a_file_are_read(tmp_path: Path, name: str) -> None:
    family, config = WHOLE[name]
    model = toy(family, **config)
    export(as_loaded(model), tmp_path / "out", "gguf", check=None)
    loaded = load(tmp_path / "out" / "model.gguf")
    ids = torch.arange(100)[None] + 5
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    again = export(loaded, tmp_path / "again", "gguf", check=None)
    assert again.words == export(as_loaded(model), tmp_path / "other", "gguf", check=None).words


def test_an_architecture_that_is_only_written_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    export(as_loaded(toy("smollm3")), tmp_path / "out", "gguf", check=None)
    with pytest.raises(ModelError, match=r"'smollm3', which is not read \(read are: .*lfm2, llama, .*qwen3.*\); give"):
        load(tmp_path / "out" / "model.gguf")


def test_a_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    file = written_with(tmp_path, {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0})
    with pytest.raises(ModelError, match="'longrope' is not read"):
        load(file)


def written_with(folder: Path, keys: dict[str, Any]) -> Path:
    """Returns a file of a Llama with further keys."""
    loaded = as_loaded(toy("llama"))
    layout = choose(source_of(loaded.model)).lay_out(source_of(loaded.model))
    layout = dataclasses.replace(layout, metadata=layout.metadata | keys)
    write_file(folder / "model.gguf", layout, vocabulary_of(loaded.tokenizer, 320), SCHEMES["F32"], {"type": "model"})
    return folder / "model.gguf"


@pytest.mark.slow
def test_the_record_says_from_what_was_dequantised(tmp_path: Path) -> None:
    loaded = load(written(tmp_path / "out", "Q8_0"))
    assert loaded.provenance is not None
    assert loaded.provenance.settings["dequantised from"]["Q8_0"] > 0
    assert loaded.model.dtype == torch.float32
    assert loaded.source.endswith("model.gguf")


@pytest.mark.slow
def test_a_file_is_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "out")
    assert run(["prune", str(file), "--criterion", "l2", "--reconstruct", "none", "--output", str(tmp_path / "pruned")]) == 0, (
        capsys.readouterr().err
    )
    assert load(tmp_path / "pruned").provenance.parents[0]["settings"]["stored as"]  # type: ignore[union-attr]


def at(place: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda raw: struct.pack_into(form, raw, place, value)


def before(marker: bytes, form: str, value: int, back: int) -> Callable[[bytearray], None]:
    """Writes a number so many bytes after the start of a marker (before it where negative)."""
    return lambda raw: struct.pack_into(form, raw, raw.index(marker) + back, value)


HOSTILE: dict[str, Callable[[bytearray], None]] = {
    "2**63 tensors": at(8, "<Q", 2**63),
    "2**63 keys": at(16, "<Q", 2**63),
    "one key too many": at(16, "<Q", 10_000),
    "a key of 2**63 bytes": at(24, "<Q", 2**63),
    "version 1": at(4, "<I", 1),
    "big-endian": at(4, "<I", 3 << 24),
    "a name of 2**62 bytes": before(b"token_embd.weight", "<Q", 2**62, -8),
    "2**32 - 1 dimensions": before(b"token_embd.weight", "<I", 2**32 - 1, 17),
    "no dimension": before(b"token_embd.weight", "<I", 0, 17),
    "2**63 rows": before(b"token_embd.weight", "<Q", 2**63, 29),
    "a shape that overflows 64 bits": before(b"token_embd.weight", "<Q", 2**58, 21),
    "an unknown type": before(b"token_embd.weight", "<I", 999, 37),
    "an offset beyond the end": before(b"token_embd.weight", "<Q", 2**40, 41),
    "over another tensor": before(b"blk.0.attn_norm.weight", "<Q", 0, 22 + 4 + 8 + 4),
    "2**60 tokens": before(b"tokenizer.ggml.tokens", "<Q", 2**60, 21 + 4 + 4),
    "a list of lists": before(b"tokenizer.ggml.tokens", "<I", 9, 21 + 4),
    "a value of no type": before(b"tokenizer.ggml.tokens", "<I", 77, 21),
    "a million layers": before(b"llama.block_count", "<I", 10**6, 17 + 4),
    "a width of 2**32 - 1": before(b"llama.embedding_length", "<I", 2**32 - 1, 22 + 4),
    "a feed-forward width of 2**31": before(b"llama.feed_forward_length", "<I", 2**31, 25 + 4),
    "no epsilon": before(b"llama.attention.layer_norm_rms_epsilon", "<B", ord("x"), 0),
    "an infinite epsilon": before(b"llama.attention.layer_norm_rms_epsilon", "<I", 0x7F800000, 38 + 4),
    "an infinite base": before(b"llama.rope.freq_base", "<I", 0x7F800000, 20 + 4),
    "more rotated than a head has": before(b"llama.rope.dimension_count", "<I", 2**16, 26 + 4),
    "values of another size": before(b"llama.attention.value_length", "<I", 8, 28 + 4),
    "no context": before(b"llama.context_length", "<I", 0, 20 + 4),
    "no merges": before(b"tokenizer.ggml.merges", "<B", ord("x"), 0),
    "a tensor of another name": before(b"\x0d\0\0\0\0\0\0\0output.weight", "<B", ord("O"), 8),
    "a type of half the bytes": before(b"token_embd.weight", "<I", 1, 37),
    "a shape of half the rows": before(b"blk.1.ffn_gate.weight", "<Q", 48, 21 + 4 + 8),
    "the last tensor in a smaller type": before(b"\x0d\0\0\0\0\0\0\0output.weight", "<I", 30, 8 + 13 + 4 + 16),
    "bytes after the last tensor": lambda raw: raw.extend(b"\0" * 32),
    "no head": before(b"llama.attention.head_count", "<I", 0, 26 + 4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("whole") / "out").read_bytes()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, whole: bytes, name: str) -> None:
    raw = bytearray(whole)
    HOSTILE[name](raw)
    file = tmp_path / "hostile.gguf"
    file.write_bytes(raw)
    with pytest.raises(ModelError) as caught:
        load(file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "gguf").exists() or not list((tmp_path / "cache" / "gguf").iterdir())


def test_a_hole_between_tensors_is_named_with_its_neighbours(tmp_path: Path, whole: bytes) -> None:
    raw = bytearray(whole)
    HOSTILE["a type of half the bytes"](raw)
    (tmp_path / "hole.gguf").write_bytes(raw)
    with pytest.raises(ModelError, match=r"40960 bytes between 'token_embd.weight' \(shape \[320, 64\], F16\) and 'blk.0.attn_norm"):
        read_gguf_header(tmp_path / "hole.gguf")


@pytest.mark.parametrize("length", [0, 3, 8, 23, 100, 5000, -1, -10_000])
def test_a_truncated_file_is_refused(tmp_path: Path, whole: bytes, length: int) -> None:
    file = tmp_path / "short.gguf"
    file.write_bytes(whole[:length])
    with pytest.raises(ModelError, match=r"copy or download it again|not a GGUF"):
        load(file)


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path, whole: bytes) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"))
    with pytest.raises(ModelError, match="'mamba'"):
        load(file)


def test_sizes_of_types_are_those_of_the_format() -> None:
    for number, (name, block, size) in TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (theirs.name, gguf.GGML_QUANT_SIZES[theirs]) == (name, (block, size))


@pytest.mark.slow
def test_the_header_agrees_with_gguf_py(tmp_path: Path) -> None:
    file = written(tmp_path / "out", "Q8_0")
    theirs = gguf.GGUFReader(file)
    ours = read_gguf_header(file)
    assert {t.name: (t.tensor_type.name, int(t.data_offset), int(t.n_bytes)) for t in theirs.tensors} == {
        name: (tensor.kind, tensor.start, tensor.size) for name, tensor in ours.tensors.items()
    }
