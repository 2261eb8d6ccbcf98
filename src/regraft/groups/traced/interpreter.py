"""Interpreter of an exported graph that follows every channel through it.

``rules`` defines what each kind of operator does to channels. This module walks the graph, records norms and constants on the way, and
refuses operators without a rule. Nothing is guessed: an operator that is not known to keep channels separate stops the walk.
"""
# pyright: standard
# (torch.fx and NumPy leave most types unknown)

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from regraft.errors import ModelError
from regraft.groups.traced.labels import Labels, LabelSpace
from regraft.groups.traced.values import Channels, Matrix, Operands, Plain, operands_in
from regraft.plans import Side

# Largest tensor, in elements, that is computed from constants: indices, positions, slopes.
LARGEST_KNOWN = 1 << 20
REMEDY = "prune a model of a family that docs/families.md lists, or declare this one in models/architectures"


@dataclass(frozen=True)
class Statistic:
    """A number computed from several channels at once, such as the mean square of a norm.

    Attributes:
        node: Name of the node.
        module: Name of the module that computes it.
        kind: ``rms`` for a mean of squares, ``layer`` for mean and variance, ``other`` for anything else.
        rows: Labels of the channels that each such number is computed from, (numbers, channels).
    """

    node: str
    module: str
    kind: str
    rows: Labels


@dataclass(frozen=True)
class Constant:
    """A constant that is combined with channels. Whether it is equal for all units is checked once the units are known.

    Attributes:
        node: Name of the node.
        module: Name of the module that uses it.
        labels: Labels of the channels, one for each pair of a channel and a value of the constant.
        slots: Number of the constant's value in each pair.
    """

    node: str
    module: str
    labels: Labels
    slots: Labels


@dataclass(frozen=True)
class Call:
    """One node of the graph with the values of its arguments.

    Attributes:
        node: The node itself.
        name: Operator without namespace, overload and the underscore of the in-place form.
        args: Positional arguments; each tensor is a :data:`~regraft.groups.traced.values.Value`.
        kwargs: Keyword arguments, with values likewise.
    """

    node: fx.Node
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def operands(self) -> Operands:
        """The tensors among the arguments."""
        return operands_in((self.args, dict(self.kwargs)))

    @property
    def outcome(self) -> Any:
        """The outputs of the operator on weights without values: a tensor, or several in a tuple or list; None where it has none."""
        return self.node.meta.get("val")

    def for_each_output(self, make: Callable[[Tensor], Any]) -> Any:
        """Returns ``make`` of the output, or a tuple with that of each output where the operator has several."""
        return _like(self.outcome, lambda tensor, _: make(tensor))

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Returns an argument by position or name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


