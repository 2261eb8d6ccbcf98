from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from regraft.errors import ModelError
from regraft.evaluation.size import bytes_in_memory, macs_per_token, measure_size
from regraft.models.build import config_for
from regraft.models.uneven import register
from regraft.models.view import LayerSizes

MakeModel = Callable[..., PreTrainedModel]
CONTEXT = 12


def counted_macs_per_token(model: torch.nn.Module) -> float:
    """Counts the products of a real forward pass, but for the rotary embedding's positions times frequencies."""
    model.eval()
    model.config._attn_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, CONTEXT, dtype=torch.int64), use_cache=False)
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(".rotary_emb"))
    return (counter.get_total_flops() - rotary) / 2 / CONTEXT


def uneven(like: PreTrainedModel, sizes: list[LayerSizes]) -> PreTrainedModel:
    register()
    return AutoModelForCausalLM.from_config(config_for(like.config, sizes))


@pytest.mark.parametrize("name", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_macs_are_those_of_a_real_pass(make_model: MakeModel, name: str, tied: bool) -> None:
    model = make_model(name, tie_word_embeddings=tied)
    assert macs_per_token(model, CONTEXT) == counted_macs_per_token(model)


def test_macs_of_uneven_layers_are_those_of_a_real_pass(make_model: MakeModel) -> None:
    model = uneven(make_model("llama"), [LayerSizes(4, 2, 8, 10), LayerSizes(2, 1, 8, 64), LayerSizes(6, 2, 8, 3)])
    assert macs_per_token(model, CONTEXT) == counted_macs_per_token(model)


def test_parts_that_were_removed_cost_nothing(make_model: MakeModel) -> None:
    model = uneven(make_model("qwen2"), [LayerSizes(0, 0, 8, 10), LayerSizes(2, 1, 8, 0), LayerSizes(4, 2, 8, 3)])
    assert macs_per_token(model, CONTEXT) == counted_macs_per_token(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for a name that transformers changed
def test_adapters_cost_what_they_cost(make_model: MakeModel) -> None:
    plain = macs_per_token(make_model("llama"), CONTEXT)
    model = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    assert macs_per_token(model, CONTEXT) == counted_macs_per_token(model)
    assert macs_per_token(model, CONTEXT) == plain + 3 * 2 * ((48 + 48) + (48 + 48) + (64 + 48))


def test_a_sliding_window_bounds_attention(make_model: MakeModel) -> None:
    full, sliding = make_model("mistral"), make_model("mistral-window")
    assert macs_per_token(sliding, 8) == macs_per_token(full, 8)
    assert macs_per_token(sliding, 60) == macs_per_token(full, 8)
    assert macs_per_token(full, 60) - macs_per_token(full, 8) == 3 * 2 * 48 * 52


def test_parameters_and_bytes_count_tied_weights_once(make_model: MakeModel, tmp_path: Path) -> None:
    tied, untied = make_model("llama", tie_word_embeddings=True), make_model("llama")
    report = measure_size(tied, None, CONTEXT)
    assert measure_size(untied, None, CONTEXT).parameters - report.parameters == 97 * 48
    assert report.parameters == tied.num_parameters()
    assert report.bytes_in_memory == 4 * report.parameters + sum(4 * buffer.numel() for buffer in tied.buffers())
    assert bytes_in_memory(tied.to(torch.bfloat16)) < 0.51 * report.bytes_in_memory
    assert (report.bytes_on_disk, report.context_tokens) == (0, CONTEXT)


def test_bytes_on_disk_are_those_of_the_safetensors(make_model: MakeModel, tmp_path: Path) -> None:
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({"weight": torch.zeros(100)}, tmp_path / shard)
    (tmp_path / "tokenizer.json").write_text("x" * 5000)
    expected = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert measure_size(make_model("llama"), tmp_path, CONTEXT).bytes_on_disk == expected > 800


def test_an_unknown_family_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    model.config.model_type = "somethingelse"
    with pytest.raises(ModelError, match="'somethingelse' is not known"):
        measure_size(model, None, CONTEXT)
