"""A model of given sizes from given tensors: decides its class and config, and makes what loading its saved folder gives.

A model whose layers are equal becomes the stock class of its family. Where that class refuses the head count, a stand-in of the
same mathematics takes its place (``stand_in`` in ``architectures/*.toml``). Everything else becomes our own class, which takes
each layer's sizes from ``per_layer_config``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from regraft.errors import PlanError
from regraft.models.family import Family, family_of
from regraft.models.quiet import quiet
from regraft.models.uneven import register
from regraft.models.view import LayerSizes, ModelView

# Lists in a config that have one entry for each layer.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
# Written by transformers on saving, or ours: never carried from one config to the next.
DERIVED = ("per_layer_config", "auto_map", "architectures", "model_type", "transformers_version", "_name_or_path")


def build(
    like: PreTrainedModel,
    sizes: Sequence[LayerSizes],
    state: Mapping[str, Tensor],
    *,
    layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """Returns a new model of the given sizes with the given tensors.

    The result is of the class that loading its saved folder gives. It has the dtype, device, attention kernel, generation config
    and training mode of ``like``, and fresh buffers. It takes the tensors of ``state`` as they are: those that are also in
    ``like`` are shared with it.

    Args:
        like: The model that the tensors come from.
        sizes: Of each layer, in order; zero query heads or a zero feed-forward width for a part that is removed.
        state: Parameter name to tensor, layers numbered as in ``sizes``. Tensors of removed parts are ignored.
        layers: Which layer of ``like`` each entry of ``sizes`` was; all of them in order by default.

    Raises:
        PlanError: The sizes do not fit each other or the tensors.
    """
    config = config_for(like.config, sizes, layers=layers, hidden_size=_hidden_size(like, state))
    register()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    wanted = {name: tensor for name, tensor in state.items() if not _is_removed(name, sizes, family_of(like.config.model_type))}
    with quiet():
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=wanted,
            dtype=like.dtype,
            device_map={"": like.device} if like.device.type != "cpu" else None,
            attn_implementation=like.config._attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _refuse_misfits(report)
    model.generation_config = copy.deepcopy(like.generation_config)
    model.config.name_or_path = model.name_or_path = like.name_or_path
    return model.train(like.training)


def config_for(
    base: PreTrainedConfig,
    sizes: Sequence[LayerSizes],
    *,
    layers: Sequence[int] | None = None,
    hidden_size: int | None = None,
) -> PreTrainedConfig:
    """Returns the config of a model with the given sizes; its type says which class the model becomes.

    Args:
        base: Config of the model that is being changed.
        sizes: Of each layer that stays, in order.
        layers: Which layer of ``base`` each entry of ``sizes`` was; all of them in order by default.
        hidden_size: Width of the residual stream; that of ``base`` by default.

    Raises:
        PlanError: The sizes do not fit each other or ``base``.
    """
    kept = _kept_layers(base, sizes, layers)
    _refuse_impossible(sizes)
    values = {key: value for key, value in base.to_dict().items() if key not in DERIVED}
    values |= {"num_hidden_layers": len(sizes), "head_dim": sizes[0].head_dim}
    if hidden_size is not None:
        values["hidden_size"] = hidden_size
    values |= {key: [values[key][index] for index in kept] for key in PER_LAYER_LISTS if values.get(key)}
    if "max_window_layers" in values:
        values["max_window_layers"] = sum(index < values["max_window_layers"] for index in kept)
    common = _common(sizes, values)
    values |= common
    per_layer = _overrides(sizes, common)
    family = family_of(base.model_type)
    if not per_layer:
        for candidate in (family.model_type, family.stand_in):
            config = _stock_config(values, family.model_type, candidate) if candidate else None
            if config is not None:
                return config
    register()
    own_class: Any = CONFIG_MAPPING[f"regraft_{family.model_type}"]
    return own_class(**values, per_layer_config=per_layer or None)


def declared_sizes(config: PreTrainedConfig) -> tuple[LayerSizes, ...]:
    """Returns the sizes of each layer that a config asks for; zeros where a part is skipped."""
    found: list[LayerSizes] = []
    for index in range(config.num_hidden_layers):
        layer: Any = config.per_layer_config[index]
        skip = getattr(layer, "skip", None) or ()
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        heads, groups = layer.num_attention_heads, getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        absent = "attention" in skip
        found.append(
            LayerSizes(
                query_heads=0 if absent else heads,
                kv_heads=0 if absent else groups,
                head_dim=head_dim,
                ffn=0 if "mlp" in skip else layer.intermediate_size,
            )
        )
    return tuple(found)


def conform(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model itself when its config tells its sizes, else one built from its weights.

    Weights that were cut in place leave the config, and attributes such as the number of heads, behind.
    """
    view = ModelView(model)
    sizes = tuple(view.sizes(index) for index in range(len(view.layers)))
    if len(sizes) == model.config.num_hidden_layers and sizes == declared_sizes(model.config):
        return model
    return build(model, sizes, model.state_dict())


