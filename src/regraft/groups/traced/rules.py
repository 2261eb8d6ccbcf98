"""Rules of the interpreter: the effect of each operator on channels.

There are few kinds. Pointwise operators join the channels that they combine. Layout operators move channels. A weight matrix reads
channels and writes new ones. A product of two activations, as in attention, joins the channels of a head. A reduction computes one number
from several channels. :class:`~regraft.groups.traced.interpreter.Follower` refuses every other operator.
"""
# pyright: standard
# (torch.fx and NumPy leave most types unknown)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.groups.traced.broadcast import broadcast, constant_along, dims_of, grown, heads_repeated, ordinals, rows_of
from regraft.groups.traced.interpreter import Call, Follower
from regraft.groups.traced.labels import AxisLabels
from regraft.groups.traced.values import Channels, Matrix, Plain, Value

Rule = Callable[[Follower, Call], Any]

IDENTITY = (
    "to _to_copy type_as contiguous clone alias detach lift_fresh lift_fresh_copy dropout native_dropout feature_dropout "
    "alpha_dropout requires_grad"
)
LAYOUT = (
    "view _unsafe_view reshape transpose permute squeeze unsqueeze slice select split split_with_sizes chunk cat concat stack "
    "expand broadcast_to repeat repeat_interleave tile flatten unflatten t numpy_T mT T narrow unbind flip roll index index_select "
    "gather movedim swapaxes tensor_split view_as expand_as constant_pad_nd pad unfold diagonal"
)
SHAPE_ONLY = "zeros_like ones_like full_like new_zeros new_ones new_full"
REDUCTIONS = "mean sum amax amin prod var std logsumexp linalg_vector_norm norm any all argmax argmin max min median"
ALONG = "softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp sort topk cummax"


def pointwise(state: Follower, call: Call) -> Value:
    """A pointwise operator joins the channels of its operands element by element."""
    values = call.values()
    if any(isinstance(value, Matrix) for value in values):
        return _scaled_matrix(state, call, values)
    every = [value for value in values if isinstance(value, Channels)]
    plains = [value for value in values if isinstance(value, Plain)]
    shape = torch.broadcast_shapes(*(_shape_of(value) for value in values))
    channels = [value for value in every if not value.derived]
    if not channels:
        return Channels(torch.stack([value.labels.expand(shape) for value in every]).amax(dim=0), derived=True)
    activations = [value for value in channels if value.parameter is None] or channels[:1]
    merged = broadcast(state, activations[0], shape, activations)
    for other in activations[1:]:
        labels = broadcast(state, other, shape, activations)
        state.space.join(merged.numpy(), labels.numpy())
        merged = torch.where(merged > 0, merged, labels)
    if len(activations) > 1:
        state.sums.append((call.node, int(merged.max())))
    for other in channels:
        if other.parameter is not None and other is not activations[0]:
            labels = other.labels.expand(shape)
            state.space.join_parameter(labels.numpy(), merged.numpy())
            merged = torch.where(merged > 0, merged, labels)
    for constant in plains:
        state.note_constant(call, merged, constant)
    parameter = channels[0].parameter if len(channels) == 1 and merged.shape == channels[0].labels.shape else None
    return Channels(merged.contiguous(), parameter, _is_square(call))


def identity(state: Follower, call: Call) -> Any:
    """A change of dtype, a copy or an inactive dropout leaves the channels as they are."""
    first = call.args[0]
    return (first, Plain(_shape_of(first))) if isinstance(call.node.meta.get("val"), tuple) else first


def layout(state: Follower, call: Call) -> Any:
    """A layout operator moves channels: the same operator is applied to their labels."""
    values = call.values()
    if any(isinstance(value, Matrix) for value in values):
        return _turned(state, call)
    moved = _run(state, call, lambda value: value.labels)
    single = isinstance(moved, Tensor)
    outputs = (moved,) if single else tuple(moved)
    sources = [value for value in values if isinstance(value, Channels)]
    if len(sources) == 1 and not sources[0].derived and sum(part.numel() for part in outputs) > sources[0].labels.numel():
        outputs = _copied(state, call, sources[0].labels, outputs)
    first = sources[0]
    same = len(outputs) == 1 and outputs[0].numel() == first.labels.numel()
    derived = all(value.derived for value in sources)
    if not derived and any(value.derived for value in sources):
        raise state.refuse(call.node, "it puts channels and numbers computed from them into one tensor")
    found = tuple(
        Channels(part.contiguous(), first.parameter if same else None, first.squared and len(sources) == 1, derived) for part in outputs
    )
    return found[0] if single else found


