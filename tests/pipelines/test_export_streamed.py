"""An export that is not compared is written tensor by tensor: the same bytes as from memory, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gguf_toys import as_loaded, byte_level_tokenizer, toy, uneven
from regraft.cli.app import run
from regraft.errors import InputError, ModelError
from regraft.models.load import load
from regraft.models.save import save
from regraft.pipelines.export import export
from regraft.plans import Provenance
from regraft.settings import ExportSettings
from regraft.streaming import checkpoint

pytest.importorskip("gguf")

UNEVEN = {"layer1": (2, 2, 64), "layer2": (0, 0, 64)}
GEMMA4: dict[str, Any] = {  # whose layers have a buffer that is stored
    "head_dim": 16,
    "global_head_dim": 32,
    "num_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
}
MODELS: dict[str, Any] = {
    "llama": lambda: toy("llama"),
    "tied bfloat16": lambda: toy("qwen3", tie_word_embeddings=True).bfloat16(),
    "uneven": lambda: uneven(toy("llama"), **UNEVEN),
    "gemma 2": lambda: toy("gemma2"),
    "gpt 2": lambda: toy("gpt2", n_embd=64, n_head=4, n_layer=2, n_positions=128, n_inner=96),
    "gemma 4": lambda: toy("gemma4_text", **GEMMA4),
    "phi 3": lambda: toy("phi3").half(),
}


def saved(model: Any, folder: Path) -> Path:
    record = Provenance(command="test", source="toy", source_fingerprint="", seed=0, versions={}, settings={})
    save(model, byte_level_tokenizer(), folder, record, "# toy")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_and_the_record_are_those_of_the_export_from_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 3000)  # matrices come in many blocks, which do not end with a head
    folder = saved(MODELS[name](), tmp_path / "model")
    loaded = load(folder)
    for to, quantize in (("gguf", ""), ("ollama", "Q8_0"), ("hf-uniform", ""), ("hf", "")):
        settings = ExportSettings(shard_size="100KB") if to == "hf" else ExportSettings(quantize=quantize)
        from_memory = export(loaded, tmp_path / f"{to}-memory", to, settings=settings, check=None)
        streamed = export(folder, tmp_path / f"{to}-streamed", to, settings=settings, check=None)
        assert (streamed.words, streamed.notes) == (from_memory.words, from_memory.notes)
        records = [json.loads((tmp_path / f"{to}-{way}" / "regraft.json").read_text()) for way in ("memory", "streamed")]
        assert records[0]["source_fingerprint"] == records[1]["source_fingerprint"]
        if not to.startswith("hf"):  # whose files may be divided otherwise
            assert records[0]["files"] == records[1]["files"]
    again = load(tmp_path / "hf-streamed")
    assert len(list((tmp_path / "hf-streamed").glob("*.safetensors"))) > 1
    assert again.fingerprint == loaded.fingerprint
    assert type(again.model) is type(loaded.model)
    for name, buffer in loaded.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], buffer)


@pytest.mark.slow
def test_a_factored_model_that_is_not_compared_is_written_from_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(toy("llama"), tmp_path / "model")
    line = ["compress", str(folder), "--method", "svd", "--ratio", "0.3", "--device", "cpu", "--quiet", "-o", str(tmp_path / "factored")]
    assert run(line) == 0, capsys.readouterr().err
    for words in (["prune", "--ratio", "0.2", "--targets", "ffn"], ["compress", "--ratio", "0.2", "--method", "svd"]):
        line = [words[0], str(tmp_path / "factored"), *words[1:], "--memory", "2GB", "--device", "cpu", "-o", str(tmp_path / "none")]
        assert run(line) == 2
        assert "is factored already" in capsys.readouterr().err
    export(tmp_path / "factored", tmp_path / "out", "hf", check=None)
    assert load(tmp_path / "out").fingerprint == load(tmp_path / "factored").fingerprint


def test_a_model_that_does_not_fit_is_written_and_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(toy("llama"), tmp_path / "model")
    monkeypatch.setattr(import_module("regraft.pipelines.export_streamed"), "free_memory", lambda load: 1000)
    done = export(folder, tmp_path / "out", "gguf")
    assert done.parity is None
    assert any("was not compared with the model" in note for note in done.notes)
    assert (tmp_path / "out" / "model.gguf").is_file()


def test_nan_in_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    toy("llama").save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mlp.down_proj.weight"][5, 7] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    for to in ("gguf", "hf"):
        with pytest.raises(ModelError, match=r"'model\.layers\.3\.mlp\.down_proj\.weight' holds NaN"):
            export(tmp_path / "model", tmp_path / "out", to, check=None)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_shard_size_that_is_none_is_refused(tmp_path: Path) -> None:
    for size in ("much", "0", "-5GB", ""):
        with pytest.raises(InputError, match="is not a size"):
            export(as_loaded(toy("llama")), tmp_path / "out", "hf", settings=ExportSettings(shard_size=size), check=None)


PEAK = """
import resource, sys
from regraft.pipelines.export import export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(sys.argv[1], sys.argv[2], sys.argv[3], check=None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.long
def test_the_model_is_never_in_memory(tmp_path: Path) -> None:
    """A process of its own grows by a few tensors: far less than the 200 MB that the model takes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 320}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **sizes)).bfloat16()
    model.save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    nbytes = sum(parameter.numel() * 2 for parameter in model.parameters())
    assert nbytes > 190e6
    del model
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model"), str(tmp_path / "out"), "gguf"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < nbytes / 3
