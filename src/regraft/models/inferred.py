"""Inference of a family's table from a small random model, for families without a table in ``architectures/``.

The small model (:mod:`regraft.models.small_model`) shows where the matrices of a layer are, and which norms serve only one part. That
is enough to build and save models of other sizes. Couplings are not inferred: they come from tracing the computation of the model
(:mod:`regraft.groups.traced`), which refuses operators that it does not know.

The width of the residual stream is not cut, because that needs knowledge that this inspection cannot give, such as other uses of the norms'
epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regraft.compat import own_parameters
from regraft.errors import ModelError
from regraft.models.mixers import first_stack, layout_by, mixers_of, shapes_of
from regraft.models.quiet import in_one_line
from regraft.models.small_model import (
    DOUBLING_KEYS,
    FFN,
    FFN_KEYS,
    FIRST_LAYERS_KEYS,
    HEAD_DIM,
    HEADS,
    INDEX_KEYS,
    KV_HEADS,
    KV_KEYS,
    LAST_LAYERS_KEYS,
    LITERAL,
    OTHER_HEADS,
    OTHER_KV_HEADS,
    OWN_HEAD_DIM,
    PER_LAYER_KEYS,
    SHARED_FFN,
    SHARED_FFN_KEYS,
    USUAL_FFN,
    WIDTH,
    SmallModel,
    called_last,
    changes_last_layer,
    in_order_of_layers,
    is_causal,
    part_served,
    parts_for_layers,
    seen_at,
    silent,
    small_model,
    subtracts_mean,
    why_none,
)
from regraft.models.uneven.modeling_regraft import made_again


@dataclass(frozen=True)
class Matrix:
    """A matrix within a layer, with its name and the lengths of its sides."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Shapes:
    """The role of every matrix of the layers.

    Attributes:
        out: Matrix with which the attention writes the stream.
        qkv: Matrices of queries, keys and values.
        down: Matrix with which the feed-forward network writes the stream; None where no layer has one, but experts.
        up: Matrices that read the stream for the feed-forward network.
        head_dim: Channels of a head.
        ffn: Channels of the feed-forward network.
        kv_key: Config key of the number of key-value heads; empty if every query head has its own.
        ffn_key: Config key of the feed-forward width; empty if it is computed from the hidden size.
        attending: Indices of the layers with this attention, of one layer of each kind.
        feeding: Indices of the layers with this feed-forward network, of one layer of each kind.
        heads_stay: Why no layer's heads are cut or its attention removed; empty if they can be.
        unlike: Whether that is because the matrices of the attention are not those of queries, keys and values.
        parts_stay: Why nothing but query heads, evenly from each group, goes from the attention; empty if more can.
        sized: Whether layers have heads of several sizes, which the config lists.
    """

    out: Matrix
    qkv: tuple[Matrix, ...]
    down: Matrix | None
    up: tuple[Matrix, ...]
    head_dim: int
    ffn: int
    kv_key: str
    ffn_key: str
    attending: tuple[int, ...]
    feeding: tuple[int, ...]
    heads_stay: str = ""
    unlike: bool = False
    parts_stay: str = ""
    sized: bool = False

    @property
    def own_head_dim(self) -> bool:
        """Returns whether the family takes a head size that is not hidden size / heads."""
        return self.head_dim == OWN_HEAD_DIM

    @property
    def writers(self) -> tuple[str, ...]:
        """Last parts of the names of the matrices that write the stream."""
        return tuple(dict.fromkeys(matrix.name.rpartition(".")[2] for matrix in (self.out, self.down) if matrix is not None))

    @property
    def attention(self) -> str:
        """Name of the attention within a layer; empty if its matrices are not in one module."""
        return _enclosing((self.out, *self.qkv))

    @property
    def mlp(self) -> str:
        """Name of the feed-forward network within a layer; empty if it is not a single module."""
        return _enclosing((self.down, *self.up)) if self.down is not None else ""