def linear(state: Follower, call: Call) -> Value:
    """A linear layer ``x @ weight.T + bias``; weight (out, in)."""
    weight = call.args[1]
    if not isinstance(weight, Matrix) or len(weight.axes) != 2:
        raise state.refuse(call.node, "its weight is computed, not a parameter")
    return _through(state, call, call.args[0], weight.axes[1], weight.axes[0], call.arg(2, "bias"))


def addmm(state: Follower, call: Call) -> Value:
    """A linear layer ``bias + x @ weight``; weight (in, out)."""
    if not isinstance(call.args[2], Matrix):
        raise state.refuse(call.node, "its weight is computed, not a parameter")
    return _through(state, call, call.args[1], call.args[2].axes[0], call.args[2].axes[1], call.args[0])


def matmul(state: Follower, call: Call) -> Value:
    """A product ``a @ b`` with a weight matrix, or of two activations as in attention."""
    first, second = call.args[0], call.args[1]
    if isinstance(second, Matrix) and len(second.axes) == 2:
        return _through(state, call, first, second.axes[0], second.axes[1], None)
    if isinstance(first, Matrix) or isinstance(second, Matrix):
        raise state.refuse(call.node, "a stack of matrices, as mixtures of experts have, is not followed")
    return Channels(_product(state, call, first, second))


def baddbmm(state: Follower, call: Call) -> Value:
    """A batched product ``bias + a @ b``."""
    product = Channels(_product(state, call, call.args[1], call.args[2]))
    return pointwise(state, Call(call.node, "add", (product, call.args[0]), {}))


def attention(state: Follower, call: Call) -> Value:
    """Scaled dot-product attention in one operator; query (…, heads, tokens, dim)."""
    query, key, value = call.args[:3]
    key_turned = Channels(key.labels.transpose(-1, -2)) if isinstance(key, Channels) else key
    if not all(isinstance(part, Channels) for part in (query, key_turned, value)):
        raise state.refuse(call.node, "one of query, key and value has no channels")
    if call.arg(7, "enable_gqa", False):
        heads = query.labels.shape[-3]
        key_turned, value = (Channels(heads_repeated(state, part.labels, heads)) for part in (key_turned, value))
    scores = Channels(_product(state, call, query, key_turned))
    mask = call.arg(3, "attn_mask")
    if isinstance(mask, Plain):
        state.note_constant(call, scores.labels, mask)
    return Channels(_product(state, call, scores, value))


def embedding(state: Follower, call: Call) -> Value:
    """An embedding: a row of a table for each token or position; weight (rows, channels)."""
    table, indices = call.args[0], call.args[1]
    if not isinstance(table, Matrix) or not isinstance(indices, Plain):
        raise state.refuse(call.node, "its table is not a parameter")
    labels = torch.from_numpy(table.axes[1].labels)
    state.sides.setdefault((table.axes[1].parameter, table.axes[1].axis), "out")
    return Channels(labels.expand(*indices.shape, len(labels)).contiguous())


def layer_norm(state: Follower, call: Call) -> Any:
    """A layer norm: mean and variance over the last axes."""
    return _normalised(state, call, "layer")


def rms_norm(state: Follower, call: Call) -> Any:
    """An RMS norm: mean of squares over the last axes."""
    return _normalised(state, call, "rms")


def reduction(state: Follower, call: Call) -> Any:
    """A reduction to one number: it keeps the label of a single channel, and is recorded as a statistic of several channels."""
    if isinstance(call.arg(1, "other"), Channels | Matrix | Plain):
        return pointwise(state, call)  # the larger or smaller of two tensors
    value = call.args[0]
    if not isinstance(value, Channels):
        raise state.refuse(call.node, "it reduces a matrix of weights")
    dims = dims_of(call.args[1:2], call.kwargs, value.labels.dim())
    kept = constant_along(value.labels, dims)
    if kept is None:
        state.note_statistic(call, "rms" if call.name == "mean" and value.squared else "other", rows_of(value.labels, dims))
    labels = value.labels.amax(dim=dims, keepdim=True)
    derived = kept is None or value.derived
    outcome = call.node.meta["val"]
    shapes = [tuple(part.shape) for part in (outcome if isinstance(outcome, tuple | list) else (outcome,))]
    found = tuple(Channels(labels.reshape(shape).contiguous(), derived=derived) for shape in shapes)
    return found if isinstance(outcome, tuple | list) else found[0]


def along(state: Follower, call: Call) -> Any:
    """A softmax, cumulative sum or sort: allowed along tokens, refused along channels."""
    value = call.args[0]
    dims = dims_of(call.args[1:2] if call.name != "topk" else call.args[2:3], call.kwargs, value.labels.dim(), default=-1)
    kept = constant_along(value.labels, dims)
    if kept is None:
        raise state.refuse(call.node, "it mixes channels with one another")
    outcome = call.node.meta["val"]
    if isinstance(outcome, Tensor):
        return Channels(kept.expand(outcome.shape).contiguous(), derived=value.derived)
    return tuple(Channels(kept.expand(part.shape).contiguous(), derived=value.derived) for part in outcome)


