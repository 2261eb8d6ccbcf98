"""A small random model of any family, with sizes that differ from each other, and the experiments that are made on it.

transformers builds a model of any family from a config. Different numbers of heads, channels and of the stream show the positions of the
matrices and the meaning of their axes; a silent part and a changed norm show which norms serve only that part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from regraft.errors import ModelError
from regraft.models.mixers import shapes_of
from regraft.models.quiet import in_one_line, quiet

HEADS, KV_HEADS, WIDTH, LAYERS, VOCABULARY = 8, 2, 128, 3, 97
OTHER_HEADS, OTHER_KV_HEADS = 6, 3  # head counts of a second model, to test whether single heads can be removed
HEAD_DIM = WIDTH // HEADS  # head size of families that compute it
OWN_HEAD_DIM = 2 * HEAD_DIM  # requested head size, to test whether a family accepts one
FFN, SHARED_FFN, EXPERT_FFN, USUAL_FFN = 88, 104, 72, 4 * WIDTH
# Other names of Llama's num_key_value_heads and intermediate_size in configs.
KV_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "inner_dim")
SHARED_FFN_KEYS = ("shared_intermediate_size",)  # the width of a feed-forward network beside experts
FIRST_LAYERS_KEYS = ("max_window_layers", "num_dense_layers", "first_k_dense_replace")  # what holds for so many of the first layers
LAST_LAYERS_KEYS = ("num_kv_shared_layers",)  # so many of the last layers use keys and values of layers before them
DOUBLING_KEYS = ("use_double_wide_mlp",)  # switches with which some layers have twice the feed-forward width
INDEX_KEYS = ("full_attn_idxs", "mlp_only_layers", "attn_layer_indices")  # lists of the indices of layers
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers")  # the usual names of lists with an entry for each layer
# Values with which a config means the widths that it gives.
LITERAL = {"block_auto_adjust_ff_dim": False}
# Small values of sizes that only mixers have.
_MIXERS: dict[str, int] = {
    "moe_intermediate_size": EXPERT_FFN,
    "moe_shared_expert_intermediate_size": EXPERT_FFN,
    "shared_expert_intermediate_size": EXPERT_FFN,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 24,
    "num_kv_shared_layers": 0,
    "laurel_rank": 20,
    "q_lora_rank": 40,
    "kv_lora_rank": 36,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}
_BESIDE_OTHERS = "its language model lies beside others, so that no small one can be built; prune it by `tower=text`"
# Kinds of layers that a family may know beside those of its default config.
_FURTHER_KINDS = ("full_attention", "conv", "linear_attention")
TOKENS = 12
# A decoder of these sizes has a few hundred thousand parameters; a far larger model has parts with other sizes.
MOST_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class SmallModel:
    """A small model of a family, with what was asked of it.

    Attributes:
        model_type: Model type in the Hugging Face config.
        known: Keys of the config.
        head_dim: Requested head size; None if it was left to the family.
        model: A model of the sizes above, in evaluation mode.
        layers_name: Name of the list of layers.
        layers: The layers.
    """

    model_type: str
    known: frozenset[str]
    head_dim: int | None
    model: PreTrainedModel
    layers_name: str
    layers: nn.ModuleList

    @property
    def kinds(self) -> list[int]:
        """Indices of the first layer of each kind; layers of one kind have the same parameters."""
        first: dict[object, int] = {}
        for index, layer in enumerate(self.layers):
            first.setdefault(shapes_of(layer), index)
        return list(first.values())


def small_model(
    model_type: str, known: frozenset[str], head_dim: int | None, heads: tuple[int, int] = (HEADS, KV_HEADS), width: int = WIDTH
) -> SmallModel | None:
    """Returns a small random model that runs, or None if the family refuses the sizes.

    Args:
        model_type: Model type in the Hugging Face config.
        known: Keys of the config.
        head_dim: Requested head size; None to leave it to the family.
        heads: Numbers of query heads and key-value heads.
        width: Width of the residual stream.

    Raises:
        ModelError: The model has parts other than those of a decoder, or would not be small.
    """
    # A family with a network beside experts has members without experts, if its classes take their number to be 0.
    for experts in (0, _MIXERS["num_local_experts"]) if not known.isdisjoint(SHARED_FFN_KEYS) else (_MIXERS["num_local_experts"],):
        try:
            return _built(model_type, known, head_dim, heads, width, experts)
        except ModelError:
            raise
        except Exception:  # a family may refuse these sizes with any error
            continue
    return None


def why_none(model_type: str, known: frozenset[str]) -> str:
    """Returns the error with which a family refuses a small model, in one line."""
    try:
        _built(model_type, known, None, (HEADS, KV_HEADS), WIDTH, _MIXERS["num_local_experts"])
    except Exception as error:  # whatever the family raises
        return f"{type(error).__name__}: {in_one_line(error)}"
    return ""


def _built(model_type: str, known: frozenset[str], head_dim: int | None, heads: tuple[int, int], width: int, experts: int) -> SmallModel:
    wanted: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads[0],
        **dict.fromkeys(KV_KEYS, heads[1]),
        **dict.fromkeys(FFN_KEYS, FFN),
        "max_position_embeddings": 64,
        "rotary_dim": HEAD_DIM,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    wanted |= {"mlp_only_layers": [0], "attn_layer_indices": [1]}  # where others have experts, or a state space
    wanted |= dict.fromkeys(SHARED_FFN_KEYS, SHARED_FFN) | _MIXERS | LITERAL
    wanted["num_local_experts"] = experts
    if "kv_lora_rank" in known:  # latent attention: every query head has keys and values of its own
        wanted |= dict.fromkeys(KV_KEYS, heads[0])
    values = {key: value for key, value in wanted.items() if key in known} | ({"head_dim": head_dim} if head_dim else {})
    with torch.random.fork_rng(devices=[]), quiet(), torch.no_grad():
        torch.manual_seed(0)
        config_class: Any = CONFIG_MAPPING[model_type]
        config: PreTrainedConfig = config_class(**{**values, **_of_every_kind(config_class, values)})
        _refuse_what_is_large(config)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # so that no value is exactly zero or one
        model(input_ids=_tokens(), use_cache=False)
    return SmallModel(model_type, known, head_dim, model, *_layers(model))


def _of_every_kind(config_class: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config entries for a model with a layer of every kind; empty where all layers of a family have the same parameters."""
    key = config_class.attribute_map.get("layer_types", "layer_types")
    listed: Any = getattr(config_class(), "layer_types", None)
    if listed is None and "layer_types" in config_class().to_dict():
        listed = []  # the default names none, and a model cannot be built without
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        return {}
    found = list(dict.fromkeys(listed))
    kinds = _kinds(config_class, values, key, found) if found else 0
    for further in _FURTHER_KINDS:
        if further not in found and kinds <= 1:  # some defaults name one kind only
            more = _kinds(config_class, values, key, [*found, further])
            found, kinds = ([*found, further], more) if more > kinds else (found, kinds)
    if kinds < 2:
        return {}
    found = [*found[:1] * (LAYERS - len(found)), *found]
    return {key: found, "num_hidden_layers": len(found)}


