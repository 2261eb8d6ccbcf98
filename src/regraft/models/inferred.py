"""Inference of a family's table from a small random model, for families without a table in ``architectures/``.

The small model (:mod:`regraft.models.small_model`) shows where the matrices of a layer are, and which norms serve only one part. That
is enough to build and save models of other sizes. Couplings are not inferred: they come from tracing the computation of the model
(:mod:`regraft.groups.traced`), which refuses operators that it does not know.

The width of the residual stream is not cut, because that needs knowledge that this inspection cannot give, such as other uses of the norms'
epsilon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regraft.compat import own_parameters
from regraft.errors import ModelError
from regraft.models.quiet import in_one_line
from regraft.models.small_model import (
    FFN,
    FFN_KEYS,
    FIRST_LAYERS_KEYS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_KEYS,
    LAYERS,
    OTHER_HEADS,
    OTHER_KV_HEADS,
    OWN_HEAD_DIM,
    USUAL_FFN,
    WIDTH,
    SmallModel,
    called_last,
    is_causal,
    part_served,
    seen_at,
    silent,
    small_model,
    subtracts_mean,
)


@dataclass(frozen=True)
class Matrix:
    """A matrix within a layer, with its name and the lengths of its sides."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Shapes:
    """The role of every matrix of a layer.

    Attributes:
        out: Matrix with which the attention writes the stream.
        qkv: Matrices of queries, keys and values.
        down: Matrix with which the feed-forward network writes the stream.
        up: Matrices that read the stream for the feed-forward network.
        head_dim: Channels of a head.
        ffn: Channels of the feed-forward network.
        kv_key: Config key of the number of key-value heads; empty if every query head has its own.
        ffn_key: Config key of the feed-forward width; empty if it is computed from the hidden size.
    """

    out: Matrix
    qkv: tuple[Matrix, ...]
    down: Matrix
    up: tuple[Matrix, ...]
    head_dim: int
    ffn: int
    kv_key: str
    ffn_key: str

    @property
    def own_head_dim(self) -> bool:
        """Returns whether the family takes a head size that is not hidden size / heads."""
        return self.head_dim == OWN_HEAD_DIM

    @property
    def writers(self) -> tuple[str, ...]:
        """Last parts of the names of the matrices that write the stream."""
        return tuple(dict.fromkeys(matrix.name.rpartition(".")[2] for matrix in (self.out, self.down)))

    @property
    def attention(self) -> str:
        """Name of the attention within a layer; empty if its matrices are not in one module."""
        return _enclosing((self.out, *self.qkv))

    @property
    def mlp(self) -> str:
        """Name of the feed-forward network within a layer; empty if it is not a single module."""
        return _enclosing((self.down, *self.up))


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
    raise ModelError("no small model of it can be built to see how it is made")


def _table(small: SmallModel, shapes: Shapes) -> dict[str, Any]:
    """Returns all findings, by the fields of :class:`regraft.models.family.Family`."""
    if not shapes.attention:
        raise ModelError("the matrices of its attention are not in one module")
    model: Any = small.model
    writers = {"attention": shapes.out.name, "mlp": shapes.down.name}
    serving = {name: part_served(small, name, writers) for name in _stream_norms(small, shapes)}
    fixed = (
        _fixed("residual", "the norms of a family without a table cannot be rescaled with certainty"),
        *_unreplaceable(small, shapes),
        *_unscalable(small, shapes),
    )
    return {
        "model_type": small.model_type,
        "model_class": type(model).__name__,
        "layers": small.layers_name,
        "embedding": _name_of(model, model.get_input_embeddings(), "token embedding"),
        "head": _name_of(model, model.get_output_embeddings(), "output projection"),
        "final_norm": called_last(small, _norms_of_width(model, (f"{small.layers_name}.",))),
        "attention": shapes.attention,
        "mlp": shapes.mlp or shapes.down.name,
        "mlp_parts": () if shapes.mlp else (*(matrix.name for matrix in shapes.up), shapes.down.name),
        "attention_norms": tuple(name for name, part in serving.items() if part == "attention"),
        "mlp_norms": tuple(name for name, part in serving.items() if part == "mlp"),
        "discovery": "traced",
        "transposed": isinstance(small.layer.get_submodule(shapes.out.name), Conv1D),
        "head_size": "explicit" if shapes.own_head_dim else "derived",
        "writers": shapes.writers,
        # Norms without weights are layer norms.
        "norm": "layer" if not serving or subtracts_mean(small, next(iter(serving))) else "rms",
        "layer_output": "tuple" if isinstance(seen_at(small, "")[1], tuple) else "tensor",
        "keys": {
            "kv_heads": shapes.kv_key,
            "ffn": shapes.ffn_key,
            "first_layers": tuple(key for key in FIRST_LAYERS_KEYS if key in small.known),
        },
        "fixed": fixed,
        "couplings": _couplings(shapes),
    }


def _couplings(shapes: Shapes) -> tuple[dict[str, Any], ...]:
    blocks = {HEADS * shapes.head_dim: "query_group", KV_HEADS * shapes.head_dim: "head"}
    heads = [{"module": m.name, "side": "out", "block": blocks.get(m.outputs, "fused")} for m in shapes.qkv]
    channels = [{"module": m.name, "side": "out", "block": "one" if m.outputs == shapes.ffn else "fused"} for m in shapes.up]
    return (
        {"kind": "heads", "axes": (*heads, {"module": shapes.out.name, "side": "in", "block": "query_group"})},
        {"kind": "ffn", "axes": (*channels, {"module": shapes.down.name, "side": "in", "block": "one"})},
    )


# The position of each matrix.