def copy(state: Follower, call: Call) -> Value:
    """An in-place copy, which overwrites one tensor with another."""
    source = call.args[1]
    shape = _shape_of(call.args[0])
    if isinstance(source, Channels):
        return Channels(source.labels.expand(shape).contiguous())
    return Plain(shape)


def _through(state: Follower, call: Call, x: Value, reads: AxisLabels, writes: AxisLabels, bias: Value | None) -> Value:
    """Returns the new channels that a weight matrix writes, after joining the channels of the last axis to those that it reads."""
    leading = _shape_of(x)[:-1]
    state.sides.setdefault((reads.parameter, reads.axis), "in")
    state.sides.setdefault((writes.parameter, writes.axis), "out")
    if isinstance(x, Matrix):
        raise state.refuse(call.node, "it multiplies two parameters")
    if isinstance(x, Channels):
        rows = x.labels.reshape(-1, x.labels.shape[-1])
        column = rows.amax(dim=0)
        if bool(((rows != column) & (rows > 0)).any()):
            raise state.refuse(call.node, "one matrix serves several heads")
        if x.derived and constant_along(column, [0]) is None:
            raise state.refuse(call.node, "a matrix reads numbers that were computed from several channels each")
        if not x.derived:
            state.space.join(column.numpy(), reads.labels)
    labels = torch.from_numpy(writes.labels)
    if isinstance(bias, Channels) and bias.labels.dim() == 1:
        state.space.join(bias.labels.numpy(), writes.labels)
    elif bias is not None:
        return pointwise(state, Call(call.node, "add", (Channels(labels.expand(*leading, len(labels))), bias), {}))
    return Channels(labels.expand(*leading, len(labels)).contiguous())


def _product(state: Follower, call: Call, first: Value, second: Value) -> Tensor:
    """Returns the labels of ``first @ second`` for two activations, after joining all channels that are summed over."""
    if isinstance(first, Matrix) or isinstance(second, Matrix):
        raise state.refuse(call.node, "it multiplies a stack of weights")
    if not isinstance(first, Channels) or not isinstance(second, Channels) or first.derived or second.derived:
        return _against_constant(state, call, first, second)
    a, b = first.labels, second.labels
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = grown(state, a, (*batch, *a.shape[-2:]))
    b = grown(state, b, (*batch, *b.shape[-2:]))
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    rows, columns = a.shape[1], b.shape[2]
    met = torch.cat(
        [
            a[:, :, None, :].expand(-1, rows, columns, -1),
            b.transpose(1, 2)[:, None, :, :].expand(-1, rows, columns, -1),
        ],
        dim=-1,
    )
    chosen = torch.from_numpy(state.space.join_all(met.reshape(-1, met.shape[-1]).numpy()))
    state.space.attended.append(np.unique(chosen.numpy()))
    # An output element belongs to the channel of the second factor (the values of attention) where that has one channel in every row.
    result = chosen.reshape(-1, rows, columns)
    constant = b.amax(dim=1, keepdim=True)
    own = ((b == constant).all(dim=1, keepdim=True) & (constant > 0)).expand(-1, rows, -1)
    return torch.where(own, constant.expand(-1, rows, -1), result).reshape(*batch, rows, columns)


def _against_constant(state: Follower, call: Call, first: Value, second: Value) -> Tensor:
    """Returns the labels of a product with a constant, which may sum over tokens but not over channels."""
    outcome = tuple(call.node.meta["val"].shape)
    result = torch.zeros(outcome, dtype=torch.int64)
    for value, dim in ((first, -1), (second, -2)):
        if isinstance(value, Channels):
            kept = constant_along(value.labels, [value.labels.dim() + dim])
            if kept is None:
                raise state.refuse(call.node, "it mixes channels with one another by a constant matrix")
            result = torch.maximum(result, kept.expand(outcome))
    return result


def _normalised(state: Follower, call: Call, kind: str) -> Any:
    value, shape = call.args[0], call.args[1]
    if not isinstance(value, Channels):
        raise state.refuse(call.node, "it normalises a matrix of weights")
    dims = list(range(value.labels.dim() - len(shape), value.labels.dim()))
    if constant_along(value.labels, dims) is None:
        state.note_statistic(call, kind, rows_of(value.labels, dims))
    names = ((2, "weight"), (3, "bias")) if kind == "layer" else ((2, "weight"),)
    for position, name in names:
        parameter = call.arg(position, name)
        if isinstance(parameter, Channels):
            state.space.join_parameter(parameter.labels.expand(value.labels.shape).numpy(), value.labels.numpy())
    normal = Channels(value.labels)
    outcome = call.node.meta["val"]
    if isinstance(outcome, tuple | list):
        return (normal, *(Plain(tuple(part.shape)) for part in outcome[1:]))
    return normal