def _kept_layers(base: PreTrainedConfig, sizes: Sequence[LayerSizes], layers: Sequence[int] | None) -> tuple[int, ...]:
    before = base.num_hidden_layers
    kept = tuple(range(before)) if layers is None else tuple(layers)
    if len(kept) != len(sizes) or not kept or not all(0 <= index < before for index in kept):
        raise PlanError(
            f"sizes of {len(sizes)} layers do not fit layers {list(kept)} of a model of {before}; give one size for each layer that stays"
        )
    return kept


def _refuse_impossible(sizes: Sequence[LayerSizes]) -> None:
    for index, layer in enumerate(sizes):
        if layer.head_dim != sizes[0].head_dim:
            raise PlanError(
                f"layer {index} has heads of {layer.head_dim} channels, layer 0 of {sizes[0].head_dim}; "
                "heads are kept or removed whole: use one head size"
            )
        if (layer.query_heads == 0) != (layer.kv_heads == 0) or (layer.kv_heads and layer.query_heads % layer.kv_heads):
            raise PlanError(
                f"layer {index} has {layer.query_heads} query heads for {layer.kv_heads} key-value heads; "
                "the first must be a multiple of the second"
            )


def _common(sizes: Sequence[LayerSizes], values: Mapping[str, Any]) -> dict[str, int]:
    """Returns the widths that most layers share, so that the list of exceptions is short; ties go to the earliest layer."""
    heads = Counter((layer.query_heads, layer.kv_heads) for layer in sizes if layer.query_heads)
    widths = Counter(layer.ffn for layer in sizes if layer.ffn)
    queries, groups = heads.most_common(1)[0][0] if heads else (values["num_attention_heads"], values["num_key_value_heads"])
    return {
        "num_attention_heads": queries,
        "num_key_value_heads": groups,
        "intermediate_size": widths.most_common(1)[0][0] if widths else values["intermediate_size"],
    }


def _overrides(sizes: Sequence[LayerSizes], common: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(sizes):
        own = {
            "num_attention_heads": layer.query_heads,
            "num_key_value_heads": layer.kv_heads,
            "intermediate_size": layer.ffn,
        }
        entry: dict[str, Any] = {key: value for key, value in own.items() if value and value != common[key]}
        skip = [part for part, width in (("attention", layer.query_heads), ("mlp", layer.ffn)) if not width]
        if skip:
            entry["skip"] = skip
        if entry:
            found[str(index)] = entry
    return found


def _stock_config(values: Mapping[str, Any], family: str, candidate: str) -> PreTrainedConfig | None:
    """Returns a config of a stock class, or None where that class cannot express the values."""
    config_class = CONFIG_MAPPING[candidate]
    if candidate != family:
        own = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[family])}
        known = {field.name for field in dataclasses.fields(config_class)}
        lost = {name for name in own if name not in known}
        if any(values.get(name, own[name]) != own[name] for name in lost):
            return None  # such as a bias that the stand-in has not got
        values = {name: value for name, value in values.items() if name not in lost}
        # What only the stand-in has, such as Mistral's sliding window, is switched off.
        values |= dict.fromkeys(sorted(known - set(own)))
    try:
        return config_class(**values)
    except (StrictDataclassError, ValueError):
        return None


def _hidden_size(like: PreTrainedModel, state: Mapping[str, Tensor]) -> int:
    embedding = state.get(f"{family_of(like.config.model_type).embedding}.weight")
    return like.config.hidden_size if embedding is None else embedding.shape[1]


def _is_removed(name: str, sizes: Sequence[LayerSizes], family: Family) -> bool:
    """Returns whether a tensor belongs to a part that its layer has not got any more, norms included."""
    prefix, _, rest = name.partition(f"{family.layers}.")
    if prefix or not rest:
        return False
    index, _, inside = rest.partition(".")
    layer = sizes[int(index)]
    parts = (family.attention, *family.attention_norms) if not layer.query_heads else ()
    parts += (family.mlp, *family.mlp_norms) if not layer.ffn else ()
    return any(inside.startswith(f"{part}.") for part in parts)


def _refuse_misfits(report: Mapping[str, Any]) -> None:
    """Refuses a model that was not made whole from the tensors given.

    Raises:
        PlanError: A tensor is missing, superfluous or of another shape; the message names the first of each.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for what, names in (("lack", missing), ("also hold", unexpected), ("have another shape for", mismatched)):
        if names:
            raise PlanError(f"the tensors {what} '{names[0]}' ({len(names)} in all); build the model from sizes that fit its weights")