class Follower:
    """The state of one walk through a graph.

    Args:
        rules: Operator name to its rule.
        parameter_of: Placeholder name to the parameter's full name.
        constants: Placeholder name to the value of a buffer or lifted constant, where it is known.
    """

    def __init__(self, rules: Mapping[str, Callable[..., Any]], parameter_of: Mapping[str, str], constants: Mapping[str, Tensor]) -> None:
        self.space = LabelSpace()
        self.statistics: list[Statistic] = []
        self.constants: list[Constant] = []
        self.outputs: list[Labels] = []
        self.sums: list[tuple[fx.Node, int]] = []
        self.sides: dict[tuple[str, int], Side] = {}
        self._rules = rules
        self._parameter_of = parameter_of
        self._known = constants

    def walk(self, module: fx.GraphModule, operands: tuple[Any, ...] | None = None) -> Any:
        """Follows every channel through a graph.

        Args:
            module: The graph, with its submodules.
            operands: Values of the placeholders; None for the top graph, whose placeholders are parameters, buffers and inputs.

        Returns:
            The values of the graph's outputs.

        Raises:
            ModelError: An operator mixes channels, or is not known; the message names the node.
        """
        memory: dict[fx.Node, Any] = {}
        given = iter(operands or ())
        for node in module.graph.nodes:
            if node.op == "placeholder":
                memory[node] = self._placeholder(node) if operands is None else next(given)
            elif node.op == "get_attr":
                memory[node] = _attribute(module, node)
            elif node.op == "output":
                found = map_arg(node.args[0], memory.__getitem__)
                if operands is None:
                    self.outputs += [value.labels.numpy() for value in operands_in(found).channels]
                return found
            else:
                self._step(node, memory)
        raise AssertionError("a graph ends with its output")

    def refuse(self, node: fx.Node, why: str) -> ModelError:
        """Returns an error that names the node at which the walk stopped."""
        where = module_of(node)
        inside = f" in '{where}'" if where else ""
        return ModelError(f"cannot follow the channels through node '{node.name}' ({node.target}){inside}: {why}; {REMEDY}")

    def note_statistic(self, call: Call, kind: str, rows: Tensor) -> None:
        """Records that each number was computed from several channels; ``rows`` holds their labels, (numbers, channels)."""
        self.statistics.append(Statistic(call.node.name, module_of(call.node), kind, np.unique(rows.numpy(), axis=0)))

    def note_constant(self, call: Call, labels: Tensor, constant: Plain) -> None:
        """Records which entries of a constant are combined with which channels. A single number is the same for all channels."""
        count = int(np.prod(constant.shape))
        if count <= 1:
            return
        if constant.known is not None:
            slots = torch.unique(constant.known, return_inverse=True)[1].reshape(constant.shape)
        else:
            slots = torch.arange(count).reshape(constant.shape)
        met = torch.stack([labels.reshape(-1), slots.expand(labels.shape).reshape(-1)])[:, labels.reshape(-1) > 0]
        met = np.unique(met.numpy(), axis=1)
        self.constants.append(Constant(call.node.name, module_of(call.node), met[0], met[1]))

    def _placeholder(self, node: fx.Node) -> Any:
        meta = node.meta.get("val")
        shape = tuple(meta.shape) if isinstance(meta, Tensor) else ()
        if node.name in self._parameter_of:
            name = self._parameter_of[node.name]
            axes = tuple(self.space.axis(name, axis, size) for axis, size in enumerate(shape))
            if len(axes) == 1:
                self.sides[name, 0] = "out"
                return Channels(torch.from_numpy(axes[0].labels), parameter=name)
            return Matrix(axes)
        return Plain(shape, self._known.get(node.name))

    def _step(self, node: fx.Node, memory: dict[fx.Node, Any]) -> None:
        args: Any
        kwargs: Any
        args, kwargs = map_arg((node.args, node.kwargs), memory.__getitem__)
        name, in_place = _name(node.target)
        call = Call(node, name, args, kwargs)
        if node.target is operator.getitem:
            memory[node] = args[0][args[1]]
            return
        inner = [index for index, arg in enumerate(args) if isinstance(arg, fx.GraphModule)]
        if inner:
            memory[node] = self.walk(args[inner[0]], args[inner[0] + 1 :])
            return
        operands = call.operands
        produced = isinstance(call.outcome, Tensor | list | tuple)
        if not produced or not (operands.matrices or operands.channels):
            memory[node] = _plain(call, operands)
            return
        rule = self._rules.get(name) or (self._rules["pointwise"] if torch.Tag.pointwise in _tags(node.target) else None)
        if rule is None:
            raise self.refuse(node, "regraft does not know what this operator does to channels")
        try:
            memory[node] = result = rule(self, call)
        except ModelError:
            raise
        except Exception as error:  # a form of the operator that its rule was not made for
            raise self.refuse(node, f"regraft does not know this form of the operator ({type(error).__name__})") from error
        if in_place:
            self._write_back(node, result, memory)

    def _write_back(self, node: fx.Node, result: Any, memory: dict[fx.Node, Any]) -> None:
        """Gives the target of an in-place operator its new value; refuses a target that is a view of another tensor."""
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if isinstance(memory[target], Plain) and isinstance(result, Channels) and target.op != "placeholder":
            aliased = any(memory.get(user) is not None for user in target.users if user is not node)
            if aliased or _name(target.target)[0] in ("slice", "select", "view", "index"):
                raise self.refuse(node, "it writes channels into a part of another tensor")
        memory[target] = result


def module_of(node: fx.Node) -> str:
    """Returns the full name of the module that a node comes from, or an empty string."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return names[-1] if names else ""


def _like(outcome: Any, make: Callable[[Tensor, Any], Any], beside: Any = None) -> Any:
    """Replaces the tensors of a result, which stand alone or in tuples or lists.

    Args:
        outcome: The result.
        make: Function from a tensor, and what stands at its place beside it, to what replaces it.
        beside: A result of the same form; None for none.
    """
    match outcome:
        case Tensor():
            return make(outcome, beside)
        case list() | tuple():
            return tuple(_like(part, make, None if beside is None else beside[index]) for index, part in enumerate(outcome))
        case _:
            return outcome


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    found = operator.attrgetter(str(node.target))(module)
    return _like(found, lambda tensor, _: Plain(tuple(tensor.shape), tensor if tensor.device.type == "cpu" else None))


def _name(target: Any) -> tuple[str, bool]:
    """Returns an operator's bare name, and whether it changes its first argument."""
    packet = getattr(target, "overloadpacket", target)
    name = str(getattr(packet, "__name__", packet))
    in_place = name.endswith("_") and not name.endswith("__")
    return (name[:-1] if in_place else name), in_place


def _tags(target: Any) -> Collection[torch.Tag]:
    return getattr(target, "tags", ())


def _plain(call: Call, operands: Operands) -> Any:
    """Returns the result of an operator on tensors without channels, with its value where all operands are known and it is small."""
    return _like(call.outcome, lambda fake, value: Plain(tuple(fake.shape), value), _computed(call, operands))


def _computed(call: Call, operands: Operands) -> Any:
    """Returns the value of an operator on constants, or None."""
    target: Any = call.node.target
    size = call.outcome.numel() if isinstance(call.outcome, Tensor) else 0
    if size > LARGEST_KNOWN or any(value.known is None for value in operands.plains):
        return None
    if torch.Tag.nondeterministic_seeded in _tags(target):
        return None
    args: Any = map_aggregate(call.args, _real)
    kwargs: Any = map_aggregate(dict(call.kwargs), _real)
    try:
        return target(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # only indices and slopes must be known, and a rule that lacks them raises an error


def _real(argument: Any) -> Any:
    """Returns the known value of a constant, on the CPU, and other arguments as they are."""
    match argument:
        case Plain():
            return argument.known
        case torch.device():
            return torch.device("cpu")
        case _:
            return argument
