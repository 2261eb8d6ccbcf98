"""A text, a recipe and a model folder of three layers, the same every time."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "saw", "two", "birds", "under", "that", "old", "tree", "again")
TEXT = "\n".join(" ".join(WORDS[(line * 7 + step * step) % len(WORDS)] for step in range(9)) for line in range(150))

RECIPE = """
model: model
seed: 3
load: {device: cpu, dtype: float32}
prune:
  {ratio: 0.3, criterion: wanda, select: uniform, shape: uniform, reconstruct: mean, align: 1,
   calibration: text.txt, samples: 8, seq_len: 16}
recover:
  {data: text.txt, adapter: lora, rank: 2, alpha: 4, dropout: 0, lr: 0.003, steps: 6, batch: 2, seq_len: 16, eval_every: 3,
   held_out: 0.2, precision: float32, merge: true, quiet: true}
evaluate: {text: text.txt, window: 16, max_tokens: 300}
sample: {prompt: the cat, tokens: 6}
"""


def make_inputs() -> None:
    """Writes a text, a recipe and a model of three layers with a byte tokenizer into the current folder."""
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<s>": 0, "</s>": 1} | {letter: 2 + index for index, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(ids), max_position_embeddings=64, bos_token_id=0, eos_token_id=1, **shape)
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    model.save_pretrained("model")
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained("model")