def describe(model_type: str) -> dict[str, Any]:
    """Returns the entries of a family's table.

    Args:
        model_type: Model type in the Hugging Face config, known to transformers.

    Raises:
        ModelError: It is no causal language model of equal layers with attention and feed-forward network; the message gives the obstacle.
    """
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"transformers has no causal language model of type '{model_type}'")
    config_class = CONFIG_MAPPING[model_type]
    try:
        known = frozenset({*config_class().to_dict(), *config_class.attribute_map})
    except Exception as error:  # a config without defaults may raise anything
        raise ModelError(f"its config has no defaults ({in_one_line(error)})") from None
    # Some families have a configurable head size, some compute it, and some have one that must equal the computed value.
    for head_dim in (OWN_HEAD_DIM, None, HEAD_DIM):
        small = small_model(model_type, known, head_dim)
        if small is not None:
            return _table(small, _shapes(small))
    raise ModelError(f"no small model of it can be built to see how it is made ({why_none(model_type, known)})")


def _table(small: SmallModel, shapes: Shapes) -> dict[str, Any]:
    """Returns all findings, by the fields of :class:`regraft.models.family.Family`."""
    if not shapes.attention:
        raise ModelError("the matrices of its attention are not in one module")
    model: Any = small.model
    serving = _serving(small, shapes)
    layout = layout_by(small.known)
    mixed = len(small.kinds) > 1 or shapes.down is None or bool(shapes.heads_stay or shapes.parts_stay or layout)
    lists = _lists_of_layers(small)
    parts = parts_for_layers(small)
    fixed = (
        _fixed("residual", "the norms of a family without a table cannot be rescaled with certainty"),
        *_unreplaceable(small, shapes),
        *_unscalable(small, shapes, mixed=mixed),
        *_shared(shapes),
        *_intertwined(shapes, serving),
        *_deep(small, parts),
    )
    first_norm = next(((layer, name) for layer, name, _ in serving), None)
    return {
        "model_type": small.model_type,
        "model_class": type(model).__name__,
        "layers": small.layers_name,
        "embedding": _name_of(model, model.get_input_embeddings(), "token embedding"),
        "head": _name_of(model, model.get_output_embeddings(), "output projection"),
        "final_norm": called_last(small, _norms_of_width(model, (f"{small.layers_name}.",))),
        "attention": shapes.attention,
        "mlp": shapes.mlp or (shapes.down.name if shapes.down is not None else mixers_of(small.layers[shapes.attending[0]])[0]),
        "mlp_parts": () if shapes.mlp or shapes.down is None else (*(matrix.name for matrix in shapes.up), shapes.down.name),
        "attention_norms": _norms_of("attention", serving),
        "mlp_norms": _norms_of("mlp", serving),
        "discovery": "traced",
        "transposed": isinstance(small.layers[shapes.attending[0]].get_submodule(shapes.out.name), Conv1D),
        # Heads that stay have the size that the config gives, however it does.
        "head_size": "explicit" if shapes.own_head_dim or shapes.heads_stay else "derived",
        "writers": shapes.writers,
        # Norms without weights are layer norms.
        "norm": "layer" if first_norm is None or subtracts_mean(small, *first_norm) else "rms",
        "layer_output": "tuple" if isinstance(seen_at(small, 0, "")[1], tuple) else "tensor",
        "keys": {
            "kv_heads": shapes.kv_key,
            "ffn": shapes.ffn_key,
            "first_layers": tuple(key for key in FIRST_LAYERS_KEYS if key in small.known),
            "mixer": layout.counts if layout is not None else (),
            "mixer_evenly": layout is not None and layout.evenly,
            "mixer_total": (layout.total, layout.sizes[1]) if layout is not None and layout.total else (),
            "indices": tuple(key for key in INDEX_KEYS if key in small.known),
            "per_layer": (*lists,),
            "last_layers": tuple(key for key in LAST_LAYERS_KEYS if key in small.known),
            "ffn_listed": shapes.ffn_key in lists,
            "head_dim_listed": shapes.sized,
            "heads_listed": next((key for key in lists if small.model.config.to_dict().get(key) == [HEADS] * len(small.layers)), ""),
        },
        "for_each_layer": parts,
        "whole": (shapes.attention,) if shapes.unlike else (),
        "last_layer_stays": changes_last_layer(small),
        "fixed": fixed,
        "couplings": _couplings(shapes),
        "mixed": mixed,
        "settings": {key: value for key, value in LITERAL.items() if key in small.known},
    }