def _scaled_matrix(state: Follower, call: Call, values: Sequence[Value]) -> Matrix:
    """Returns the weight matrix of a product with a single number, which leaves its channels as they are."""
    matrices = [value for value in values if isinstance(value, Matrix)]
    if len(matrices) > 1 or any(np.prod(_shape_of(value)) > 1 for value in values if value is not matrices[0]):
        raise state.refuse(call.node, "it computes one weight from another")
    return matrices[0]


def _turned(state: Follower, call: Call) -> Matrix:
    """Returns a weight matrix with its axes permuted."""
    matrix = call.args[0]
    if call.name not in ("t", "transpose", "permute", "numpy_T", "mT", "T", "swapaxes", "movedim"):
        shape = tuple(call.node.meta["val"].shape)
        if isinstance(matrix, Matrix) and shape == _shape_of(matrix):
            return matrix
        raise state.refuse(call.node, "it takes a matrix of weights apart")
    probe = torch.empty([index + 2 for index in range(len(matrix.axes))])
    target: Any = call.node.target
    order = [size - 2 for size in target(probe, *call.args[1:], **call.kwargs).shape]
    return Matrix(tuple(matrix.axes[index] for index in order))


def _run(state: Follower, call: Call, labels_of: Callable[[Channels], Tensor]) -> Any:
    """Runs a layout operator on labels. Constant operands get label 0; constant indices keep their values."""
    joining = call.name in ("cat", "concat", "stack")

    def real(argument: Any) -> Any:
        if isinstance(argument, Channels):
            return labels_of(argument)
        if isinstance(argument, Plain):
            if joining:
                return torch.zeros(argument.shape, dtype=torch.int64)
            if call.name.endswith("_as"):
                return torch.empty(argument.shape)
            if argument.known is None:
                raise state.refuse(call.node, "it picks channels by an index that is computed")
            return argument.known
        if isinstance(argument, list | tuple):
            return type(argument)(real(part) for part in argument)
        return argument

    target: Any = call.node.target
    if call.name in ("constant_pad_nd", "pad"):
        return torch.nn.functional.pad(real(call.args[0]), list(call.args[1]))
    return target(*(real(argument) for argument in call.args), **{key: real(value) for key, value in call.kwargs.items()})


def _copied(state: Follower, call: Call, labels: Tensor, moved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gives every copy of a channel a new label, when an operator makes several copies."""
    places = torch.arange(labels.numel()).reshape(labels.shape)
    came = _run(state, call, lambda _: places)
    parts = (came,) if isinstance(came, Tensor) else tuple(came)
    flat = torch.cat([part.reshape(-1) for part in parts])
    fresh = state.space.copies(torch.cat([part.reshape(-1) for part in moved]).numpy(), ordinals(flat.numpy()))
    sizes = [part.numel() for part in moved]
    return tuple(piece.reshape(part.shape) for piece, part in zip(torch.from_numpy(fresh).split(sizes), moved, strict=True))


def shape_only(state: Follower, call: Call) -> Plain:
    """An operator that uses only the shape of its operand, such as ``zeros_like`` in place of a removed part; gives a constant."""
    return Plain(tuple(call.node.meta["val"].shape))


def _is_square(call: Call) -> bool:
    if call.name == "pow":
        return call.args[1] == 2
    return call.name == "square" or (call.name == "mul" and call.node.args[0] is call.node.args[1])


def _shape_of(value: Value) -> tuple[int, ...]:
    if isinstance(value, Matrix):
        return tuple(axis.size for axis in value.axes)
    return tuple(value.labels.shape) if isinstance(value, Channels) else value.shape


RULES: dict[str, Rule] = {
    "pointwise": pointwise,
    "linear": linear,
    "addmm": addmm,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "baddbmm": baddbmm,
    "scaled_dot_product_attention": attention,
    "embedding": embedding,
    "layer_norm": layer_norm,
    "native_layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "_fused_rms_norm": rms_norm,
    "copy": copy,
    **dict.fromkeys(SHAPE_ONLY.split(), shape_only),
    **dict.fromkeys(IDENTITY.split(), identity),
    **dict.fromkeys(LAYOUT.split(), layout),
    **dict.fromkeys(REDUCTIONS.split(), reduction),
    **dict.fromkeys(ALONG.split(), along),
}
