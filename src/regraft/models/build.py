"""Construction of a model from sizes and tensors: the choice of its class and config, and the same model as from its saved folder.

A model with equal layers becomes the stock class of its family. If that class refuses the head count, a stand-in class with the same
mathematics is used (``stand_in`` in ``architectures/*.toml``). Any other model becomes our own class, which takes each layer's sizes from
``per_layer_config``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from regraft.compat import CONVERSIONS, attention_kernel
from regraft.errors import PlanError
from regraft.models.family import Family, Keys, family_of, matches
from regraft.models.quiet import in_one_line, quiet
from regraft.models.uneven import own_config
from regraft.models.uneven.configuration_regraft import LAYOUT
from regraft.models.view import LayerSizes, ModelView

# Config entries that are never copied to another config: our own, and those that transformers writes on saving.
OURS = ("layout", "alibi_of", "alibi_heads", "norm_width", "factored", "factor_layout")  # known to our own configs only
INTERVALS = ("full_attention_interval",)  # numbers that lists of layers were once made from, and that nothing reads beside these
# Sizes of experts, which our configs have for single layers too.
SIZES_BESIDE = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size", "intermediate_size")
DERIVED = ("per_layer_config", "auto_map", "architectures", "model_type", "transformers_version", "_name_or_path")


def build(
    like: PreTrainedModel,
    sizes: Sequence[LayerSizes],
    state: Mapping[str, Tensor],
    *,
    layers: Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Returns a new model with the given sizes and tensors.

    The result has the class that its saved folder loads as. It has the dtype, device, attention kernel, generation config and training mode
    of ``like``, and new buffers. It uses the tensors of ``state`` without copying, so that tensors of ``like`` are shared.

    Args:
        like: The model that the tensors come from.
        sizes: Sizes of each layer, in order; zero query heads or a zero feed-forward width for a removed part.
        state: Parameter name to tensor, with layers numbered as in ``sizes``. Tensors of removed parts are ignored.
        layers: Index in ``like`` of each layer in ``sizes``; None for all layers in order.
        changes: Further config entries, such as the epsilon of rescaled norms, or the width that layer norms still count.

    Raises:
        PlanError: The sizes do not fit each other or the tensors.
    """
    config = config_for(like.config, sizes, layers=layers, hidden_size=_hidden_size(like, state), changes=changes)
    parts = family_of(like.config.model_type).parts(like.config)
    wanted = {name: tensor for name, tensor in state.items() if not _is_removed(name, sizes, like, parts)}
    return load_state(like, config, wanted)


def load_state(like: PreTrainedModel, config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Returns a new model of a config with the given tensors, which are not copied; in everything else it is as another.

    Args:
        like: The model whose dtype, device, attention kernel, generation config, training mode and names on disk it gets.
        config: Its config, which decides its class.
        state: Parameter name to tensor.

    Raises:
        PlanError: The config does not fit the tensors, or the class refuses it.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=like.dtype,
                device_map={"": like.device} if like.device.type != "cpu" else None,
                attn_implementation=attention_kernel(like.config),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ValueError, TypeError, AttributeError, AssertionError) as error:  # the family's code refuses these sizes
        raise PlanError(f"no {model_class.__name__} of these sizes can be built: {in_one_line(error)}; choose other targets") from error
    refuse_misfits(report)
    stored_alike(model, like)
    model.generation_config = copy.deepcopy(like.generation_config)
    model.config.name_or_path = model.name_or_path = like.name_or_path
    return model.train(like.training)