def _serving(small: SmallModel, shapes: Shapes) -> list[tuple[int, str, str]]:
    """Returns the norms of one layer of each kind: index of the layer, name, and the only part that it serves or an empty string."""
    found: list[tuple[int, str, str]] = []
    for layer in small.kinds:
        parts = (("attention", shapes.out, shapes.attending), ("mlp", shapes.down, shapes.feeding))
        writers = {part: matrix.name for part, matrix, layers in parts if matrix is not None and layer in layers}
        found += [(layer, name, part_served(small, layer, name, writers)) for name in _stream_norms(small, layer, shapes)]
    return found


def _norms_of(part: str, serving: Sequence[tuple[int, str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name, served in serving if served == part))


def _intertwined(shapes: Shapes, serving: Sequence[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """Returns refusals for parts that have one name, or a norm of one name, in layers of different kinds."""
    both = set(_norms_of("attention", serving)) & set(_norms_of("mlp", serving))
    if shapes.attention == shapes.mlp:
        why = "its attention and its feed-forward network are layers of their own: remove the layer"
    elif both:
        why = f"'{min(both)}' serves its attention in some layers and its feed-forward network in others"
    else:
        return []
    return [_fixed(kind, why) for kind in ("attention", "mlp")]


def _deep(small: SmallModel, parts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Returns refusals for what depends on the depth: layers of which something outside holds a part, and doubled widths."""
    name = next((name for name, axis in parts.items() if not in_order_of_layers(small, name, axis)), "")
    found = [_fixed("layer", f"'{name}' holds a part for each layer")] if name else []
    for key in DOUBLING_KEYS:
        if key in small.known:
            found += [{"kind": kind, "when": {key: True}, "why": f"`{key}` doubles the width of some layers"} for kind in ("ffn", "mlp")]
    return found


def _lists_of_layers(small: SmallModel) -> list[str]:
    """Returns the config keys of the lists with an entry for each layer."""
    config_class: Any = type(small.model.config)
    count = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    usual = config_class.attribute_map.get("layer_types", "layer_types")
    try:
        first, second = (config_class(**{count: number}).to_dict() for number in (5, 6))
    except Exception:  # a family may refuse these numbers with any error
        first, second = {}, {}
    lengths = {
        key: (len(first[key]), len(second[key])) for key in first if isinstance(first[key], list) and isinstance(second.get(key), list)
    }
    found = [key for key, pair in lengths.items() if pair == (5, 6) and key not in INDEX_KEYS]
    return list(dict.fromkeys((*found, *PER_LAYER_KEYS, usual)))


def _couplings(shapes: Shapes) -> tuple[dict[str, Any], ...]:
    queries = HEADS * shapes.head_dim
    blocks = {queries: "query_group", KV_HEADS * shapes.head_dim: "head", 2 * queries: "gated", HEADS: "each"}
    heads = [{"module": m.name, "side": "out", "block": blocks.get(m.outputs, "fused")} for m in shapes.qkv]
    channels = [{"module": m.name, "side": "out", "block": "one" if m.outputs == shapes.ffn else "fused"} for m in shapes.up]
    attention = {"kind": "heads", "axes": (*heads, {"module": shapes.out.name, "side": "in", "block": "query_group"})}
    found = () if shapes.heads_stay else (attention,)
    if shapes.down is None:
        return found
    return (*found, {"kind": "ffn", "axes": (*channels, {"module": shapes.down.name, "side": "in", "block": "one"})})


# The position of each matrix.


def _shapes(small: SmallModel) -> Shapes:
    """Returns the role of every matrix.

    Raises:
        ModelError: It is no causal language model with one kind of attention and one kind of feed-forward network.
    """
    if not is_causal(small):
        raise ModelError("its predictions depend on later tokens: it is no causal language model")
    for layer in small.kinds:
        _refuse_odd_layer(small, layer)
    matrices = {layer: _matrices(small.layers[layer]) for layer in small.kinds}
    widths = {side for found in matrices.values() for matrix in found for side in (matrix.inputs, matrix.outputs)}
    ffn = next((width for width in (SHARED_FFN, FFN) if width in widths), USUAL_FFN)
    keys = {SHARED_FFN: SHARED_FFN_KEYS, FFN: FFN_KEYS}.get(ffn, ())
    head_dim = OWN_HEAD_DIM if HEADS * OWN_HEAD_DIM in widths else HEAD_DIM
    kv_key = next((key for key in KV_KEYS if key in small.known), "")
    feeding = {layer: found for layer in small.kinds if (found := _feed_forward(matrices[layer], ffn))}
    if not feeding and not first_stack(small.layers):
        raise ModelError("it has not one feed-forward network in every layer")
    others = {
        layer: [matrix for matrix in found if layer not in feeding or matrix not in (feeding[layer][0], *feeding[layer][1])]
        for layer, found in matrices.items()
    }
    unlike = ""
    try:
        attending = {
            layer: found
            for layer in small.kinds
            if (found := _attention(others[layer], head_dim, grouped=bool(kv_key), within=f"{small.layers_name}.{layer}"))
        }
    except ModelError as error:
        attending, unlike = {}, str(error)
    if not attending:
        alone = "it has no attention that writes the stream through one matrix"
        unlike = unlike or (alone if feeding else _without(small, alone))
        attending = _of_other_make(others)
        if not attending or not feeding:
            raise ModelError(unlike)
    if not feeding and not mixers_of(small.layers[next(iter(attending))]):
        raise ModelError("its feed-forward network has another width than its config says")
    down, up = _one(feeding, "feed-forward networks") if feeding else (None, [])
    out, qkv = _one(attending, "attentions")
    ffn_key = next((key for key in keys if key in small.known), "") if feeding else "intermediate_size"
    found = Shapes(out, tuple(qkv), down, tuple(up), head_dim, ffn, kv_key, ffn_key, tuple(attending), tuple(feeding))
    if unlike:
        return replace(found, heads_stay=unlike, unlike=True)
    return _with_layers_unlike(small, found, others)


def _with_layers_unlike(small: SmallModel, found: Shapes, others: Mapping[int, Sequence[Matrix]]) -> Shapes:
    """Returns the roles with what the layers' attentions do not have in common: the size of their heads, or keys of their own."""
    sharing = next((key for key in LAST_LAYERS_KEYS if key in small.known), "")
    parts_stay = f"`{sharing}` lets layers use the keys and values of others" if sharing else ""
    unlike = [
        layer for layer in small.kinds if layer not in found.attending and found.out.name in {matrix.name for matrix in others[layer]}
    ]
    if not unlike:
        return replace(found, parts_stay=parts_stay)
    several = "its layers have heads of several sizes"
    names = [matrix.name for matrix in found.qkv]
    for layer in unlike:
        width = next(matrix.inputs for matrix in others[layer] if matrix.name == found.out.name)
        there = _attention(others[layer], width // HEADS, grouped=bool(found.kv_key), within=f"{small.layers_name}.{layer}")
        if width % HEADS or there is None or [matrix.name for matrix in there[1]] != names:
            return replace(found, heads_stay=several)
    return replace(found, attending=(*found.attending, *unlike), parts_stay=several, sized=True)


def _of_other_make(others: Mapping[int, Sequence[Matrix]]) -> dict[int, tuple[Matrix, list[Matrix]]]:
    """Returns the matrices of an attention whose heads are not known, such as a latent one, in the layers that have the same one."""
    found: dict[int, tuple[Matrix, list[Matrix]]] = {}
    for layer, matrices in others.items():
        out = next((matrix for matrix in reversed(matrices) if matrix.outputs == WIDTH and "." in matrix.name), None)
        if out is not None:
            part = f"{out.name.rpartition('.')[0]}."
            rest = [matrix for matrix in matrices if matrix is not out and matrix.name.startswith(part)]
            if rest and (not found or (out, rest) in found.values()):
                found[layer] = (out, rest)
    return found


def _without(small: SmallModel, what: str) -> str:
    """Returns why a family lacks a part: a module that holds the weights in another form, or in general."""
    for layer in small.kinds:
        stack = first_stack(small.layers[layer])
        if stack:
            return f"'{small.layers_name}.{layer}.{stack[1:]} is no matrix"
    return what


def _one(parts: Mapping[int, tuple[Matrix, list[Matrix]]], what: str) -> tuple[Matrix, list[Matrix]]:
    """Returns the matrices that all layers with a part have in it."""
    first, *rest = parts
    other = next((layer for layer in rest if parts[layer] != parts[first]), None)
    if other is not None:
        raise ModelError(f"its layers {first} and {other} have {what} of different kinds")
    return parts[first]


def _refuse_odd_layer(small: SmallModel, layer: int) -> None:
    """Refuses layers that cannot be built singly, or that do not return hidden states (alone or first in a tuple)."""
    kind: Any = type(small.layers[layer])
    try:
        with init_empty_weights(include_buffers=False):
            again = made_again(small.layers[layer], small.model.config, layer)
    except Exception:  # the constructor needs other arguments
        raise ModelError(f"a layer ({kind.__name__}) is not made from a config and its number") from None
    if shapes_of(again) != shapes_of(small.layers[layer]):
        raise ModelError(f"a layer ({kind.__name__}) made from its config and its number is another than the model has")
    output = seen_at(small, layer, "")[1]
    if not isinstance(output[0] if isinstance(output, tuple) else output, Tensor):
        raise ModelError(f"a layer ({kind.__name__}) does not return hidden states")


def _matrices(layer: nn.Module) -> list[Matrix]:
    """Returns the matrices of a layer, without those of its mixers."""
    mixers = tuple(f"{name}." for name in mixers_of(layer))
    found: list[Matrix] = []
    for name, module in layer.named_modules():
        if name.startswith(mixers):
            continue
        if isinstance(module, nn.Linear):
            found.append(Matrix(name, module.weight.shape[1], module.weight.shape[0]))
        elif isinstance(module, Conv1D):
            found.append(Matrix(name, *module.weight.shape))
    return found


def _feed_forward(matrices: Sequence[Matrix], ffn: int) -> tuple[Matrix, list[Matrix]] | None:
    """Returns the matrix that writes the stream, and those that read it; None where a layer has not one feed-forward network."""
    down = [matrix for matrix in matrices if matrix.inputs == ffn and matrix.outputs == WIDTH]
    up = [matrix for matrix in matrices if matrix.inputs == WIDTH and matrix.outputs in (ffn, 2 * ffn)]
    return (down[0], up) if len(down) == 1 and up else None


def _attention(matrices: Sequence[Matrix], head_dim: int, *, grouped: bool, within: str) -> tuple[Matrix, list[Matrix]] | None:
    """Returns the matrix that writes the stream, and those of queries, keys and values; None where a layer has no attention.

    Args:
        matrices: Matrices of a layer, without those of the feed-forward network.
        head_dim: Channels of a head.
        grouped: Whether the family has a number of key-value heads.
        within: Name of the layer, for messages.
    """
    queries, keys = HEADS * head_dim, KV_HEADS * head_dim
    # Queries may come with a gate of their size, or with a gate for each head.
    allowed = (queries, queries + 2 * keys, keys, 2 * queries, HEADS) if grouped else (queries, 3 * queries)
    writing = [matrix for matrix in matrices if matrix.inputs == queries and matrix.outputs == WIDTH]
    if not writing:
        return None
    out = writing[-1]  # if all are square, the last one
    part = out.name.rpartition(".")[0]
    rest = [matrix for matrix in matrices if matrix is not out and matrix.name.startswith(part)]
    odd = next((matrix for matrix in rest if matrix.inputs != WIDTH or matrix.outputs not in allowed), None)
    if odd is not None:
        raise ModelError(
            f"'{within}.{odd.name}' is {odd.inputs} by {odd.outputs}, neither queries, keys, values nor a feed-forward network"
        )
    if not rest:
        raise ModelError("it has no attention")
    return out, rest


def _enclosing(matrices: Sequence[Matrix]) -> str:
    """Returns the innermost module of a layer that contains all of the matrices; empty if that is the layer itself."""
    paths = [matrix.name.split(".")[:-1] for matrix in matrices]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _norms_of_width(module: nn.Module, outside: tuple[str, ...]) -> list[str]:
    """Returns the modules with a weight as wide as the stream, except those whose name begins with one of the prefixes."""
    weights = {name: own_parameters(part).get("weight") for name, part in module.named_modules() if not name.startswith(outside)}
    return [name for name, weight in weights.items() if weight is not None and weight.shape == (WIDTH,)]


def _stream_norms(small: SmallModel, layer: int, shapes: Shapes) -> list[str]:
    module = small.layers[layer]
    return _norms_of_width(module, tuple(f"{part}." for part in (shapes.attention, shapes.mlp, *mixers_of(module)) if part))


# What cannot be cut.


def _unreplaceable(small: SmallModel, shapes: Shapes) -> list[dict[str, Any]]:
    """Returns the parts that our stand-ins cannot replace, because a silent part returns something else than its stand-in."""
    found: list[dict[str, Any]] = []
    parts = [("attention", shapes.attention, shapes.out, shapes.attending[0])]
    parts += [("mlp", shapes.mlp or shapes.down.name, shapes.down, shapes.feeding[0])] if shapes.down is not None else []
    for part, name, matrix, layer in parts:
        with silent(small, layer, matrix.name):
            inputs, output = seen_at(small, layer, name)
        written = _written(part, inputs, output)
        if written is None or bool(written.any()):
            found.append(_fixed(part, f"what its {name} returns is not what can stand in its place"))
    return found


def _unscalable(small: SmallModel, shapes: Shapes, *, mixed: bool) -> list[dict[str, Any]]:
    """Returns refusals for heads, if the family's classes do not accept other numbers of heads."""
    if shapes.heads_stay:
        return [_fixed(kind, shapes.heads_stay) for kind in ("heads", "query_heads", "attention", "mlp")]
    if mixed and not shapes.own_head_dim:
        why = "its classes compute the head size from the hidden size, which its other kinds of layers share"
        return [_fixed(kind, why) for kind in ("heads", "query_heads")]
    # A config that wants heads to divide the hidden size is met here by another width, and in a pruned model by our own class.
    widths = (WIDTH, OTHER_HEADS * HEAD_DIM) if shapes.own_head_dim else (OTHER_HEADS * HEAD_DIM,)
    heads = (OTHER_HEADS, OTHER_KV_HEADS)
    if all(small_model(small.model_type, small.known, small.head_dim, heads, width) is None for width in widths):
        return [_fixed(kind, "its classes do not take every number of heads") for kind in ("heads", "query_heads")]
    if shapes.own_head_dim:
        return []
    readers = [name for name, module in small.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    own = {
        f"{small.layers_name}.{index}.{matrix.name}"
        for index in range(len(small.layers))
        for matrix in (shapes.out, shapes.down)
        if matrix is not None
    }
    clash = next((name for name in readers if name not in own and name.rpartition(".")[2] in shapes.writers), None)
    if clash is None:
        return []
    return [_fixed(kind, f"'{clash}' has the name of a matrix that writes the stream") for kind in ("heads", "query_heads")]


def _shared(shapes: Shapes) -> list[dict[str, Any]]:
    """Returns refusals for what layers share in their attentions, or have in several sizes; query heads alone can go."""
    if not shapes.parts_stay:
        return []
    alone = f"{shapes.parts_stay}; query heads alone can go, evenly from each group (`targets=query_heads`)"
    return [_fixed("heads", alone), *(_fixed(kind, shapes.parts_stay) for kind in ("attention", "mlp"))]


def _written(part: str, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
    """Returns the tensor that a part writes, if the part returns it in the form of our stand-in, else None."""
    if part == "attention":
        found = output[0] if isinstance(output, tuple) and len(output) == 2 else None
    else:
        found = output if len(inputs) == 1 else None
    return found if isinstance(found, Tensor) else None


def _fixed(kind: str, why: str) -> dict[str, Any]:
    return {"kind": kind, "when": {}, "why": why}


def _name_of(model: PreTrainedModel, wanted: nn.Module | None, what: str) -> str:
    name = next((name for name, module in model.named_modules() if module is wanted), None)
    if wanted is None or name is None:
        raise ModelError(f"it has no {what}")
    return name