def _kinds(config_class: Any, values: Mapping[str, Any], key: str, types: list[str]) -> int:
    """Returns how many kinds of layers a model with layers of some types has; 0 where the family refuses them."""
    types = [*types[:1] * (LAYERS - len(types)), *types]
    try:
        model = _without_weights(config_class(**{**values, key: types, "num_hidden_layers": len(types)}))
        return len({shapes_of(layer) for layer in _layers(model)[1]})
    except Exception:  # a family may refuse these types with any error
        return 0


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _refuse_what_is_large(config: PreTrainedConfig) -> None:
    """Inspects a model before it takes memory.

    Raises:
        ModelError: It has far more parameters than a decoder of these sizes; the message names the largest.
    """
    try:
        model = _without_weights(config)
    except Exception:  # its constructor computes with values; the model is inspected after it is built
        if config.get_text_config() is not config:
            raise ModelError(_BESIDE_OTHERS) from None
        return
    _layers(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    if total > MOST_PARAMETERS:
        if config.get_text_config() is not config:
            raise ModelError(_BESIDE_OTHERS)
        largest = max(sizes, key=lambda name: sizes[name])
        raise ModelError(f"even a small model of it has {total / 1e6:,.0f} million parameters, such as '{largest}'")


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    count = model.config.get_text_config().num_hidden_layers
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count}
    if not lists:
        raise ModelError("it has no list of layers")
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return name, lists[name]


def _tokens() -> Tensor:
    return torch.arange(3, 3 + 2 * TOKENS).reshape(2, TOKENS)


def parts_for_layers(small: SmallModel) -> dict[str, int]:
    """Returns the parameters outside the layers whose shape follows the number of layers, each with the axis that does."""
    config_class: Any = type(small.model.config)
    count = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values = {key: value for key, value in small.model.config.to_dict().items() if key in small.known and key != "per_layer_config"}
    longer = {key: [*value[:1], *value] for key, value in values.items() if isinstance(value, list) and len(value) == len(small.layers)}
    try:
        deeper = _without_weights(config_class(**{**values, **longer, count: len(small.layers) + 1}))
    except Exception:  # a family may refuse this number with any error
        return {}
    shapes = {name: parameter.shape for name, parameter in deeper.named_parameters()}
    found: dict[str, int] = {}
    for name, parameter in small.model.named_parameters():
        now, then = parameter.shape, shapes.get(name, parameter.shape)
        if not name.startswith(f"{small.layers_name}.") and now != then:
            found[name] = next(axis for axis, size in enumerate(now) if size != then[axis])
    return found


