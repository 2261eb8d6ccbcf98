"""What works for families of 2026: the conformance test measures it and asserts it, and ``docs/families.md`` is written from it.

A mark is ``yes``, or the words with which the refusal has to explain itself.
"""

from __future__ import annotations

from collections.abc import Iterable
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

# The same, of which what is cut is looked at, and what becomes of a pruned model.
_TWO = {**SIZES, "num_hidden_layers": 2}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-Next": ("qwen3_next", {**DELTA_NET, "mlp_only_layers": [0, 1]}),
    "Qwen3-Next, with experts": (
        "qwen3_next",
        {**DELTA_NET, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "OLMo-Hybrid": ("olmo_hybrid", DELTA_NET),
    "Gemma 3n": (
        "gemma3n_text",
        {**SIZES, "num_hidden_layers": 6, "layer_types": ["sliding_attention", FULL] * 3, "num_kv_shared_layers": 2, "laurel_rank": 8,
         "activation_sparsity_pattern": [0.9] + [0.0] * 5, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97},
    ),
    "LFM3": ("lfm3", {**_TWO, "layer_types": ["conv", FULL]}),
    "LFM2-MoE": (
        "lfm2_moe",
        {**_TWO, "layer_types": ["conv", FULL], "num_dense_layers": 1, "num_experts": 4, "moe_intermediate_size": 24,
         "num_experts_per_tok": 2},
    ),
    "Falcon-H1": (
        "falcon_h1", {**_TWO, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2},
    ),
    "Bamba": ("bamba", {**_TWO, "attn_layer_indices": [1], "mamba_n_heads": 6, "mamba_d_state": 16}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {**_TWO, "num_key_value_heads": 6, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "moe_intermediate_size": 24, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
         "v_head_dim": 8},
    ),
    "Granite SWA": ("granite_swa", {**_TWO, "layer_types": ["sliding_attention", FULL]}),
    "SmolLM3": ("smollm3", {**_TWO, "no_rope_layers": [1, 1]}),
    "Ministral 3": ("ministral3", {**_TWO, "rope_parameters": None}),
    "Arcee": ("arcee", _TWO),
    "Hunyuan, dense": ("hunyuan_v1_dense", _TWO),
    "ERNIE 4.5": ("ernie4_5", _TWO),
    "Apertus": ("apertus", _TWO),
    "Mixtral": ("mixtral", {**MIXTURE, "num_local_experts": 4}),
    "OLMoE": ("olmoe", {**MIXTURE, "num_experts": 4}),
    "Granite MoE": ("granitemoe", {**MIXTURE, "num_local_experts": 4}),
}  # fmt: skip

KINDS = {
    "heads": "heads", "query_heads": "query heads", "ffn": "FFN", "mixer_heads": "mixer heads", "layer": "layers", "residual": "residual",
}  # fmt: skip
CUT = {**KINDS, "experts": "experts", "vocabulary": "vocabulary"}
COLUMNS = {
    **CUT, "memory": "`--memory`", "recover": "recover", "allocate": "allocate",
    "compress": "compress", "hf": "hf", "hf-uniform": "hf-uniform", "peft-lora": "peft-lora", "gguf": "gguf",
}  # fmt: skip

# What is done with models of other families: pruned layer by layer, and the result recovered and exported.
PRUNED = {"memory": "`--memory`", "recover": "recover", "hf": "hf", "peft-lora": "peft-lora", "gguf": "gguf"}

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
        "gguf": "yes",
        "heads": "its layers have heads of several sizes",
        "compress": "lists sizes of single layers by itself, beside which no layer is stored as two factors; prune its channels",
    },
    "Qwen3-MoE": {"residual": _TABLE["residual"], "ffn": "none", "mixer_heads": "none"},
    "gpt-oss": _TABLE | {"ffn": "none", "mixer_heads": "none"},
}
_PLAIN = {"gguf": _TABLE["gguf"], "residual": _TABLE["residual"], "mixer_heads": "none", "experts": "none"}
_NORMED = dict.fromkeys(("heads", "query_heads"), "computes one number from all channels, so that removing one changes the others")
_EXPERTS = {"gguf": _TABLE["gguf"], "residual": _TABLE["residual"], "mixer_heads": "none", "ffn": "none"}
GRID |= {
    "Qwen3-Next": _DENSE,
    "Qwen3-Next, with experts": _TABLE | {"ffn": "none"},
    "OLMo-Hybrid": _DENSE | _NORMED,
    "DeepSeek-V3": {
        **_TABLE,
        "mixer_heads": "none",
        **dict.fromkeys(("heads", "query_heads"), "it has no attention that writes the stream through one matrix"),
        "experts": "has an entry for each expert that is no parameter",
    },
    "Gemma 3n": _PLAIN | {"heads": "lets layers use the keys and values of others"},
    "LFM3": _PLAIN,
    "LFM2-MoE": _TABLE | {"mixer_heads": "none"},
    "Falcon-H1": _PLAIN | {"mixer_heads": "yes"},
    "Bamba": _PLAIN | {"mixer_heads": "is none of the mixers whose heads are known here"},
    **dict.fromkeys(("Granite SWA", "Ministral 3", "Arcee", "Apertus"), _PLAIN),
    **dict.fromkeys(("SmolLM3", "Hunyuan, dense", "ERNIE 4.5"), _PLAIN | {"gguf": "yes"}),
    "Mixtral": _EXPERTS,
    "OLMoE": _EXPERTS | _NORMED,
    "Granite MoE": _EXPERTS,
}


def table() -> str:
    """Returns the tables of the page, with the reasons below them."""
    notes: dict[str, str] = {}

    def cell(family: str, column: str) -> str:
        mark = GRID[family].get(column, "yes")
        return mark if mark in ("yes", "none") else f"no [{notes.setdefault(mark, chr(ord('a') + len(notes)))}]"

    def rows(families: Iterable[str], columns: dict[str, str]) -> str:
        head = f"| family | {' | '.join(columns.values())} |\n|{'---|' * (len(columns) + 1)}\n"
        return head + "\n".join(f"| {family} | {' | '.join(cell(family, column) for column in columns)} |" for family in families)

    others = (
        "In others the last columns say what becomes of the model that `--memory` leaves, which holds the same tensors, bit for bit, as "
        "what is cut in memory:"
    )
    tables = f"{rows(MODELS, COLUMNS)}\n\n{others}\n\n{rows(OTHERS, CUT | PRUNED)}"
    return f"{tables}\n\n" + "\n".join(f'- {letter}: "... {reason} ..."' for reason, letter in notes.items())
