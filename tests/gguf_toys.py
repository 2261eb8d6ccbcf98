"""Small random models with tokenizers that GGUF holds, of every family that has an architecture there."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from regraft.models.build import build
from regraft.models.load import Loaded
from regraft.models.view import LayerSizes, ModelView, fingerprint

VOCABULARY = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PIECES = ("th", "he", "in", "the", "ing", "an", "er", "on", "re", "or", "and", "is", "it", "at", "en", "ed")


def byte_level_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with GPT-2's rule, some merges and three special tokens."""
    ids = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>"])}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        ids[symbol] = len(ids)
    merges = [(piece[:-1], piece[-1]) if len(piece) == 3 and piece[:-1] in PIECES else (piece[0], piece[1:]) for piece in PIECES]
    for piece in PIECES:
        ids[piece] = len(ids)
    core = Tokenizer(models.BPE(vocab=ids, merges=[merge for merge in merges if all(part in ids for part in merge)]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template, model_max_length=10**6
    )


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a BPE tokenizer of the SentencePiece kind: byte tokens, and a block for spaces."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,"]
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "th", "he", "an"]
    merges = [("t", "h"), ("h", "e"), ("a", "n")]
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=10**6)


def toy(model_type: str, scale: float = 0.15, **config: Any) -> PreTrainedModel:
    """Returns a random model whose biases and norms are not trivial."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(model_type)
    wanted = {key: value for key, value in (SIZES | config).items() if key in config or hasattr(known, key)}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **wanted)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            plain = "norm" in name or ".ln_" in name
            center = 0.0 if model_type.startswith(("gemma2", "gemma3")) else 1.0
            parameter.copy_(center + 0.1 * noise if plain and not name.endswith("bias") else scale * noise)
        for number, (name, buffer) in enumerate(model.named_buffers()):
            if name.endswith("layer_scalar"):  # Gemma 4's factor on what a layer makes
                buffer.fill_(0.8 + 0.05 * number)
    return model


def uneven(model: PreTrainedModel, **changes: tuple[int, int, int]) -> PreTrainedModel:
    """Returns a model with some layers made smaller: ``layer1=(query heads, key-value heads, width)``; the first channels stay."""
    view = ModelView(model)
    state = dict(model.state_dict())
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    for key, (query_heads, kv_heads, ffn) in changes.items():
        index = int(key.removeprefix("layer"))
        rows = {"q_proj": query_heads * view.head_dim, "k_proj": kv_heads * view.head_dim, "v_proj": kv_heads * view.head_dim}
        for name in [name for name in state if name.startswith(f"{view.layer_name(index)}.")]:
            module = name.split(".")[-2]
            if module in rows:
                state[name] = state[name][: rows[module]]
            elif module in ("gate_proj", "up_proj"):
                state[name] = state[name][:ffn]
            elif module == "down_proj" and name.endswith("weight"):
                state[name] = state[name][:, :ffn]
            elif module == "o_proj" and name.endswith("weight"):
                state[name] = state[name][:, : query_heads * view.head_dim]
        sizes[index] = LayerSizes(query_heads, kv_heads, view.head_dim, ffn)
    return build(model, sizes, state)


def as_loaded(model: PreTrainedModel, tokenizer: Any = None) -> Loaded:
    return Loaded(model, tokenizer or byte_level_tokenizer(), "toy", fingerprint(model), None)
