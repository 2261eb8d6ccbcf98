"""Rules of the interpreter: the effect of each operator on channels.

There are few kinds. Pointwise operators join the channels that they combine. Layout operators move channels. A weight matrix reads
channels and writes new ones. A product of two activations, as in attention, joins the channels of a head. A reduction computes one number
from several channels. :class:`~regraft.groups.traced.interpreter.Follower` refuses every other operator.

Three examples, in which a channel is the number of its label and ``=`` joins two of them:

- *A feed-forward network*, ``down(relu(up(x)))``. ``up`` reads 1 2 and writes 3 4 5, so that its result has the labels 3 4 5 in every
  row. ``relu`` is pointwise and keeps them. ``down`` reads 6 7 8: 3=6, 4=7, 5=8. Channel 3=6 is a unit: row 0 of ``up`` and column 0 of
  ``down`` are cut together.
- *A gate*, ``up(x) * gate(x)``. The two write 3 4 and 5 6. The product is pointwise: 3=5, 4=6, so that a unit has a row in both.
- *Attention of two heads of width 2*. ``q`` writes 1 2 3 4 and ``k`` writes 5 6 7 8. ``view`` moves the labels with the numbers: head 0
  has 1 2 and 5 6. ``q @ k.T`` sums over all channels of a head, which joins them: 1=2=5=6 and 3=4=7=8. A unit is a whole head.
"""
# pyright: standard
# (torch.fx and NumPy leave most types unknown)

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from regraft.groups.traced.broadcast import broadcast, constant_along, dims_of, grown, heads_repeated, ordinals, rows_of
from regraft.groups.traced.interpreter import Call, Follower
from regraft.groups.traced.labels import AxisLabels
from regraft.groups.traced.values import Channels, Matrix, Operands, Plain, Value, operands_in

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
# Other names of pointwise operators, which torch does not mark as such.
POINTWISE = "multiply subtract divide negative absolute"
ALONG = "softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp sort topk cummax"


def pointwise(state: Follower, call: Call) -> Value:
    """A pointwise operator joins the channels of its operands element by element."""
    operands = call.operands
    if operands.matrices:
        return _scaled_matrix(state, call, operands)
    shape = torch.broadcast_shapes(*operands.shapes)
    channels = [value for value in operands.channels if not value.derived]
    if not channels:
        return Channels(torch.stack([value.labels.expand(shape) for value in operands.channels]).amax(dim=0), derived=True)
    activations = [value for value in channels if value.parameter is None] or channels[:1]
    merged = _joined(state, call, activations, shape)
    for other in channels:
        if other.parameter is not None and other is not activations[0]:
            labels = other.labels.expand(shape)
            state.space.join_parameter(labels.numpy(), merged.numpy())
            merged = torch.where(merged > 0, merged, labels)
    for constant in operands.plains:
        state.note_constant(call, merged, constant)
    parameter = channels[0].parameter if len(channels) == 1 and merged.shape == channels[0].labels.shape else None
    return Channels(merged.contiguous(), parameter, _is_square(call))


def _joined(state: Follower, call: Call, activations: Sequence[Channels], shape: Sequence[int]) -> Tensor:
    """Returns the labels of a sum or product of activations, after joining their channels."""
    merged = broadcast(state, activations[0], shape, activations)
    for other in activations[1:]:
        labels = broadcast(state, other, shape, activations)
        state.space.join(merged.numpy(), labels.numpy())
        merged = torch.where(merged > 0, merged, labels)
    if len(activations) > 1:
        state.sums.append((call.node, int(merged.max())))
    return merged


def identity(state: Follower, call: Call) -> Any:
    """A change of dtype, a copy or an inactive dropout leaves the channels as they are."""
    first = call.args[0]
    return (first, Plain(first.shape)) if isinstance(call.outcome, tuple) else first


def layout(state: Follower, call: Call) -> Any:
    """A layout operator moves channels: the same operator is applied to their labels."""
    operands = call.operands
    if operands.matrices:
        return _turned(state, call)
    moved = _run(state, call, lambda value: value.labels)
    outputs = tree_leaves(moved)
    sources = operands.channels
    first = sources[0]
    if len(sources) == 1 and not first.derived and sum(part.numel() for part in outputs) > first.labels.numel():
        outputs = _copied(state, call, first.labels, outputs)
    derived = all(value.derived for value in sources)
    if not derived and any(value.derived for value in sources):
        raise state.refuse(call.node, "it puts channels and numbers computed from them into one tensor")
    same = len(outputs) == 1 and outputs[0].numel() == first.labels.numel()
    parameter, squared = first.parameter if same else None, first.squared and len(sources) == 1
    found = iter([Channels(part.contiguous(), parameter, squared, derived) for part in outputs])
    return call.for_each_output(lambda _: next(found))


