"""The language model of a multimodal checkpoint: pruned as a model of its own, saved alone or inside the untouched rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from folders import text_file, tiny_tokenizer
from regraft.cli.app import run
from regraft.errors import ModelError
from regraft.models.load import load
from regraft.models.towers import load_tower
from regraft.settings import LoadSettings

IDS = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(3))
TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 8,
}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mistral3": ({**TEXT, "model_type": "ministral3"}, {**VISION, "model_type": "pixtral", "head_dim": 8}),
    "gemma3": ({**TEXT, "model_type": "gemma3_text", "sliding_window": 16}, {**VISION, "model_type": "siglip_vision_model"}),
    "gemma4": (
        {**TEXT, "model_type": "gemma4_text", "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16,
         "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
         "head_dim": 8, "patch_size": 4, "position_embedding_size": 16, "model_type": "gemma4_vision"},
    ),
    "qwen3_5": (
        {**TEXT, "model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
         "num_position_embeddings": 16, "model_type": "qwen3_5_vision"},
    ),
}  # fmt: skip
FURTHER: dict[str, dict[str, Any]] = {
    "mistral3": {"image_token_index": 91, "spatial_merge_size": 1},
    "gemma3": {"image_token_id": 91, "boi_token_index": 92, "eoi_token_index": 93, "mm_tokens_per_image": 1},
    "gemma4": {"image_token_id": 91, "video_token_id": 92, "boi_token_id": 93, "eoi_token_id": 94, "audio_token_id": 95},
    "qwen3_5": {"image_token_id": 91, "video_token_id": 92, "vision_start_token_id": 93, "vision_end_token_id": 94},
}


def saved(family: str, folder: Path) -> PreTrainedModel:
    text, vision = FAMILIES[family]
    torch.manual_seed(0)
    config_class: Any = CONFIG_MAPPING[family]
    config = config_class(text_config=dict(text), vision_config=dict(vision), **FURTHER[family])
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}', encoding="utf-8")
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_tower_is_pruned_alone_and_inside_the_rest(family: str, tmp_path: Path) -> None:
    whole = saved(family, tmp_path / "model")
    taken = load_tower(tmp_path / "model", "text", LoadSettings())
    assert (logits(taken.model) - logits(whole)).abs().max() <= 1e-6
    settings = ["--tower", "text", "--ratio", "0.15", "--targets", "ffn", "--criterion", "l2", "--align", "1"]
    assert run(["prune", str(tmp_path / "model"), "-o", str(tmp_path / "alone"), *settings]) == 0
    assert run(["prune", str(tmp_path / "model"), "-o", str(tmp_path / "inside"), *settings, "--keep-rest"]) == 0
    alone = load(tmp_path / "alone").model
    assert type(alone) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "alone"))
    assert alone.config.model_type == FAMILIES[family][0]["model_type"]
    assert alone.config.intermediate_size < 64
    inside = AutoModelForImageTextToText.from_pretrained(tmp_path / "inside").eval()
    assert type(inside) is type(whole)
    assert (logits(inside) - logits(alone)).abs().max() <= 1e-6
    assert (logits(alone) - logits(whole)).abs().max() > 1e-3
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "inside"))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(".mlp." in name and "vis" not in name for name in changed)
    assert (tmp_path / "inside" / "preprocessor_config.json").read_bytes() == (tmp_path / "model" / "preprocessor_config.json").read_bytes()
    config = AutoConfig.from_pretrained(tmp_path / "inside")
    assert config.get_text_config().intermediate_size == alone.config.intermediate_size


@pytest.mark.slow
def test_what_predicts_ahead_is_left_out_with_a_word(tmp_path: Path, capsys: Any) -> None:
    saved("qwen3_5", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "mtp.layers.0.mlp.down_proj.weight": torch.zeros(48, 64)}, file, metadata={"format": "pt"})
    settings = ["--tower", "text", "--ratio", "0.1", "--criterion", "l2", "--align", "1"]
    assert run(["prune", str(tmp_path / "model"), "-o", str(tmp_path / "out"), *settings]) == 0
    assert "1 tensors that predict several tokens ahead ('mtp.layers.0.mlp.down_proj.weight') are left out" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["seedling", "--tower", "text"], "has no tower 'text'"),
        (["seedling", "--keep-rest"], "--keep-rest keeps what a multimodal checkpoint holds beside its --tower"),
        (["seedling", "--tower", "text", "--memory", "3GB"], "--memory does not read single towers"),
        (["multimodal", "--targets", "ffn"], "to prune the language model inside it, use `regraft prune` with --tower text"),
        (["multimodal", "--tower", "text", "--keep-rest", "--targets", "mlp", "--ratio", "0.2"], "needs a class of ours"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, capsys: Any, given: list[str], why: str) -> None:
    if given[0] == "multimodal":
        saved("mistral3", tmp_path / "model")
        given = [
            str(tmp_path / "model"),
            *given[1:],
            "--criterion",
            "l2",
            "--calibration",
            str(text_file()),
            "--seq-len",
            "16",
            "--samples",
            "4",
        ]
    capsys.readouterr()
    assert run(["prune", *given, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    saved("mistral3", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": []}), encoding="utf-8")
    with pytest.raises(ModelError, match="has no model_type"):
        load_tower(tmp_path / "model", "text", LoadSettings())