def _shapes(small: SmallModel) -> Shapes:
    """Returns the role of every matrix.

    Raises:
        ModelError: It is no causal language model of equal layers with one attention and one feed-forward network.
    """
    if not is_causal(small):
        raise ModelError("its predictions depend on later tokens: it is no causal language model")
    _refuse_odd_layers(small)
    matrices = _matrices(small)
    widths = {side for matrix in matrices for side in (matrix.inputs, matrix.outputs)}
    ffn = FFN if FFN in widths else USUAL_FFN
    head_dim = OWN_HEAD_DIM if HEADS * OWN_HEAD_DIM in widths else HEAD_DIM
    kv_key = next((key for key in KV_KEYS if key in small.known), "")
    ffn_key = next(key for key in FFN_KEYS if key in small.known) if ffn == FFN else ""
    down, up = _feed_forward(matrices, ffn)
    others = [matrix for matrix in matrices if matrix not in (down, *up)]
    out, qkv = _attention(others, head_dim, grouped=bool(kv_key), within=f"{small.layers_name}.0")
    return Shapes(out, tuple(qkv), down, tuple(up), head_dim, ffn, kv_key, ffn_key)


def _refuse_odd_layers(small: SmallModel) -> None:
    """Refuses layers that cannot be built singly, or that do not return hidden states (alone or first in a tuple)."""
    kind: Any = type(small.layer)
    try:
        with init_empty_weights(include_buffers=False):
            kind(small.model.config, 0)
    except Exception:  # the constructor needs other arguments
        raise ModelError(f"a layer ({kind.__name__}) is not made from a config and its number") from None
    output = seen_at(small, "")[1]
    if not isinstance(output[0] if isinstance(output, tuple) else output, Tensor):
        raise ModelError(f"a layer ({kind.__name__}) does not return hidden states")


def _matrices(small: SmallModel) -> list[Matrix]:
    """Returns the matrices of a layer; refuses layers of different kinds."""
    found: list[Matrix] = []
    for name, module in small.layer.named_modules():
        if isinstance(module, nn.Linear):
            found.append(Matrix(name, module.weight.shape[1], module.weight.shape[0]))
        elif isinstance(module, Conv1D):
            found.append(Matrix(name, *module.weight.shape))
    shapes = [{name: parameter.shape for name, parameter in layer.named_parameters()} for layer in small.layers]
    different = next((index for index, shape in enumerate(shapes) if shape != shapes[0]), None)
    if different is not None:
        raise ModelError(f"its layers 0 and {different} are of different kinds")
    return found


def _feed_forward(matrices: Sequence[Matrix], ffn: int) -> tuple[Matrix, list[Matrix]]:
    """Returns the matrix that writes the stream, and those that read it."""
    down = [matrix for matrix in matrices if matrix.inputs == ffn and matrix.outputs == WIDTH]
    up = [matrix for matrix in matrices if matrix.inputs == WIDTH and matrix.outputs in (ffn, 2 * ffn)]
    if len(down) != 1 or not up:
        raise ModelError("it has not one feed-forward network in every layer")
    return down[0], up


def _attention(matrices: Sequence[Matrix], head_dim: int, *, grouped: bool, within: str) -> tuple[Matrix, list[Matrix]]:
    """Returns the matrix that writes the stream, and those of queries, keys and values.

    Args:
        matrices: Matrices of a layer, without those of the feed-forward network.
        head_dim: Channels of a head.
        grouped: Whether the family has a number of key-value heads.
        within: Name of the layer, for messages.
    """
    queries, keys = HEADS * head_dim, KV_HEADS * head_dim
    allowed = (queries, queries + 2 * keys, keys) if grouped else (queries, 3 * queries)
    writing = [matrix for matrix in matrices if matrix.inputs == queries and matrix.outputs == WIDTH]
    if not writing:
        raise ModelError("it has no attention that writes the stream through one matrix")
    out = writing[-1]  # if all are square, the last one
    rest = [matrix for matrix in matrices if matrix is not out]
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


def _stream_norms(small: SmallModel, shapes: Shapes) -> list[str]:
    return _norms_of_width(small.layer, tuple(f"{part}." for part in (shapes.attention, shapes.mlp) if part))


# What cannot be cut.


def _unreplaceable(small: SmallModel, shapes: Shapes) -> list[dict[str, Any]]:
    """Returns the parts that our stand-ins cannot replace, because a silent part returns something else than its stand-in."""
    found: list[dict[str, Any]] = []
    for part, name, matrix in (
        ("attention", shapes.attention, shapes.out),
        ("mlp", shapes.mlp or shapes.down.name, shapes.down),
    ):
        with silent(small, matrix.name):
            inputs, output = seen_at(small, name)
        written = _written(part, inputs, output)
        if written is None or bool(written.any()):
            found.append(_fixed(part, f"what its {name} returns is not what can stand in its place"))
    return found


def _unscalable(small: SmallModel, shapes: Shapes) -> list[dict[str, Any]]:
    """Returns refusals for heads, if the family's classes do not accept other numbers of heads."""
    width = WIDTH if shapes.own_head_dim else OTHER_HEADS * HEAD_DIM
    if small_model(small.model_type, small.known, small.head_dim, (OTHER_HEADS, OTHER_KV_HEADS), width) is None:
        return [_fixed(kind, "its classes do not take every number of heads") for kind in ("heads", "query_heads")]
    if shapes.own_head_dim:
        return []
    readers = [name for name, module in small.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    own = {f"{small.layers_name}.{index}.{matrix.name}" for index in range(LAYERS) for matrix in (shapes.out, shapes.down)}
    clash = next((name for name in readers if name not in own and name.rpartition(".")[2] in shapes.writers), None)
    if clash is None:
        return []
    return [_fixed(kind, f"'{clash}' has the name of a matrix that writes the stream") for kind in ("heads", "query_heads")]


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