def linear(state: Follower, call: Call) -> Value:
    """A linear layer ``x @ weight.T + bias``; weight (out, in)."""
    match call.args[1]:
        case Matrix(axes=(writes, reads)):
            return _through(state, call, call.args[0], reads, writes, call.arg(2, "bias"))
        case _:
            raise state.refuse(call.node, "its weight is computed, not a parameter")


def addmm(state: Follower, call: Call) -> Value:
    """A linear layer ``bias + x @ weight``; weight (in, out)."""
    match call.args[2]:
        case Matrix(axes=(reads, writes)):
            return _through(state, call, call.args[1], reads, writes, call.args[0])
        case _:
            raise state.refuse(call.node, "its weight is computed, not a parameter")


def matmul(state: Follower, call: Call) -> Value:
    """A product ``a @ b`` with a weight matrix, or of two activations as in attention."""
    match call.args[:2]:
        case first, Matrix(axes=(reads, writes)):
            return _through(state, call, first, reads, writes, None)
        case (_, Matrix()) | (Matrix(), _):
            raise state.refuse(call.node, "a stack of matrices, as mixtures of experts have, is not followed")
        case _:
            return Channels(_product(state, call, call.args[0], call.args[1]))


def baddbmm(state: Follower, call: Call) -> Value:
    """A batched product ``bias + a @ b``."""
    product = Channels(_product(state, call, call.args[1], call.args[2]))
    return pointwise(state, Call(call.node, "add", (product, call.args[0]), {}))


def attention(state: Follower, call: Call) -> Value:
    """Scaled dot-product attention in one operator; query (…, heads, tokens, dim)."""
    match call.args[:3]:
        case Channels() as query, Channels() as key, Channels() as value:
            key_turned = Channels(key.labels.transpose(-1, -2))
        case _:
            raise state.refuse(call.node, "one of query, key and value has no channels")
    if call.arg(7, "enable_gqa", False):
        heads = query.labels.shape[-3]
        key_turned, value = (Channels(heads_repeated(state, part.labels, heads)) for part in (key_turned, value))
    scores = Channels(_product(state, call, query, key_turned))
    for mask in operands_in(call.arg(3, "attn_mask")).plains:
        state.note_constant(call, scores.labels, mask)
    return Channels(_product(state, call, scores, value))


def embedding(state: Follower, call: Call) -> Value:
    """An embedding: a row of a table for each token or position; weight (rows, channels)."""
    match call.args[:2]:
        case Matrix(axes=(_, writes)), Plain(shape=shape):
            labels = torch.from_numpy(writes.labels)
            state.sides.setdefault((writes.parameter, writes.axis), "out")
            return Channels(labels.expand(*shape, len(labels)).contiguous())
        case _:
            raise state.refuse(call.node, "its table is not a parameter")


def layer_norm(state: Follower, call: Call) -> Any:
    """A layer norm: mean and variance over the last axes."""
    return _normalised(state, call, "layer")


def rms_norm(state: Follower, call: Call) -> Any:
    """An RMS norm: mean of squares over the last axes."""
    return _normalised(state, call, "rms")


def reduction(state: Follower, call: Call) -> Any:
    """A reduction to one number: it keeps the label of a single channel, and is recorded as a statistic of several channels."""
    if len(call.operands.shapes) > 1:
        return pointwise(state, call)  # the larger or smaller of two tensors
    value = _only_channels(state, call, "it reduces a matrix of weights")
    dims = dims_of(call.args[1:2], call.kwargs, value.labels.dim())
    kept = constant_along(value.labels, dims)
    if kept is None:
        state.note_statistic(call, "rms" if call.name == "mean" and value.squared else "other", rows_of(value.labels, dims))
    labels = value.labels.amax(dim=dims, keepdim=True)
    derived = kept is None or value.derived
    return call.for_each_output(lambda fake: Channels(labels.reshape(tuple(fake.shape)).contiguous(), derived=derived))