def stored_alike(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """Makes a model be saved under the names of another's checkpoint, where both have one class: see :mod:`regraft.models.stored`."""
    if type(model) is type(like):
        model.__dict__.pop(CONVERSIONS, None)
        if CONVERSIONS in vars(like):
            model.__dict__[CONVERSIONS] = vars(like)[CONVERSIONS]


def config_for(
    base: PreTrainedConfig,
    sizes: Sequence[LayerSizes],
    *,
    layers: Sequence[int] | None = None,
    hidden_size: int | None = None,
    changes: Mapping[str, Any] | None = None,
    beside: Mapping[int, Mapping[str, int]] | None = None,
) -> PreTrainedConfig:
    """Returns the config of a model with the given sizes; its type determines the class of the model.

    Args:
        base: Config of the model before the change.
        sizes: Sizes of each kept layer, in order.
        layers: Index in ``base`` of each layer in ``sizes``; None for all layers in order.
        hidden_size: Width of the residual stream; None for that of ``base``.
        changes: Further entries, by their names in the config.
        beside: Sizes of single layers that are none of attention or feed-forward network, such as the number of experts: by index in
            ``base`` and key. Those that ``base`` has and this does not name stay.

    Raises:
        PlanError: The sizes do not fit each other or ``base``.
    """
    kept = _kept_layers(base, sizes, layers)
    family = family_of(base.model_type)
    _refuse_impossible(sizes, family)
    own_lists = _native_lists(base, kept)
    names = base.attribute_map
    values = {key: value for key, value in base.to_dict().items() if key not in DERIVED}
    values |= {names.get("num_hidden_layers", "num_hidden_layers"): len(sizes)}
    values |= _entries_of_layers(values, family.keys, kept) | dict(family.settings)
    if len(kept) < base.num_hidden_layers:
        values = {key: value for key, value in values.items() if key not in INTERVALS}
    before = values[names.get("hidden_size", "hidden_size")]
    width = before if hidden_size is None else hidden_size
    projecting = any(values[key] != before for key in family.keys.width)
    values |= {key: width for key in family.keys.width if values[key] == before}
    values |= {names.get("hidden_size", "hidden_size"): width, **(changes or {})}
    slopes_of = values.get("alibi_of") or values[names.get(family.keys.heads, family.keys.heads)]
    common = _common(sizes, family)
    values |= {names.get(key, key): value for key, value in common.items()}
    values |= _own_entries(values, sizes, family.keys, common)
    per_layer = _overrides(sizes, family, common, _cut_slopes(sizes, slopes_of, family.has_alibi(base)))
    per_layer = {index: entry for index, entry in per_layer.items() if not entry.items() <= own_lists.get(index, {}).items()}
    for new, entry in _beside(base, values, kept, sizes, beside or {}).items():
        per_layer[new] = per_layer.get(new, {}) | entry
    shown = next((layer for layer in sizes if layer.query_heads), sizes[0])  # one with heads, where not all have some
    if not per_layer and _as_computed(shown, family, width) and not (values.get("norm_width") or values.get("factored")):
        stock = _first_stock(_stock_values(values, shown, family) | ({"per_layer_config": own_lists} if own_lists else {}), family)
        if stock is not None:
            return stock
    if own_lists:
        raise _two_lists(family, factored=bool(values.get("factored")))
    own = {
        "head_dim": shown.head_dim if shown.query_heads else values.get("head_dim"),
        "layout": _layout(family, base, projecting=projecting),
    }
    if family.has_alibi(base):
        own |= {"alibi_of": slopes_of, "alibi_heads": None}
    return own_config(family.model_type)(**(values | own), per_layer_config=per_layer or None)


def _own_entries(values: Mapping[str, Any], sizes: Sequence[LayerSizes], keys: Keys, common: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a family's config says of sizes by entries of its own: the channels of a mixer, and a list of what differs."""
    found: dict[str, Any] = {}
    if keys.mixer_total and keys.mixer[1] in common:
        total, of_head = keys.mixer_total
        found[total] = common[keys.mixer[1]] * values[of_head]
    if keys.ffn_listed:
        found[keys.ffn] = [layer.ffn for layer in sizes]
    if values.get(keys.heads_listed):
        found[keys.heads_listed] = [layer.query_heads or common.get(keys.heads, 0) for layer in sizes]
    return found


def _entries_of_layers(values: Mapping[str, Any], keys: Keys, kept: Sequence[int]) -> dict[str, Any]:
    """Returns the config entries that list or count layers, for the kept layers alone."""
    lists = {key: [values[key][index] for index in kept] for key in keys.per_layer if values.get(key)}
    place = {old: new for new, old in enumerate(kept)}
    indices = {key: [place[old] for old in values[key] if old in place] for key in keys.indices if values.get(key)}
    counts = {key: sum(index < values[key] for index in kept) for key in keys.first_layers if key in values}
    if keys.last_layers:
        depth = max(len(values[key]) for key in keys.per_layer if values.get(key))
        counts |= {key: sum(index >= depth - values[key] for index in kept) for key in keys.last_layers if key in values}
    patterns = {key: [[lists[listed], 1]] for key, listed in keys.patterns.items() if listed in lists}
    return lists | indices | counts | patterns


def _beside(
    base: PreTrainedConfig,
    values: Mapping[str, Any],
    kept: Sequence[int],
    sizes: Sequence[LayerSizes],
    said: Mapping[int, Mapping[str, int]],
) -> dict[str, dict[str, Any]]:
    """Returns the sizes of single layers beside attention and feed-forward network, where they differ from those of the whole."""
    own = (base.to_dict().get("per_layer_config") or {}) if base.model_type.startswith("regraft_") else {}
    before = {int(index): {key: value for key, value in entry.items() if key in SIZES_BESIDE} for index, entry in own.items()}
    found: dict[str, dict[str, Any]] = {}
    for new, old in enumerate(kept):
        of_network = (family_of(base.model_type).keys.ffn or "intermediate_size") if sizes[new].ffn else ""
        entry = {key: value for key, value in before.get(old, {}).items() if key != of_network} | dict(said.get(old, {}))
        differing = {key: value for key, value in entry.items() if value != values.get(key)}
        if differing:
            found[str(new)] = differing
    return found


def why_layers_are_alike(config: PreTrainedConfig, kind: str) -> str:
    """Returns why no class holds layers with different numbers of units of a kind; empty if ours does.

    Args:
        config: Config of the model before the change.
        kind: Kind of groups within a layer.
    """
    if _native_lists(config, range(config.num_hidden_layers)):
        return f"family '{config.model_type}' lists sizes of single layers by itself, beside which layers cannot differ in others"
    if kind == "mixer_heads" and family_of(config.model_type).keys.mixer_total:
        return f"family '{config.model_type}' computes with one number of mixer heads for all layers"
    return ""


def _native_lists(base: PreTrainedConfig, kept: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Returns what a stock config says of single layers by itself, such as the head size of some, for the kept layers."""
    if base.model_type.startswith("regraft_"):
        return {}
    said = {int(index): entry for index, entry in (base.to_dict().get("per_layer_config") or {}).items()}
    return {str(new): dict(said[old]) for new, old in enumerate(kept) if said.get(old)}


def _first_stock(values: Mapping[str, Any], family: Family) -> PreTrainedConfig | None:
    """Returns the config of the family's stock class, or of the one that stands in for it; None where neither holds the values."""
    candidates = (name for name in (family.model_type, family.stand_in) if name)
    configs = (_stock_config(values, family.model_type, name) for name in candidates)
    return next((config for config in configs if config is not None), None)


def _two_lists(family: Family, *, factored: bool) -> PlanError:
    """Returns the refusal of layers that differ, for a family whose stock config lists sizes of single layers by itself."""
    reason = (
        "no layer is stored as two factors; prune its channels in place of that, with `targets=ffn`"
        if factored
        else "layers cannot differ in others; prune with `shape=uniform`"
    )
    return PlanError(f"family '{family.model_type}' lists sizes of single layers by itself, beside which {reason}")


def _as_computed(layer: LayerSizes, family: Family, width: int) -> bool:
    """Returns whether a layer has the sizes that its family computes from the hidden size, if it computes any."""
    heads = family.head_size == "explicit" or layer.query_heads * layer.head_dim == width
    return heads and (bool(family.keys.ffn) or layer.ffn == 4 * width)


def _stock_values(values: Mapping[str, Any], layer: LayerSizes, family: Family) -> dict[str, Any]:
    """Returns the values for a stock config, with the head size only if it differs from the usual quotient."""
    known = {key: value for key, value in values.items() if key not in OURS and not (key == "head_dim" and value is None)}
    if family.keys.head_dim_listed:
        return known
    if family.head_size == "derived" and "head_dim" not in {field.name for field in dataclasses.fields(CONFIG_MAPPING[family.model_type])}:
        known.pop("head_dim", None)
    elif layer.query_heads and ("head_dim" in known or layer.head_dim * layer.query_heads != known["hidden_size"]):
        known["head_dim"] = layer.head_dim
    if not family.keys.ffn:
        known.pop("intermediate_size", None)
    return known


def _layout(family: Family, base: PreTrainedConfig, *, projecting: bool) -> dict[str, Any]:
    """Returns the layout of a family for the uneven classes: the entries that differ from their defaults."""
    parts = family.parts(base)
    modules = (family.attention, family.mlp, *family.mlp_parts)
    found: dict[str, Any] = {
        "layers": family.layers.partition(".")[2],
        "attention": family.attention,
        "mlp": list(family.mlp_parts or (family.mlp,)),
        "attention_norms": [name for name in parts["attention"] if name not in modules],
        "mlp_norms": [name for name in parts["mlp"] if name not in modules],
        "heads": family.keys.heads,
        "head_size": family.head_size,
        "mlp_size": "explicit" if family.keys.ffn else "derived",
        "writers": list(family.writers),
        "apart": list(family.apart) if projecting else [],
        "width_keys": list(family.keys.width),
    }
    return {key: value for key, value in found.items() if value != LAYOUT[key]}


def _cut_slopes(sizes: Sequence[LayerSizes], total: int, has_alibi: bool) -> list[tuple[int, ...]]:
    """Returns for each layer the original indices of its heads if some were removed; empty if heads have no slopes."""
    found: list[tuple[int, ...]] = []
    for index, layer in enumerate(sizes):
        slopes = layer.slopes or tuple(range(total))
        if has_alibi and layer.query_heads and len(slopes) != layer.query_heads:
            raise PlanError(f"layer {index} has {layer.query_heads} query heads but {len(slopes)} position slopes; name one for each head")
        found.append(slopes if has_alibi and layer.query_heads and slopes != tuple(range(total)) else ())
    return found


def declared_sizes(config: PreTrainedConfig) -> tuple[LayerSizes, ...]:
    """Returns the sizes of each layer according to a config, with zeros for skipped parts."""
    family = family_of(config.model_type)
    if family.mixed:
        with torch.device("meta"), quiet():
            view = ModelView(AutoModelForCausalLM.from_config(config))
        return tuple(view.sizes(index) for index in range(len(view.layers)))
    keys = family.keys
    single = bool(family.single_kv_when) and matches(family.single_kv_when, config)
    found: list[LayerSizes] = []
    for index in range(config.num_hidden_layers):
        layer: Any = config.per_layer_config[index]
        skip = getattr(layer, "skip", None) or ()
        heads = getattr(layer, keys.heads)
        groups = 1 if single else (getattr(layer, keys.kv_heads or keys.heads) or heads)
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        ffn = getattr(layer, keys.ffn or "intermediate_size", None) or 4 * layer.hidden_size
        slopes = (getattr(layer, "alibi_heads", None) or range(heads)) if family.has_alibi(config) else ()
        absent = "attention" in skip
        found.append(
            LayerSizes(
                query_heads=0 if absent else heads,
                kv_heads=0 if absent else groups,
                head_dim=head_dim,
                ffn=0 if "mlp" in skip else ffn,
                slopes=() if absent else tuple(slopes),
            )
        )
    return tuple(found)


def conform(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model itself if its config matches its sizes, else a model built from its weights.

    Weights that were cut in place do not match the config, or attributes such as the number of heads, any more.
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


def _refuse_impossible(sizes: Sequence[LayerSizes], family: Family) -> None:
    mixers = sorted({layer.mixer for layer in sizes})
    if family.keys.mixer_total and len(mixers) > 1:
        raise PlanError(
            f"layers with {mixers[0][1]} to {mixers[-1][1]} mixer heads, and family '{family.model_type}' computes with one number for all "
            "layers; prune with `shape=uniform`"
        )
    for index, layer in enumerate(sizes):
        if layer.head_dim != sizes[0].head_dim and not family.keys.head_dim_listed:
            raise PlanError(
                f"layer {index} has heads of {layer.head_dim} channels, layer 0 of {sizes[0].head_dim}; "
                "heads are kept or removed whole: use one head size"
            )
        if (layer.query_heads == 0) != (layer.kv_heads == 0) or (layer.kv_heads and layer.query_heads % layer.kv_heads):
            raise PlanError(
                f"layer {index} has {layer.query_heads} query heads for {layer.kv_heads} key-value heads; "
                "the first must be a multiple of the second"
            )
        if not family.keys.kv_heads and layer.kv_heads != layer.query_heads:
            raise PlanError(
                f"layer {index} has {layer.query_heads} query heads for {layer.kv_heads} key-value heads; "
                f"in family '{family.model_type}' every query head has its own"
            )


def _common(sizes: Sequence[LayerSizes], family: Family) -> dict[str, int]:
    """Returns the most common widths, so that the list of exceptions is short; in a tie those of the earliest layer."""
    rows = [_own_sizes(layer, family) for layer in sizes]
    attention = (family.keys.heads, family.keys.kv_heads)
    heads = Counter(tuple(row[key] for key in attention if key) for row in rows if row[family.keys.heads])
    ffn = family.keys.ffn or "intermediate_size"
    widths = Counter(row[ffn] for row in rows if row[ffn])
    found = dict(zip((key for key in attention if key), heads.most_common(1)[0][0], strict=True)) if heads else {}
    if widths:
        found[ffn] = widths.most_common(1)[0][0]
    mixers = Counter(layer.mixer for layer in sizes if all(layer.mixer))
    if mixers:
        found |= dict(zip(family.keys.mixer, mixers.most_common(1)[0][0], strict=True))
    return found


def _own_sizes(layer: LayerSizes, family: Family) -> dict[str, int]:
    """Returns the sizes of a layer under the names of its family's config."""
    keys = family.keys
    found = {keys.heads: layer.query_heads, keys.ffn or "intermediate_size": layer.ffn}
    found |= {keys.kv_heads: layer.kv_heads} if keys.kv_heads else {}
    return found | (dict(zip(keys.mixer, layer.mixer, strict=True)) if keys.mixer else {})


def _overrides(
    sizes: Sequence[LayerSizes], family: Family, common: Mapping[str, int], slopes: Sequence[tuple[int, ...]]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(sizes):
        listed = (family.keys.ffn,) if family.keys.ffn_listed else ()
        own = {key: value for key, value in _own_sizes(layer, family).items() if key not in listed}
        entry: dict[str, Any] = {key: value for key, value in own.items() if value and value != common[key]}
        skip = list(layer.removed)
        if skip:
            entry["skip"] = skip
        if slopes[index]:
            entry["alibi_heads"] = list(slopes[index])
        if entry:
            found[str(index)] = entry
    return found


def _stock_config(values: Mapping[str, Any], family: str, candidate: str) -> PreTrainedConfig | None:
    """Returns a config of a stock class, or None if that class cannot express the values."""
    config_class = CONFIG_MAPPING[candidate]
    if candidate != family:
        own = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[family])}
        known = {field.name for field in dataclasses.fields(config_class)}
        lost = {name for name in own if name not in known}
        if any(values.get(name, own[name]) != own[name] for name in lost):
            return None  # for example a bias that the stand-in lacks
        values = {name: value for name, value in values.items() if name not in lost}
        # Features that only the stand-in has, such as Mistral's sliding window, are switched off.
        values |= dict.fromkeys(sorted(known - set(own)))
    try:
        return config_class(**values)
    except (StrictDataclassError, ValueError):
        return None


def _hidden_size(like: PreTrainedModel, state: Mapping[str, Tensor]) -> int:
    family = family_of(like.config.model_type)
    known = state.get(family.width_from or f"{family.embedding}.weight")
    return like.config.hidden_size if known is None else known.shape[-1]


def _is_removed(
    name: str, sizes: Sequence[LayerSizes], like: PreTrainedModel, parts: Mapping[Literal["attention", "mlp"], Sequence[str]]
) -> bool:
    """Returns whether a tensor belongs to a removed part of its layer, norms included."""
    prefix, _, rest = name.partition(f"{family_of(like.config.model_type).layers}.")
    if prefix or not rest:
        return False
    index, _, inside = rest.partition(".")
    layer = sizes[int(index)]
    gone = [module for part in layer.removed for module in parts[part]]
    return any(inside.startswith(f"{part}.") for part in gone)


def refuse_misfits(report: Mapping[str, Any]) -> None:
    """Refuses a model that is incomplete or has unused tensors.

    Raises:
        PlanError: A tensor is missing, superfluous or of another shape; the message names the first of each.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for what, names in (("lack", missing), ("also hold", unexpected), ("have another shape for", mismatched)):
        if names:
            raise PlanError(f"the tensors {what} '{names[0]}' ({len(names)} in all); build the model from sizes that fit its weights")