@torch.no_grad()
def in_order_of_layers(small: SmallModel, name: str, axis: int) -> bool:
    """Returns whether a parameter holds one slice for each layer, one after another, which that layer alone reads."""
    parameter = small.model.get_parameter(name)
    if parameter.shape[axis] % len(small.layers):
        return False
    size = parameter.shape[axis] // len(small.layers)
    before, logits = [_first_input(small, layer) for layer in range(len(small.layers))], logits_of(small)
    for layer in range(len(small.layers)):
        part = parameter.narrow(axis, layer * size, size)
        kept = part.clone()
        part.mul_(2.0)
        reached = torch.equal(_first_input(small, layer), before[layer]) and not torch.equal(logits_of(small), logits)
        later = layer + 1 == len(small.layers) or not torch.equal(_first_input(small, layer + 1), before[layer + 1])
        part.copy_(kept)
        if not (reached and later):
            return False
    return True


def _first_input(small: SmallModel, layer: int) -> Tensor:
    notes: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        notes.append((inputs[0] if inputs else named["hidden_states"]).clone())

    handle = small.layers[layer].register_forward_pre_hook(note, with_kwargs=True)
    try:
        logits_of(small)
    finally:
        handle.remove()
    return notes[-1]


def changes_last_layer(small: SmallModel) -> bool:
    """Returns whether the family's config gives the last layer another type than it is asked for."""
    config_class: Any = type(small.model.config)
    key = config_class.attribute_map.get("layer_types", "layer_types")
    types = small.model.config.to_dict().get(key)
    if not isinstance(types, list) or len(set(types)) < 2:
        return False
    wanted = [*types[1:], next(entry for entry in types if entry != types[-1])]
    values = {name: value for name, value in small.model.config.to_dict().items() if name in small.known and name != "per_layer_config"}
    try:
        with quiet():
            return config_class(**{**values, key: list(wanted)}).to_dict()[key] != wanted
    except Exception:  # a family may refuse these types with any error
        return True


@torch.no_grad()
def logits_of(small: SmallModel) -> Tensor:
    """Returns the logits of the same tokens every time, float32 (2, 12, vocabulary)."""
    return small.model(input_ids=_tokens(), use_cache=False).logits


@torch.no_grad()
def is_causal(small: SmallModel) -> bool:
    """Returns whether another last token changes the predictions at that token, and at no token before it."""
    changed = _tokens()
    changed[:, -1] = 90
    first, second = logits_of(small), small.model(input_ids=changed, use_cache=False).logits
    return torch.allclose(first[:, :-1], second[:, :-1], atol=1e-5) and not torch.equal(first, second)


def seen_at(small: SmallModel, layer: int, name: str) -> tuple[tuple[Any, ...], Any]:
    """Returns the positional inputs and the output of a module of a layer; an empty name is the layer itself."""
    notes: list[tuple[tuple[Any, ...], Any]] = []
    note: Callable[..., None] = lambda _module, inputs, output: notes.append((inputs, output))  # noqa: E731
    handle = small.layers[layer].get_submodule(name).register_forward_hook(note)
    try:
        logits_of(small)
    finally:
        handle.remove()
    return notes[-1]


def called_last(small: SmallModel, names: Collection[str]) -> str:
    """Returns the module of the model, out of some, that is called last; empty if none is called."""
    called: list[str] = []
    handles = [small.model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name)) for name in names]
    try:
        logits_of(small)
    finally:
        for handle in handles:
            handle.remove()
    return called[-1] if called else ""


@contextmanager
def silent(small: SmallModel, layer: int, matrix: str) -> Iterator[None]:
    """Sets the output of a matrix of a layer to zero inside the block."""
    parameters = list(small.layers[layer].get_submodule(matrix).parameters(recurse=False))
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def part_served(small: SmallModel, layer: int, norm: str, writers: Mapping[str, str]) -> str:
    """Returns the only part that a norm serves: changing the norm has no effect while that part is silent.

    Args:
        small: The model.
        layer: Index of a layer.
        norm: Name of the norm within the layer.
        writers: Part to the matrix with which it writes the stream.

    Returns:
        A key of ``writers``, or an empty string if the norm serves none or several.
    """
    weight: Any = small.layers[layer].get_submodule(norm).weight
    found: list[str] = []
    for part, matrix in writers.items():
        with silent(small, layer, matrix):
            before, kept = logits_of(small), weight.clone()
            weight.add_(torch.linspace(-1.0, 1.0, WIDTH))
            same = torch.equal(before, logits_of(small))
            weight.copy_(kept)
        if same:
            found.append(part)
    return found[0] if len(found) == 1 else ""


@torch.no_grad()
def subtracts_mean(small: SmallModel, layer: int, norm: str) -> bool:
    """Returns whether a norm subtracts the mean of the channels, as layer norms do."""
    rows = torch.linspace(-1.0, 2.0, WIDTH).square()[None]
    module = small.layers[layer].get_submodule(norm)
    return torch.allclose(module(rows), module(rows + 1.0), atol=1e-4)