def along(state: Follower, call: Call) -> Any:
    """A softmax, cumulative sum or sort: allowed along tokens, refused along channels.

    A softmax over the tokens and a sink of the same head joins the two: they are removed together.
    """
    value = call.args[0]
    dims = dims_of(call.args[1:2] if call.name != "topk" else call.args[2:3], call.kwargs, value.labels.dim(), default=-1)
    kept = constant_along(value.labels, dims)
    rows = rows_of(value.labels, dims)
    of_two = rows.shape[1] > 2 and bool(((rows == rows[:, :1]) | (rows == rows[:, -1:])).all())
    if kept is None and of_two and "softmax" in call.name and not value.derived:
        joined = torch.from_numpy(state.space.join_all(rows.numpy()))
        kept = joined.reshape([1 if axis in dims else size for axis, size in enumerate(value.labels.shape)])
    if kept is None:
        raise state.refuse(call.node, "it mixes channels with one another")
    return call.for_each_output(lambda fake: Channels(kept.expand(fake.shape).contiguous(), derived=value.derived))


def copy(state: Follower, call: Call) -> Value:
    """An in-place copy, which overwrites one tensor with another."""
    target, source = call.args[:2]
    match source:
        case Channels():
            return Channels(source.labels.expand(target.shape).contiguous())
        case _:
            return Plain(target.shape)


def _through(state: Follower, call: Call, x: Value, reads: AxisLabels, writes: AxisLabels, bias: Value | None) -> Value:
    """Returns the new channels that a weight matrix writes, after joining the channels of the last axis to those that it reads."""
    leading = x.shape[:-1]
    state.sides.setdefault((reads.parameter, reads.axis), "in")
    state.sides.setdefault((writes.parameter, writes.axis), "out")
    match x:
        case Matrix():
            raise state.refuse(call.node, "it multiplies two parameters")
        case Channels():
            _read(state, call, x, reads)
        case Plain():
            pass
    labels = torch.from_numpy(writes.labels)
    written = Channels(labels.expand(*leading, len(labels)).contiguous())
    match bias:
        case None:
            pass
        case Channels(shape=(_,)):
            state.space.join(bias.labels.numpy(), writes.labels)
        case _:
            return pointwise(state, Call(call.node, "add", (written, bias), {}))
    return written


def _read(state: Follower, call: Call, x: Channels, reads: AxisLabels) -> None:
    """Joins the channels of the last axis to those that a matrix reads."""
    rows = x.labels.reshape(-1, x.labels.shape[-1])
    column = rows.amax(dim=0)
    if bool(((rows != column) & (rows > 0)).any()):
        raise state.refuse(call.node, "one matrix serves several heads")
    if x.derived and constant_along(column, [0]) is None:
        raise state.refuse(call.node, "a matrix reads numbers that were computed from several channels each")
    if not x.derived:
        state.space.join(column.numpy(), reads.labels)


def _product(state: Follower, call: Call, first: Value, second: Value) -> Tensor:
    """Returns the labels of ``first @ second`` for two activations, after joining all channels that are summed over."""
    match first, second:
        case (Matrix(), _) | (_, Matrix()):
            raise state.refuse(call.node, "it multiplies a stack of weights")
        case Channels(labels=a, derived=False), Channels(labels=b, derived=False):
            return _of_two(state, a, b)
        case _:
            return _against_constant(state, call, first, second)


def _of_two(state: Follower, a: Tensor, b: Tensor) -> Tensor:
    """Returns the labels of ``a @ b`` from the labels of the factors."""
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
    outcome = tuple(call.outcome.shape)
    result = torch.zeros(outcome, dtype=torch.int64)
    for value, dim in ((first, -1), (second, -2)):
        for channels in operands_in(value).channels:
            kept = constant_along(channels.labels, [channels.labels.dim() + dim])
            if kept is None:
                raise state.refuse(call.node, "it mixes channels with one another by a constant matrix")
            result = torch.maximum(result, kept.expand(outcome))
    return result


