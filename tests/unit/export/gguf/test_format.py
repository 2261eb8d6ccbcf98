"""GGUF files compute in llama.cpp what the model computes here; what is wrong is refused, and nothing stays."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from gguf_toys import as_loaded, byte_level_tokenizer, spaced_tokenizer, toy, uneven
from regraft.errors import InputError, OutputError
from regraft.export import EXPORTERS
from regraft.export.contract import ModelFormat
from regraft.export.gguf.catalogue import ARCHITECTURES, choose
from regraft.export.gguf.source import source_of
from regraft.pipelines.export import export
from regraft.settings import ExportSettings

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

TEXT = "the king and the other thing in the morning: def f(x): return x  # and on it went, is it? " * 3
FEW = ExportSettings(check_positions=10)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
OWN_YARN = YARN | {"beta_fast": 16.0, "attention_factor": 1.2}
LFM2: dict[str, Any] = {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}
GRANITE_FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0}
GRANITE: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    **GRANITE_FACTORS,
}
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
LOCAL, WHOLE = "sliding_attention", "full_attention"
GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_key_value_heads": 2,
    "sliding_window": 24,
    "num_hidden_layers": 6,
    "layer_types": [LOCAL, LOCAL, WHOLE] * 2,
    "hidden_size_per_layer_input": 0,
}
SHARED = {
    "layer_types": [LOCAL, WHOLE] * 3,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 320,
    "final_logit_softcapping": 30.0,
}
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3 frequencies": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, yarn with factors of its own": ("llama", {"rope_parameters": OWN_YARN}),
    "mistral": ("mistral", {"sliding_window": None, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "mistral, window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}),
    "smollm3": ("smollm3", SIX_HEADS),
    "olmo2": ("olmo2", {}),
    "olmo2, windows": ("olmo3", {"sliding_window": 24}),
    "granite": ("granite", GRANITE_FACTORS | SIX_HEADS),
    "cohere2": ("cohere2", {"sliding_window": 24, "logit_scale": 0.5}),
    "glm4": ("glm4", SIX_HEADS),
    "ernie4_5": ("ernie4_5", SIX_HEADS),
    "hunyuan-dense": ("hunyuan_v1_dense", SIX_HEADS),
    "seed_oss": ("seed_oss", SIX_HEADS),
    "gemma 2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 10}),
    "gemma 3": ("gemma3_text", {"sliding_window": 24, "query_pre_attn_scalar": 10, "num_hidden_layers": 6}),
    "gemma 2, no caps": ("gemma2", {"sliding_window": 24, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma 2, 46 layers": ("gemma2", {"sliding_window": 24, "num_hidden_layers": 46, "head_dim": 32}),
    "lfm2": ("lfm2", LFM2),
    "granitehybrid": ("granitemoehybrid", GRANITE),
    "granitehybrid, rotated, groups": (
        "granitemoehybrid",
        GRANITE | {"position_embedding_type": "rope", "mamba_n_groups": 2, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "phi 3": ("phi3", {}),
    "gpt 2": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128, "n_inner": 96}),
}


def architecture_of(file: Path) -> str:
    return gguf.GGUFReader(file).fields["general.architecture"].contents()


@pytest.mark.slow
@pytest.mark.exports("gguf", "llama, qwen2, qwen3, gemma2, gemma3, qwen3moe, lfm2, granitehybrid, phi3, gpt2", "equal layers", "F32")
@pytest.mark.exports("gguf", "smollm3, olmo2, granite, cohere2, glm4, ernie4_5, hunyuan-dense, seed_oss", "equal layers")
@pytest.mark.parametrize("name", EXACT)
def test_a_uniform_model_computes_the_same_in_llama_cpp(tmp_path: Path, name: str) -> None:
    family, config = EXACT[name]
    done = export(as_loaded(toy(family, **config)), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    # llama.cpp takes gelu from a table in float16.
    assert done.parity.largest < (5e-3 if name.startswith(("gemma", "gpt")) else 1e-3)
    assert done.parity.agreement == 1.0
    assert done.parity.characters == 10_000


@pytest.mark.slow
@pytest.mark.exports("gguf", "gemma4", "feed-forward width")
@pytest.mark.parametrize(
    "more",
    [{}, SHARED, {"attention_k_eq_v": True, "num_global_key_value_heads": 1}],
    ids=["heads of two sizes", "shared keys, double width, second embedding", "values that are keys"],
)
def test_a_gemma_4_computes_the_same_in_llama_cpp(tmp_path: Path, more: dict[str, Any]) -> None:
    model = toy("gemma4_text", scale=0.08, **(GEMMA4 | more))
    done = export(as_loaded(model), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    # llama.cpp takes gelu from a table in float16; with such a table here, too, the difference is a tenth.
    assert done.parity.largest < 9e-3
    assert done.parity.mean < 2e-3
    assert len({size.ffn for size in source_of(model).sizes}) == (2 if "use_double_wide_mlp" in more else 1)


UNEVEN = {
    "widths": {"layer1": (4, 2, 64), "layer2": (4, 2, 32)},
    "heads": {"layer1": (2, 1, 96), "layer3": (2, 2, 40)},
    "no attention": {"layer2": (0, 0, 96)},
    "no attention in layer 0": {"layer0": (0, 0, 96)},
    "no feed-forward network": {"layer1": (4, 2, 0)},
    "nothing left of a layer": {"layer2": (0, 0, 0)},
    "nothing left of layer 0": {"layer0": (0, 0, 0)},
}


@pytest.mark.slow
@pytest.mark.exports("gguf", "deci", "query heads", "key-value heads", "feed-forward width", "attention or feed-forward network removed")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", UNEVEN)
def test_an_uneven_model_is_written_as_deci(tmp_path: Path, name: str, family: str) -> None:
    model = uneven(toy(family), **UNEVEN[name])
    done = export(as_loaded(model), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.largest < 2e-3
    assert architecture_of(tmp_path / "out" / "model.gguf") == "deci"


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: toy("qwen2", rope_parameters=OWN_YARN),
        lambda: uneven(toy("qwen2"), **{f"layer{index}": (3, 1, 96) for index in range(4)}),
        lambda: uneven(toy("llama", rope_parameters=OWN_YARN), layer1=(2, 2, 64)),
        lambda: uneven(toy("llama", attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3), layer0=(0, 0, 96), layer1=(2, 2, 64)),
    ],
    ids=["own rotation", "heads narrower than the stream", "uneven with own rotation", "uneven with biases"],
)
def test_deci_takes_what_the_plain_architectures_do_not(tmp_path: Path, make: Any) -> None:
    done = export(as_loaded(make()), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.largest < 1e-3
    assert architecture_of(tmp_path / "out" / "model.gguf") == "deci"


@pytest.mark.slow
@pytest.mark.exports("gguf", "openelm", "query heads", "key-value heads", "feed-forward width")
def test_an_uneven_qwen3_with_tied_embeddings_is_written_as_openelm(tmp_path: Path) -> None:
    model = uneven(toy("qwen3", tie_word_embeddings=True), layer1=(2, 1, 64), layer3=(4, 2, 32))
    done = export(as_loaded(model), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.largest < 2e-3
    assert architecture_of(tmp_path / "out" / "model.gguf") == "openelm"


@pytest.mark.slow
@pytest.mark.exports("gguf", "step35", "query heads", "key-value heads")
@pytest.mark.parametrize("tied", [True, False])
def test_an_uneven_qwen3_is_written_as_step35_when_asked(tmp_path: Path, tied: bool) -> None:
    model = uneven(toy("qwen3", tie_word_embeddings=tied), layer1=(2, 1, 96), layer3=(2, 2, 96))
    settings = ExportSettings(check_positions=10, architecture="step35")
    done = export(as_loaded(model), tmp_path / "out", "gguf", settings=settings, check=TEXT)
    assert done.parity is not None
    assert done.parity.largest < 2e-3


@pytest.mark.long
@pytest.mark.parametrize(("family", "config"), [("lfm2", LFM2), ("granitemoehybrid", GRANITE)])
def test_a_pruned_hybrid_is_written_and_uneven_layers_are_refused(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    pruned = regraft.prune(toy(family, **config), tokenizer=byte_level_tokenizer(), ratio=0.1, criterion="l2", targets=("ffn",), align=8)
    done = export(as_loaded(pruned.model), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.largest < 1e-3
    source = source_of(pruned.model)
    assert source.sizes[0].ffn < 96
    choose(source)
    first, *others = source.sizes
    with pytest.raises(InputError, match=r"one width: prune with `shape=uniform`\); export with `to=hf`$"):
        choose(replace(source, sizes=(replace(first, ffn=8), *others)))
    with pytest.raises(InputError, match="lost its attention or feed-forward network"):
        choose(replace(source, sizes=(replace(first, ffn=0), *others)))


def test_every_architecture_that_is_declared_is_compared_in_this_file() -> None:
    compared = {name.replace("gemma 2", "gemma2").replace("gemma 3", "gemma3").replace(" ", "").partition(",")[0] for name in EXACT}
    assert {entry.name for entry in ARCHITECTURES} <= compared | {"deci", "openelm", "step35", "gemma4"}


def test_a_mixture_that_the_runtime_weighs_otherwise_is_refused(tmp_path: Path) -> None:
    model = toy("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=False)
    with pytest.raises(InputError, match="the router's weights of a token sum to one"):
        export(as_loaded(model), tmp_path / "out", "gguf", settings=FEW, check=None)


def test_windows_that_moved_are_refused(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    with pytest.raises(InputError, match="layers were removed"):
        export(as_loaded(toy("gemma2", layer_types=kinds)), tmp_path / "out", "gguf", settings=FEW, check=None)


@pytest.mark.slow
def test_a_tokenizer_of_the_sentencepiece_kind(tmp_path: Path) -> None:
    done = export(as_loaded(toy("llama"), spaced_tokenizer()), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.characters == 10_000


CLOSE = {"F16": 1e-5, "BF16": 1e-4, "Q8_0": 1e-3, "Q6_K": 0.01, "Q5_K_M": 0.02, "Q5_K_S": 0.02, "Q4_K_M": 0.1, "Q4_K_S": 0.1, "Q3_K_M": 0.4}


@pytest.mark.slow
@pytest.mark.exports("gguf", "llama", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M")
@pytest.mark.parametrize(("quantize", "largest"), CLOSE.items())
def test_quantized_files_stay_close(tmp_path: Path, quantize: str, largest: float) -> None:
    settings = ExportSettings(quantize=quantize, check_positions=10)
    done = export(as_loaded(toy("llama", scale=0.05, hidden_size=256)), tmp_path / "out", "gguf", settings=settings, check=TEXT)
    assert done.parity is not None
    assert done.parity.divergence < largest


@pytest.mark.slow
@pytest.mark.exports("ollama", "", "as `gguf`")
def test_ollama_gets_the_same_file_and_a_modelfile(tmp_path: Path) -> None:
    loaded = as_loaded(uneven(toy("llama", num_hidden_layers=2), layer1=(2, 1, 64)))
    done = export(loaded, tmp_path / "out", "ollama", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.largest < 2e-3
    export(loaded, tmp_path / "gguf", "gguf", settings=FEW, check=None)
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "gguf" / "model.gguf").read_bytes()
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


@pytest.mark.slow
def test_k_types_weigh_channels_by_a_text_that_was_given_and_by_none_in_silence(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 60, encoding="utf-8")
    loaded, sizes = as_loaded(toy("llama", scale=0.05, hidden_size=256)), dict[str, bytes]()
    for name, text in (("alike", None), ("weighed", tmp_path / "text.txt")):
        settings = ExportSettings(quantize="Q4_K_M", importance=text)
        done = export(loaded, tmp_path / name, "gguf", settings=settings, check=None)
        assert any("weighed the errors of all channels alike" in note for note in done.notes) == (text is None)
        sizes[name] = (tmp_path / name / "model.gguf").read_bytes()
    assert len(sizes["alike"]) == len(sizes["weighed"])
    assert sizes["alike"] != sizes["weighed"]


@pytest.mark.slow
def test_a_wrong_tensor_is_noticed_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("regraft.export.gguf.llama_like"), "paired", lambda tensor, heads: tensor)
    with pytest.raises(OutputError, match="not the same"):
        export(as_loaded(toy("llama")), tmp_path / "out", "gguf", settings=FEW, check=TEXT)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_merge_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = EXPORTERS.get("gguf")
    assert isinstance(form, ModelFormat)
    loaded = as_loaded(toy("llama"))
    written = form.write(loaded, tmp_path, FEW)
    other = as_loaded(loaded.model, byte_level_tokenizer())
    other.tokenizer.backend_tokenizer.pre_tokenizer = spaced_tokenizer().backend_tokenizer.pre_tokenizer or None  # type: ignore[union-attr]
    with pytest.raises((OutputError, InputError)):
        form.check(other, tmp_path, written, TEXT, FEW)


@pytest.mark.slow
def test_the_file_holds_names_and_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    export(as_loaded(toy("qwen3"), byte_level_tokenizer(template)), tmp_path / "out", "gguf", settings=FEW, check=None)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == template
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["qwen3.attention.key_length"].contents() == 16
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 320


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (lambda: uneven(toy("qwen3"), layer1=(2, 1, 96)), {}, "hf-uniform"),
        (lambda: toy("llama"), {"quantize": "Q9"}, "Q4_K_M"),
        (lambda: toy("llama"), {"architecture": "qwen2"}, "deci"),
        (lambda: toy("qwen3", attention_bias=True), {}, "no biases"),
        (lambda: toy("qwen3", rope_parameters=LLAMA3), {}, "no rotary scaling of type 'llama3'"),
        (lambda: toy("qwen3", rope_parameters=OWN_YARN), {}, "beta_fast"),
        (lambda: toy("gemma2", tie_word_embeddings=False), {}, "must be the token embedding"),
        (lambda: toy("gemma3_text", num_hidden_layers=6, use_bidirectional_attention=True), {}, "looks back only"),
        (lambda: toy("lfm2", **LFM2, conv_bias=True), {}, "no biases in convolutions"),
        (lambda: toy("lfm2", **LFM2, head_dim=8), {}, "as wide as the stream"),
        (lambda: toy("granitemoehybrid", **(GRANITE | {"num_local_experts": 2})), {}, "experts beside the shared network"),
        (lambda: toy("granitemoehybrid", **GRANITE, time_step_limit=(0.001, 0.1)), {}, "no limits on the time steps"),
        (lambda: toy("smollm3", no_rope_layers=[1, 0, 1, 1]), {}, "each 4th must have a rotation"),
        (lambda: toy("olmo3", layer_types=[LOCAL, WHOLE] * 2), {}, "each 4th must have a sliding window"),
        (lambda: toy("cohere2", **SIX_HEADS), {}, "as wide as the stream"),
        (
            lambda: toy(
                "gemma4_text",
                **(GEMMA4 | SHARED | {"layer_types": [WHOLE, LOCAL, LOCAL, WHOLE] * 2, "num_hidden_layers": 8, "num_kv_shared_layers": 2}),
            ),
            {},
            "share the keys and values of the last two",
        ),
        (lambda: toy("opt", ffn_dim=96, word_embed_proj_dim=64), {}, "with `to=hf`"),
    ],
)
def test_what_no_file_can_hold_is_refused(tmp_path: Path, model: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        export(as_loaded(model()), tmp_path / "out", "gguf", settings=ExportSettings(**settings), check=None)
    assert not (tmp_path / "out").exists()


def test_nan_is_refused(tmp_path: Path) -> None:
    model = toy("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        export(as_loaded(model), tmp_path / "out", "gguf", settings=FEW, check=None)
