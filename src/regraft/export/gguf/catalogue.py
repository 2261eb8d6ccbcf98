"""The GGUF architectures, the models that each can hold, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regraft.errors import InputError
from regraft.export.gguf.fused import gpt2, phi3
from regraft.export.gguf.gemma4 import gemma4
from regraft.export.gguf.gemma4 import refusal as gemma4_refusal
from regraft.export.gguf.hybrid import granite, granite_refusal, lfm2, lfm2_refusal
from regraft.export.gguf.llama_like import (
    ATTENTION,
    FOUR_NORMS,
    GLM4_NORMS,
    POST_NORMS,
    TWO_NORMS,
    Gated,
    cohere2,
    gemma2,
    gemma3,
    lay_out,
    multipliers,
    olmo,
    step35,
)
from regraft.export.gguf.mixture import qwen3moe
from regraft.export.gguf.mixture import refusal as mixture_refusal
from regraft.export.gguf.rotary import refusal as rotary_refusal
from regraft.export.gguf.source import Layout, Source


@dataclass(frozen=True)
class Architecture:
    """One architecture of the runtime, with the models that it can hold.

    Attributes:
        name: Name of the architecture in the file.
        families: Model types that it computes.
        uneven: Sizes that may differ from layer to layer, in words; empty for none.
        refusal: Returns why it cannot hold a model of these families; an empty text where it can.
        lay_out: Returns the contents of the file.
        lost: Abilities that the model loses in it, or costs that it has.
        asked_for: Whether it is used only if the user names it.
    """

    name: str
    families: tuple[str, ...]
    uneven: str
    refusal: Callable[[Source], str]
    lay_out: Callable[[Source], Layout]
    lost: str = "nothing"
    asked_for: bool = False


def _uneven(source: Source) -> str:
    """Returns why an architecture of equal layers cannot hold a model."""
    return "" if source.is_uniform else "its layers must be alike"


def _silu(source: Source) -> str:
    values = source.config.to_dict()
    activation = values.get("hidden_act") or values.get("hidden_activation")
    return "" if activation in ("silu", "swish") else f"it computes silu, the model {activation}"


def _both(*rules: Callable[[Source], str]) -> Callable[[Source], str]:
    return lambda source: next((reason for rule in rules if (reason := rule(source))), "")


def _gated(kind: Gated, families: str, refusal: Callable[[Source], str], uneven: str = "", **more: Any) -> Architecture:
    return Architecture(kind.name, tuple(families.split()), uneven, refusal, lambda source: lay_out(kind, source), **more)


def _rotary(*, divisors: bool = False) -> Callable[[Source], str]:
    """Returns the rule that an architecture has a form for the rotary embedding of every kind of layer."""

    def rule(source: Source) -> str:
        parameters: Any = source.config.rope_parameters
        kinds = parameters.values() if "rope_type" not in parameters and "full_attention" in parameters else (parameters,)
        return next((reason for kind in kinds if (reason := rotary_refusal(kind, divisors=divisors))), "")

    return rule


def _as_wide(source: Source) -> str:
    wide = source.sizes[0].query_heads * source.head_dim == source.width
    return "" if wide else "its heads together must be as wide as the stream"


def _no_bias(source: Source) -> str:
    biased = [name for name in source.shapes if name.endswith("_proj.bias")]
    return "it has no biases in attention and feed-forward network" if biased else ""


def _pattern(source: Source, full_every: int) -> str:
    """Returns why the windows of a model are not where the runtime puts them."""
    kinds = [index % full_every < full_every - 1 for index in range(len(source.sizes))]
    found = [kind == "sliding_attention" for kind in source.config.layer_types]
    return "" if kinds == found else f"every layer but each {full_every}th must have a sliding window: layers were removed, or are others"


def _gemma2(source: Source) -> str:
    return (
        _tied(source)
        or _no_bias(source)
        or _rotary()(source)
        or _pattern(source, 2)
        or ("" if _gelu(source) else f"it computes gelu, the model {source.config.hidden_activation}")
    )


def _gemma3(source: Source) -> str:
    values = source.config.to_dict()
    if values.get("final_logit_softcapping"):
        return "it has no cap on logits"
    if values.get("use_bidirectional_attention"):
        return "it looks back only, the model both ways"
    local = source.config.rope_parameters["sliding_attention"].get("rope_type", "default")
    if local != "default":
        return f"it does not scale the rotation within windows, the model does ({local})"
    return (
        _no_bias(source)
        or _rotary()(source)
        or _pattern(source, 6)
        or ("" if _gelu(source) else f"it computes gelu, the model {source.config.hidden_activation}")
    )


def _smollm3(source: Source) -> str:
    rotated = [(index + 1) % 4 > 0 for index in range(len(source.sizes))]
    same = [bool(there) for there in source.config.no_rope_layers] == rotated
    return "" if same else "every layer but each 4th must have a rotation: layers were removed, or are others"


def _olmo(source: Source) -> str:
    parameters: Any = source.config.rope_parameters
    kinds = source.config.to_dict().get("layer_types") or []
    if "sliding_attention" not in kinds:
        return ""
    local, whole = (parameters.get(kind, parameters) for kind in ("sliding_attention", "full_attention"))
    if local.get("rope_type", "default") != "default" or local["rope_theta"] != whole["rope_theta"]:
        return "it does not scale the rotation within windows, and has one base for all layers"
    return _pattern(source, 4)


def _gelu(source: Source) -> bool:
    return source.config.hidden_activation == "gelu_pytorch_tanh"


def _gpt2(source: Source) -> str:
    config = source.config
    if _as_wide(source):
        return _as_wide(source)
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "it scales attention by the head size alone"
    if config.to_dict().get("norm_width"):
        return "its norms count the channels that are there"
    return "" if config.activation_function == "gelu_new" else f"it computes gelu_new, the model {config.activation_function}"


def _tied(source: Source) -> str:
    return "" if source.tied else "its output projection must be the token embedding"


def _whole(source: Source) -> str:
    return (
        "" if all(size.query_heads and size.ffn for size in source.sizes) else "it takes no layer without attention or feed-forward network"
    )


def _one_width(source: Source) -> str:
    return "" if len({size.ffn for size in source.sizes}) == 1 else "the feed-forward width must be the same everywhere"


PER_LAYER = "query heads, key-value heads, feed-forward width"
WINDOWLESS = "a sliding window: the context ends where it does"
ZEROS = f"{WINDOWLESS}; zeros stand for the attention of layer 0, or a feed-forward network alone, where they were removed"

ARCHITECTURES: tuple[Architecture, ...] = (
    _gated(Gated("llama", TWO_NORMS, permuted=True), "llama mistral", _both(_uneven, _silu, _rotary(divisors=True)), lost=WINDOWLESS),
    _gated(Gated("qwen2", TWO_NORMS), "qwen2", _both(_uneven, _silu, _as_wide, _rotary()), lost=WINDOWLESS),
    _gated(Gated("qwen3", TWO_NORMS), "qwen3", _both(_uneven, _silu, _no_bias, _rotary()), lost=WINDOWLESS),
    _gated(Gated("gemma2", FOUR_NORMS, window=True, extra=gemma2), "gemma2", _both(_uneven, _gemma2)),
    _gated(Gated("gemma3", FOUR_NORMS, window=True, extra=gemma3), "gemma3_text", _both(_uneven, _gemma3)),
    Architecture("qwen3moe", ("qwen3_moe",), "", _both(_silu, _no_bias, _rotary(), mixture_refusal), qwen3moe, lost=WINDOWLESS),
    Architecture("phi3", ("phi3",), "", _both(_uneven, _silu), phi3),
    Architecture("gpt2", ("gpt2",), "", _both(_uneven, _gpt2), gpt2),
    _gated(Gated("smollm3", TWO_NORMS, permuted=True), "smollm3", _both(_uneven, _silu, _no_bias, _rotary(), _smollm3), lost=WINDOWLESS),
    _gated(Gated("olmo2", POST_NORMS, window=True, extra=olmo), "olmo2 olmo3", _both(_uneven, _silu, _no_bias, _as_wide, _rotary(), _olmo)),
    _gated(Gated("granite", TWO_NORMS, permuted=True, extra=multipliers), "granite", _both(_uneven, _silu, _no_bias, _rotary())),
    _gated(
        Gated("cohere2", {"input_layernorm": "attn_norm"}, window=True, extra=cohere2, epsilon="layer_norm_eps"),
        "cohere2",
        _both(_uneven, _silu, _tied, _as_wide, _no_bias, _rotary(), lambda source: _pattern(source, 4)),
    ),
    _gated(
        Gated("glm4", GLM4_NORMS, projections={**ATTENTION, "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}),
        "glm4",
        _both(_uneven, _silu, _rotary()),
    ),
    _gated(Gated("ernie4_5", TWO_NORMS), "ernie4_5", _both(_uneven, _silu, _no_bias, _rotary())),
    _gated(
        Gated(
            "hunyuan-dense", TWO_NORMS, head_norms={"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"}
        ),
        "hunyuan_v1_dense",
        _both(_uneven, _silu, _no_bias, _rotary()),
    ),
    _gated(
        Gated("seed_oss", {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}),
        "seed_oss",
        _both(_uneven, _silu, _rotary()),
    ),
    Architecture("gemma4", ("gemma4_text",), "feed-forward width", gemma4_refusal, gemma4),
    Architecture("lfm2", ("lfm2",), "", _both(_rotary(), lfm2_refusal), lfm2),
    Architecture("granitehybrid", ("granitemoehybrid",), "", _both(_silu, _rotary(), granite_refusal), granite),
    _gated(
        Gated("deci", TWO_NORMS, permuted=True, per_layer=True),
        "llama mistral qwen2",
        _both(_silu, _rotary(divisors=True)),
        f"{PER_LAYER}; attention or feed-forward network removed",
        lost=ZEROS,
    ),
    _gated(
        Gated("openelm", TWO_NORMS, per_layer=True, fused=True),
        "qwen3",
        _both(_silu, _tied, _whole, _no_bias, _rotary()),
        PER_LAYER,
        lost=WINDOWLESS,
    ),
    _gated(
        Gated("step35", TWO_NORMS, per_layer=True, window=True, extra=step35),
        "qwen3",
        _both(_silu, _whole, _one_width, _no_bias, _rotary()),
        "query heads, key-value heads",
        lost="its name: the file says that it is of another family",
        asked_for=True,
    ),
)


def architectures_for(family: str) -> tuple[Architecture, ...]:
    """Returns the architectures that compute a family, the plainest first."""
    return tuple(entry for entry in ARCHITECTURES if family in entry.families)


def choose(source: Source, wanted: str = "") -> Architecture:
    """Returns the first architecture that holds a model.

    Args:
        source: The model.
        wanted: Name of the architecture to use; empty for any that may be used without being named.

    Raises:
        InputError: None holds it; the message says why, and names a format that does.
    """
    known = architectures_for(source.kind)
    if not known:
        families = sorted({family for entry in ARCHITECTURES for family in entry.families})
        raise InputError(f"family '{source.kind}' has no GGUF form here (known: {', '.join(families)}); export with `to=hf`")
    if wanted and wanted not in [entry.name for entry in known]:
        raise InputError(f"GGUF architecture '{wanted}' does not compute family '{source.kind}'; choose {', '.join(e.name for e in known)}")
    reasons: list[str] = []
    for entry in known:
        if wanted not in ("", entry.name):
            continue
        reason = entry.refusal(source)
        if not reason and (wanted or not entry.asked_for):
            return entry
        reasons.append(f"{entry.name}: {reason or 'taken only when asked for by name'}")
    further = "" if source.is_uniform or source.family.mixed else ", or with `to=hf-uniform` and then that folder with `to=gguf`"
    raise InputError(f"no GGUF architecture holds this {source.kind} ({'; '.join(reasons)}); export with `to=hf`{further}")