def _normalised(state: Follower, call: Call, kind: str) -> Any:
    value, shape = _only_channels(state, call, "it normalises a matrix of weights"), call.args[1]
    dims = list(range(value.labels.dim() - len(shape), value.labels.dim()))
    if constant_along(value.labels, dims) is None:
        state.note_statistic(call, kind, rows_of(value.labels, dims))
    names = ((2, "weight"), (3, "bias")) if kind == "layer" else ((2, "weight"),)
    for position, name in names:
        for parameter in operands_in(call.arg(position, name)).channels:
            state.space.join_parameter(parameter.labels.expand(value.labels.shape).numpy(), value.labels.numpy())
    outputs = chain([Channels(value.labels)], repeat(None))  # the normalised tensor, then statistics
    return call.for_each_output(lambda fake: next(outputs) or Plain(tuple(fake.shape)))


def _only_channels(state: Follower, call: Call, otherwise: str) -> Channels:
    """Returns the first operand; refuses one without channels of its own, for the reason given."""
    match call.args[0]:
        case Channels() as value:
            return value
        case _:
            raise state.refuse(call.node, otherwise)


def _scaled_matrix(state: Follower, call: Call, operands: Operands) -> Matrix:
    """Returns the weight matrix of a product with a single number, which leaves its channels as they are."""
    _, *others = operands.shapes
    if len(operands.matrices) > 1 or any(np.prod(shape) > 1 for shape in others):
        raise state.refuse(call.node, "it computes one weight from another")
    return operands.matrices[0]


def _turned(state: Follower, call: Call) -> Matrix:
    """Returns a weight matrix with its axes permuted."""
    matrix = call.args[0]
    if call.name not in ("t", "transpose", "permute", "numpy_T", "mT", "T", "swapaxes", "movedim"):
        match matrix:
            case Matrix(shape=shape) if shape == tuple(call.outcome.shape):
                return matrix
            case _:
                pass
        raise state.refuse(call.node, "it takes a matrix of weights apart")
    probe = torch.empty([index + 2 for index in range(len(matrix.axes))])
    target: Any = call.node.target
    order = [size - 2 for size in target(probe, *call.args[1:], **call.kwargs).shape]
    return Matrix(tuple(matrix.axes[index] for index in order))


def _run(state: Follower, call: Call, labels_of: Callable[[Channels], Tensor]) -> Any:
    """Runs a layout operator on labels. Constant operands get label 0; constant indices keep their values."""

    def real(argument: Any) -> Any:
        match argument:
            case Channels():
                return labels_of(argument)
            case Plain() if call.name in ("cat", "concat", "stack"):
                return torch.zeros(argument.shape, dtype=torch.int64)
            case Plain() if call.name.endswith("_as"):
                return torch.empty(argument.shape)
            case Plain(known=None):
                raise state.refuse(call.node, "it picks channels by an index that is computed")
            case Plain():
                return argument.known
            case _:
                return argument

    target: Any = call.node.target
    args: Any = map_aggregate(call.args, real)
    kwargs: Any = map_aggregate(dict(call.kwargs), real)
    if call.name in ("constant_pad_nd", "pad"):
        return torch.nn.functional.pad(args[0], list(call.args[1]))
    return target(*args, **kwargs)


def _copied(state: Follower, call: Call, labels: Tensor, moved: Sequence[Tensor]) -> list[Tensor]:
    """Gives every copy of a channel a new label, when an operator makes several copies."""
    places = torch.arange(labels.numel()).reshape(labels.shape)
    came = tree_leaves(_run(state, call, lambda _: places))
    flat = torch.cat([part.reshape(-1) for part in came])
    fresh = state.space.copies(torch.cat([part.reshape(-1) for part in moved]).numpy(), ordinals(flat.numpy()))
    sizes = [part.numel() for part in moved]
    return [piece.reshape(part.shape) for piece, part in zip(torch.from_numpy(fresh).split(sizes), moved, strict=True)]


def shape_only(state: Follower, call: Call) -> Plain:
    """An operator that uses only the shape of its operand, such as ``zeros_like`` in place of a removed part; gives a constant."""
    return Plain(tuple(call.outcome.shape))


def _is_square(call: Call) -> bool:
    if call.name == "pow":
        return call.args[1] == 2
    return call.name == "square" or (call.name in ("mul", "multiply") and call.node.args[0] is call.node.args[1])


RULES: dict[str, Rule] = {
    "pointwise": pointwise,
    **dict.fromkeys(POINTWISE.split(), pointwise),
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
