"""What transformers renames and stacks: parameters are found in its files, and are written as it writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from regraft.models.load import load
from regraft.models.stored import as_written, sources_of, written_of
from regraft.pipelines.prune.prune import prune
from regraft.settings import PruneSettings
from regraft.streaming.skeleton import open_skeleton

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "moe_intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
# Config, and a name that the files have and the model lacks.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (SIZES, ""),
    "qwen3_moe": ({**SIZES, "num_experts": 4}, "model.layers.1.mlp.experts.3.gate_proj.weight"),
    "mixtral": ({**SIZES, "num_local_experts": 4}, "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
    "nemotron_h": (
        {**SIZES, "layers_block_type": ["linear_attention", "full_attention", "mlp", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8,
         "n_groups": 2, "ssm_state_size": 16},
        "backbone.layers.2.mixer.up_proj.weight",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODELS))
def test_parameters_are_found_in_the_files_and_written_as_transformers_does(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values, name = MODELS[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values)).eval()
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert name in stored or not name
    assert name not in parameters
    sources = sources_of(model, {key: tuple(tensor.shape) for key, tensor in stored.items()})
    assert sources.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert sources[key].shape == tuple(parameter.shape)
        assert torch.equal(sources[key].made(stored.__getitem__, model), parameter), key
    made = {key: tensor for own, parameter in parameters.items() for key, tensor in as_written(model, own, parameter.detach()).items()}
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[key], stored[key]) for key in made)
    shapes = written_of(model, {key: tuple(parameter.shape) for key, parameter in parameters.items()})
    assert {key: shape for parts in shapes.values() for key, shape in parts.items()} == {k: tuple(t.shape) for k, t in stored.items()}
    assert open_skeleton(tmp_path / "model").loaded.fingerprint == load(tmp_path / "model").fingerprint


@pytest.mark.slow
def test_nemotron_h_is_streamed_under_the_names_of_its_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["nemotron_h"](**MODELS["nemotron_h"][0])).save_pretrained(tmp_path / "model")
    settings = PruneSettings(criterion="l2", ratio=0.05, align=1)
    prune(tmp_path / "model", tmp_path / "whole", settings)
    prune(tmp_path / "model", tmp_path / "streamed", settings.model_copy(update={"memory": 3_000_000_000}))
    whole, streamed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "streamed"))
    assert whole.keys() == streamed.keys() == load_file(tmp_path / "model" / "model.safetensors").keys()
    assert all(torch.equal(whole[name], streamed[name]) for name in whole)
    assert whole["backbone.layers.2.mixer.up_proj.weight"].shape[0] < 24
