"""What works for families of 2026: the conformance test measures it and asserts it, and ``docs/families.md`` is written from it.

A mark is ``yes``, or the words with which the refusal has to explain itself.
"""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR, FULL = "linear_attention", "full_attention"
DELTA_NET = {
    **SIZES, "layer_types": [LINEAR, FULL], "num_hidden_layers": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MIXTURE = {**SIZES, "num_hidden_layers": 2, "num_experts_per_tok": 2}
# Title, model type and config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen 3.5": ("qwen3_5_text", DELTA_NET),
    "LFM2": ("lfm2", {**SIZES, "layer_types": ["conv", FULL], "num_hidden_layers": 2, "block_auto_adjust_ff_dim": False}),
    "Granite 4": (
        "granitemoehybrid",
        {**SIZES, "layer_types": [LINEAR, FULL], "num_hidden_layers": 2, "num_local_experts": 0, "shared_intermediate_size": 64,
         "mamba_n_heads": 6, "mamba_d_state": 16},
    ),
    "Nemotron-H": (
        "nemotron_h",
        {**SIZES, "layers_block_type": [LINEAR, FULL, "mlp", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2,
         "ssm_state_size": 16},
    ),
    "Gemma 4": (
        "gemma4_text",
        {**SIZES, "num_hidden_layers": 2, "layer_types": ["sliding_attention", FULL], "global_head_dim": 16, "num_kv_shared_layers": 0,
         "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97},
    ),
    "Qwen3-MoE": ("qwen3_moe", {**MIXTURE, "moe_intermediate_size": 24, "num_experts": 4, "norm_topk_prob": True}),
    "gpt-oss": ("gpt_oss", {**MIXTURE, "num_local_experts": 4}),
}  # fmt: skip

KINDS = {"heads": "heads", "ffn": "FFN", "mixer_heads": "mixer heads", "layer": "layers", "residual": "residual"}
COLUMNS = {
    **KINDS, "experts": "experts", "vocabulary": "vocabulary", "memory": "`--memory`", "recover": "recover", "allocate": "allocate",
    "compress": "compress", "hf": "hf", "hf-uniform": "hf-uniform", "peft-lora": "peft-lora", "gguf": "gguf",
}  # fmt: skip

_TABLE = {"residual": "the norms of a family without a table cannot be rescaled with certainty", "gguf": "has no GGUF form here"}
_DENSE = _TABLE | {"experts": "none"}
GRID: dict[str, dict[str, str]] = {
    "Qwen 3.5": _DENSE,
    "LFM2": _DENSE | {"mixer_heads": "none", "gguf": "yes"},
    "Granite 4": _DENSE | {"mixer_heads": "is none of the mixers whose heads are known here", "gguf": "yes"},
    "Nemotron-H": _DENSE,
    "Gemma 4": _DENSE
    | {
        "mixer_heads": "none",
        "heads": "its layers have heads of several sizes",
        "layer": "holds a part for each layer",
        "compress": "lists sizes of single layers by itself, beside which no layer is stored as two factors; prune its channels",
    },
    "Qwen3-MoE": {"residual": _TABLE["residual"], "ffn": "none", "mixer_heads": "none"},
    "gpt-oss": _TABLE | dict.fromkeys(KINDS, "cannot follow the channels through node 'softmax'"),
}


def table() -> str:
    """Returns the table of the page, with the reasons below it."""
    notes: dict[str, str] = {}

    def cell(family: str, column: str) -> str:
        mark = GRID[family].get(column, "yes")
        return mark if mark in ("yes", "none") else f"no [{notes.setdefault(mark, chr(ord('a') + len(notes)))}]"

    head = f"| family | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}\n"
    rows = "\n".join(f"| {family} | {' | '.join(cell(family, column) for column in COLUMNS)} |" for family in MODELS)
    return f"{head}{rows}\n\n" + "\n".join(f'- {letter}: "... {reason} ..."' for reason, letter in notes.items())
