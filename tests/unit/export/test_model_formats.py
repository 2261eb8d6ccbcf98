"""Whole models in the forms of other programs: what is loaded there computes the same, and what cannot be held is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fresh
from gguf_toys import as_loaded, byte_level_tokenizer, toy, uneven
from regraft.errors import InputError, OutputError
from regraft.export import hf
from regraft.export.nemotron_nas import ffn_mult, read_sizes, round_up, targets
from regraft.export.ollama import modelfile, observed
from regraft.models.view import LayerSizes
from regraft.pipelines.export import export
from regraft.pipelines.export_model import takes
from regraft.settings import ExportSettings

IDS = torch.arange(24)[None] + 5
TEXT = "the king and the other thing in the morning: def f(x): return x  # and on it went " * 3
FEW = ExportSettings(check_positions=8)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


UNEVEN = {"layer1": (2, 2, 96), "layer2": (0, 0, 64), "layer3": (2, 1, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_uneven_layers_are_filled_up_for_a_stock_class(tmp_path: Path, family: str) -> None:
    model = uneven(toy(family, num_key_value_heads=2), **UNEVEN)
    done = export(as_loaded(model), tmp_path / "out", "hf-uniform", settings=FEW, check=None)
    assert "neither smaller nor faster" in done.notes[0]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock).__module__.startswith("transformers.models.")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)


def test_a_head_count_that_llama_refuses_becomes_mistral(tmp_path: Path) -> None:
    model = uneven(toy("llama"), layer0=(3, 1, 96), layer1=(3, 1, 96), layer2=(3, 1, 96), layer3=(3, 1, 96))
    export(as_loaded(model), tmp_path / "out", "hf-uniform", settings=FEW, check=None)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock).__name__ == "MistralForCausalLM"
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_head_count_that_no_stock_class_takes_is_filled_up(tmp_path: Path) -> None:
    model = uneven(toy("llama", attention_bias=True), **{f"layer{index}": (3, 1, 96) for index in range(4)})
    done = export(as_loaded(model), tmp_path / "out", "hf-uniform", settings=FEW, check=None)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (type(stock).__name__, stock.config.num_attention_heads) == ("LlamaForCausalLM", 4)
    assert "neither smaller nor faster" in done.notes[0]
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.exports("hf", "own code", "query heads", "key-value heads", "feed-forward width", "attention or feed-forward network removed")
@pytest.mark.exports("hf-uniform", "", "filled up with zeros")
@pytest.mark.parametrize("to", ["hf", "hf-uniform"])
def test_a_fresh_process_without_regraft_computes_the_same(tmp_path: Path, to: str) -> None:
    done = export(as_loaded(uneven(toy("llama"), **UNEVEN)), tmp_path / "out", to, settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.largest < 1e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config.get("auto_map", {})) == (["AutoConfig", "AutoModel", "AutoModelForCausalLM"] if to == "hf" else [])


@pytest.mark.exports("hf", "stock", "equal layers", "float32", "bfloat16", "float16")
@pytest.mark.exports("hf-uniform", "", "float32", "bfloat16", "float16")
@pytest.mark.parametrize("to", ["hf", "hf-uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stock_class_computes_the_same_in_every_float_type(tmp_path: Path, to: str, dtype: torch.dtype) -> None:
    rounded = toy("llama", num_hidden_layers=2)  # of which frequencies stay in float32, as they do in what is loaded
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype))
    export(as_loaded(toy("llama", num_hidden_layers=2).to(dtype)), tmp_path / "out", to, settings=FEW, check=None)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (type(stock).__module__, stock.dtype) == ("transformers.models.llama.modeling_llama", dtype)
    torch.testing.assert_close(logits(stock.float()), logits(rounded), rtol=0, atol=0)


def test_weights_are_sharded_by_size(tmp_path: Path) -> None:
    export(as_loaded(toy("llama")), tmp_path / "out", "hf", settings=ExportSettings(shard_size="200KB"), check=None)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(toy("llama")))


@pytest.mark.long
def test_a_folder_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder, other = hf.write_folder, toy("llama", scale=0.16)
    monkeypatch.setattr(hf, "write_folder", lambda model, loaded, folder, settings: write_folder(other, loaded, folder, settings))
    with pytest.raises(OutputError, match="not the same"):
        export(as_loaded(toy("llama")), tmp_path / "out", "hf", settings=FEW, check=TEXT)
    assert list(tmp_path.iterdir()) == []


def test_whether_a_format_takes_a_model_is_known_without_writing() -> None:
    pytest.importorskip("gguf")
    model = uneven(toy("llama"), **UNEVEN)
    assert takes("hf-uniform", as_loaded(model))
    assert takes("gguf", as_loaded(model))
    assert not takes("gguf", as_loaded(toy("gpt_neox")))


def test_fused_projections_are_not_filled_up(tmp_path: Path) -> None:
    model = uneven(toy("llama"), **UNEVEN)
    with pytest.raises(InputError, match="GGUF"):
        export(as_loaded(model), tmp_path / "out", "hf-uniform", settings=ExportSettings(quantize="Q8_0"), check=None)


@pytest.mark.slow
@pytest.mark.exports("nemotron-nas", "", "float32")
@pytest.mark.parametrize("changes", [UNEVEN, {"layer0": (0, 0, 96), "layer2": (3, 1, 32)}, {}])
def test_nemotron_nas_follows_the_rules_of_its_readers(tmp_path: Path, changes: dict[str, tuple[int, int, int]]) -> None:
    model = uneven(toy("llama", attention_bias=False), **changes)
    done = export(as_loaded(model), tmp_path / "out", "nemotron-nas", settings=FEW, check=TEXT)
    assert done.parity is not None
    assert done.parity.largest < 1e-3
    assert "not run" in done.parity.runtime
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(size.ffn % 256 == 0 for size in read_sizes(config))
    assert not config["block_configs"][0]["attention"]["no_op"]


def test_the_config_of_nemotron_nas_is_read_by_attributes(tmp_path: Path) -> None:
    export(as_loaded(uneven(toy("llama"), **UNEVEN)), tmp_path / "out", "nemotron-nas", settings=FEW, check=None)
    code = (
        "import sys; from transformers import AutoConfig; c = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "print(c.block_configs[2].attention.no_op, c.block_configs[1].attention.n_heads_in_group, c.block_configs[3].ffn.no_op)"
    )
    done = fresh.run(["-c", code, str(tmp_path / "out")])
    assert done.stdout.split() == ["True", "2", "True"]


@pytest.mark.parametrize("hidden", [64, 576, 2048, 4096, 5120, 8192])
def test_every_width_survives_the_way_through_its_multiple(hidden: int) -> None:
    for width in range(256, 6 * hidden, 256):
        assert round_up(int(2 * ffn_mult(width, hidden) * hidden / 3)) == width


def test_heads_are_filled_up_no_more_than_needed() -> None:
    sizes = [LayerSizes(32, 8, 64, 256), LayerSizes(24, 6, 64, 256), LayerSizes(20, 5, 64, 256)]
    found = targets(sizes)
    assert {size.query_heads for size in found} == {32}
    assert [size.kv_heads for size in found] == [8, 8, 8]


def test_chat_templates_are_observed() -> None:
    chatml = observed(byte_level_tokenizer(CHATML))
    assert chatml is not None
    assert chatml.system == ("<|im_start|>system\n", "<|im_end|>\n")
    assert chatml.user == ("<|im_start|>user\n", "<|im_end|>\n")
    assert chatml.assistant == ("<|im_start|>assistant\n", "<|im_end|>\n")
    inst = observed(byte_level_tokenizer(INST))
    assert inst is not None
    assert inst.system is None
    assert inst.user == ("[INST] ", " [/INST]")
    assert inst.assistant == ("", "</s>")
    assert observed(byte_level_tokenizer()) is None
    assert observed(byte_level_tokenizer("{{ messages | length }}")) is None


def test_a_modelfile_holds_template_stops_and_context() -> None:
    loaded = as_loaded(toy("llama"), byte_level_tokenizer(CHATML))
    text, notes = modelfile(loaded, 128)
    assert notes == ()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}')
    assert 'PARAMETER stop "</s>"\n' in text
    assert "PARAMETER num_ctx 128\n" in text


def test_an_uneven_folder_loads_with_its_own_code(tmp_path: Path) -> None:
    export(as_loaded(uneven(toy("llama"), **UNEVEN)), tmp_path / "out", "hf", settings=FEW, check=None)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "regraft_llama"
    assert (tmp_path / "out" / "modeling_regraft.py").is_file()
