"""A run that is killed and resumed, however often, ends with the same bytes as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kills

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "saw", "two", "birds", "under", "that", "old", "tree", "again")

RECIPE = """
model: {model}
seed: 5
prune: {{ratio: 0.2, samples: 4, seq_len: 16, align: 1, calibration: {text}, shape: {shape}}}
recover: {{data: {text}, steps: 12, batch: 2, seq_len: 16, eval_every: 4, rank: 2, held_out: 0.2, merge: {merge}, quiet: true}}
evaluate: {{text: {text}, window: 16, max_tokens: 300}}
sample: {{prompt: the cat, tokens: 6}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Path]:
    """A model folder with a tokenizer, and a text: both made here in a second."""
    text = tmp_path / "text.txt"
    lines = [" ".join(WORDS[(start * 7 + step * step) % len(WORDS)] for step in range(9)) for start in range(150)]
    text.write_text("\n".join(lines), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    model.save_pretrained(tmp_path / "model")
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "model")
    return {"model": tmp_path / "model", "text": text}


@pytest.mark.parametrize(("shape", "merge", "moments"), [("per-layer", "true", 6), ("uniform", "false", 2)])
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bytes(
    tmp_path: Path, tiny: dict[str, Path], shape: str, merge: str, moments: int
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(**tiny, shape=shape, merge=merge), encoding="utf-8")
    command = ["run", str(recipe), "--output", "out", "--resume"]
    files, stopped = kills.killed(command, tmp_path / "runs", moments=moments, timers=moments // 2, most_kills=12)
    weights = "model/model.safetensors" if merge == "true" else "model/adapter_model.safetensors"
    expected = {weights, "plan.json", "results.json", "report.html", "report.md", "recipe.yaml", "run.json", "samples.json"}
    assert {f"out/{name}" for name in expected} <= set(files)
    # Some were stopped inside the training, with a checkpoint to go on from, and some between stages.
    if moments >= 6:
        assert any("checkpoint-" in name for name in stopped)
    assert "out/pruned/manifest.json" in stopped
