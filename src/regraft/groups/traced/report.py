"""Groups of a model from its traced channels, and the reasons why some groups cannot be cut."""
# pyright: standard
# (torch.fx and NumPy leave most types unknown)

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx, nn

from regraft.groups.traced.interpreter import Constant, Follower, Statistic, module_of
from regraft.groups.traced.labels import AxisLabels, Labels
from regraft.groups.traced.norm_owners import owners
from regraft.groups.traced.skeleton import Graph, Layers
from regraft.groups.traced.units import Units, UnorderedError, find_units, members_of
from regraft.plans import Group, GroupKind, Member

# A class of models.uneven.modeling_regraft. It is compared by name, because a saved folder carries its own copy of the class.
COUNTING_NORM = "StreamNorm"


@dataclass(frozen=True)
class Refusal:
    """A group that was traced but cannot be cut.

    Attributes:
        kind: Kind of the group.
        layer: Index of the first layer of its kind, or None for the residual width.
        reason: The obstacle in words, with the name of the module or parameter.
    """

    kind: GroupKind
    layer: int | None
    reason: str


@dataclass(frozen=True)
class _Found:
    """A group of the first layer of a kind, before it is repeated for the other layers of that kind."""

    kind: GroupKind
    layer: int | None
    units: Units


class Report:
    """Groups and refusals of a model, read from a finished walk.

    Args:
        model: The traced model.
        layers: Layers of the model.
        graph: Graph of the model's computation.
        state: State of the finished walk.
        numbered_heads: As in :func:`~regraft.groups.traced.follow_channels`.
        counted_layer_norms: As in :func:`~regraft.groups.traced.follow_channels`.
        rescaled_norms: As in :func:`~regraft.groups.traced.follow_channels`.
        mlp: As in :func:`~regraft.groups.traced.follow_channels`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        graph: Graph,
        state: Follower,
        *,
        numbered_heads: bool = False,
        counted_layer_norms: bool = False,
        rescaled_norms: Collection[str] | None = None,
        mlp: Collection[str] = (),
    ) -> None:
        self._mlp = tuple(mlp)
        self._rescaled = rescaled_norms
        self._numbered: tuple[GroupKind, ...] = ("heads", "query_heads") if numbered_heads else ()
        self._counted: tuple[GroupKind, ...] = ("residual",) if counted_layer_norms else ()
        self.layers = layers
        self._model = model
        self.refusals: list[Refusal] = []
        self._graph = graph
        self._state = state
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        order = {name: index for index, name in enumerate(self._shapes)}
        used = [axis for axis in state.space.axes.values() if (axis.parameter, axis.axis) in state.sides]
        self._axes: list[AxisLabels] = sorted(used, key=lambda axis: (order[axis.parameter], axis.axis))
        self._coarse = state.space.components(with_copies=True)
        self._fine = state.space.components(with_copies=False)

    def groups(self) -> tuple[Group, ...]:
        """Returns every group, in the order of the layers; adds a refusal for every group that cannot be cut."""
        found: list[Group] = []
        for kind in self.layers.kinds:
            for shape in self._of_layer(kind[0]):
                group = self._group(shape)
                if group is not None:
                    found += [self._repeated(group, layer) for layer in kind]
        found += self._whole_parts()
        residual = self._residual()
        order: Sequence[GroupKind] = ("heads", "query_heads", "ffn", "attention", "mlp", "layer")
        found.sort(key=lambda group: (group.layer, order.index(group.kind)))
        return (*found, residual) if residual is not None else tuple(found)

    @cached_property
    def _coupled(self) -> list[Units]:
        pinned = np.unique(np.concatenate([self._coarse[labels[labels > 0]] for labels in self._state.outputs] or [[]]))
        free = [units for units in find_units(self._axes, self._coarse) if not np.isin(units.components, pinned).any()]
        return [units for units in free if {self._state.sides[key] for key in units.indices} == {"in", "out"}]

    @cached_property
    def _attended(self) -> Labels:
        labels = self._state.space.attended
        return np.unique(self._coarse[np.concatenate(labels)]) if labels else np.empty(0, dtype=np.int64)

    def _of_layer(self, layer: int) -> list[_Found]:
        """Returns the groups within a layer."""
        inside = [units for units in self._coupled if {self.layers.index(name) for name in units.parameters} == {layer}]
        heads = [units for units in inside if np.isin(units.components, self._attended).any()]
        ffn = self._feeding([units for units in inside if not np.isin(units.components, self._attended).any()], layer)
        found: list[_Found] = []
        kinds: tuple[tuple[GroupKind, list[Units]], ...] = (("heads", heads), ("ffn", ffn))
        for kind, sets in kinds:
            if len(sets) > 1:
                alone = sorted(set(sets[0].parameters) ^ set(sets[1].parameters)) or [sets[0].parameters[0]]
                where = f"'{alone[0]}' belongs to some of them only"
                self.refusals.append(Refusal(kind, layer, f"its channels are not cut alike everywhere: {where}"))
            elif sets:
                found.append(_Found(kind, layer, self._without_shared_norms(sets[0]) if kind == "heads" else sets[0]))
        attending = heads or self._heads_across_layers(layer)
        queries = self._query_heads(attending[0], layer) if len(attending) == 1 else None
        if queries is not None:
            found.append(_Found("query_heads", layer, queries))
        return found

    def _heads_across_layers(self, layer: int) -> list[Units]:
        """Returns this layer's part of heads whose keys and values serve several layers: these can lose query heads alone."""
        prefix = f"{self.layers.name}.{layer}."
        shared = [
            units
            for units in self._coupled
            if len(layers := {self.layers.index(name) for name in units.parameters}) > 1
            and layer in layers
            and None not in layers
            and np.isin(units.components, self._attended).any()
        ]
        if shared:
            self.refusals.append(Refusal("heads", layer, "its keys and values serve several layers"))
        return [units.narrowed(lambda name: name.startswith(prefix)) for units in shared]

    def _feeding(self, sets: list[Units], layer: int) -> list[Units]:
        """Returns the channels of the feed-forward network, where its modules are known and other channels are beside it."""
        modules = tuple(f"{self.layers.name}.{layer}.{name}" for name in self._mlp)
        inside = [units for units in sets if all(_inside(name, modules) for name in units.parameters)]
        return inside if len(sets) > 1 and inside else sets

    def _without_shared_norms(self, heads: Units) -> Units:
        """Leaves out norms inside a head when there is only one head, so that its size is the same as with several heads."""
        if heads.count > 1:
            return heads
        norms = {self.layers.representative(statistic.module) for statistic in self._state.statistics}
        return heads.narrowed(lambda name: name.rpartition(".")[0] not in norms)

    def _query_heads(self, heads: Units, layer: int) -> Units | None:
        """Returns units of one query head from each key-value group, or None when every query head has its own keys."""
        axes = [axis for axis in self._axes if (axis.parameter, axis.axis) in heads.indices]
        sets = [units for units in find_units(axes, self._fine) if {self._state.sides[key] for key in units.indices} == {"in", "out"}]
        if len(sets) != 1 or sets[0].count <= heads.count or sets[0].count % heads.count:
            return None
        queries = sets[0]
        repeats = queries.count // heads.count
        group_of = self._coarse_of(queries.components)
        order = np.argsort(group_of, kind="stable").reshape(heads.count, repeats).T
        if len(np.unique(group_of)) != heads.count or (np.diff(group_of[order.T], axis=1) != 0).any():
            self.refusals.append(Refusal("query_heads", layer, "key-value heads serve different numbers of query heads"))
            return None
        rows = {key: np.sort(indices[order].reshape(repeats, -1), axis=1) for key, indices in queries.indices.items()}
        return Units(queries.components[order], rows)

    def _coarse_of(self, fine: Labels) -> Labels:
        """Returns, for each component without copies, the component with copies that contains it."""
        table = np.zeros(int(self._fine.max()) + 1, dtype=np.int64)
        table[self._fine] = self._coarse
        return table[fine]

    def _members(self, found: _Found) -> tuple[Member, ...] | None:
        """Returns the members of a group that can be cut; adds a refusal and returns None for one that cannot."""
        try:
            if (reason := self._reason(found)) is None:
                return members_of(found.units, self._state.sides, found.kind)
        except UnorderedError as error:
            reason = str(error)
        self.refusals.append(Refusal(found.kind, found.layer, reason))
        return None

    def _group(self, found: _Found) -> Group | None:
        members = self._members(found)
        if members is None:
            return None
        name = f"layers.{found.layer}.{found.kind}"
        return Group(name, found.kind, found.layer, found.units.count, members, self._parameters(members))

    def _reason(self, found: _Found) -> str | None:
        """Returns the reason why removing a unit differs from zeroing it, or None."""
        unit_of = np.full(int(max(self._coarse.max(), self._fine.max())) + 1, -1, dtype=np.int64)
        component = self._fine if found.kind == "query_heads" else self._coarse
        for unit, components in enumerate(found.units.components):
            unit_of[components] = unit
        for statistic in self._state.statistics:
            if found.kind in self._counted and self._is_layer_norm(statistic):
                continue
            reason = _statistic_reason(statistic, unit_of[component[statistic.rows]], self._made_up_for(statistic, found))
            if reason is not None:
                return reason
        for constant in self._state.constants if found.kind not in self._numbered else ():
            if _tells_apart(constant, unit_of[component[constant.labels]]):
                return f"a constant in '{constant.module or 'the model'}' (node '{constant.node}') differs between units"
        return None

    def _is_layer_norm(self, statistic: Statistic) -> bool:
        """Returns whether a statistic belongs to a layer norm: an ordinary one, or one that counts removed channels."""
        module = self._model.get_submodule(self.layers.representative(statistic.module))
        return statistic.kind == "layer" or type(module).__name__ == COUNTING_NORM

    def _made_up_for(self, statistic: Statistic, found: _Found) -> bool:
        """Returns whether rescaling a norm makes removing a unit equal to zeroing it: a mean of squares with a weight."""
        name = self.layers.representative(statistic.module)
        known = self._rescaled is None or found.kind == "residual" or name.endswith(tuple(f".{norm}" for norm in self._rescaled))
        return statistic.kind == "rms" and f"{name}.weight" in found.units.parameters and known

    def _parameters(self, members: Sequence[Member]) -> int:
        """Returns how many parameters one unit owns."""
        return sum(member.width * (math.prod(self._shapes[member.parameter]) // self._length(member)) for member in members)

    def _length(self, member: Member) -> int:
        return self._shapes[member.parameter][member.axis]

    def _repeated(self, group: Group, layer: int) -> Group:
        members = tuple(_renamed(member, self.layers.renamed(member.parameter, layer)) for member in group.members)
        return Group(f"layers.{layer}.{group.kind}", group.kind, layer, group.units, members, group.unit_parameters)

    def _residual(self) -> Group | None:
        """Returns the group of the residual stream, which runs through all layers."""
        within = {kind[0] for kind in self.layers.kinds}
        streams = [units for units in self._coupled if {self.layers.index(name) for name in units.parameters} >= {None, *within}]
        if len(streams) != 1:
            why = "no width runs through all layers" if not streams else "several widths run through all layers"
            self.refusals.append(Refusal("residual", None, why))
            return None
        found = _Found("residual", None, streams[0])
        members = self._members(found)
        if members is None:
            return None
        names = [name for name, _ in streams[0].indices]
        if len(set(names)) < len(names):
            self.refusals.append(Refusal("residual", None, "a matrix both reads and writes the stream by one parameter"))
            return None
        everywhere: list[Member] = []
        for member in members:
            everywhere += [_renamed(member, name) for name in self._alike(member.parameter)]
        place = {name: index for index, name in enumerate(self._shapes)}
        everywhere.sort(key=lambda member: (member.side == "in", place[member.parameter]))
        return Group("residual", "residual", None, streams[0].count, tuple(everywhere), self._parameters(everywhere))

    def _alike(self, parameter: str) -> list[str]:
        """Returns the names that a parameter has in all layers of its kind."""
        index = self.layers.index(parameter)
        if index is None:
            return [parameter]
        kind = next(kind for kind in self.layers.kinds if kind[0] == index)
        return [self.layers.renamed(parameter, layer) for layer in kind]

    def _whole_parts(self) -> list[Group]:
        """Returns each layer, its attention and its feed-forward network as groups of one unit, for removing all of it."""
        found: list[Group] = []
        for kind in self.layers.kinds:
            prefix = f"{self.layers.name}.{kind[0]}."
            names = [name for name in self._shapes if name.startswith(prefix)]
            modules = self._part_modules(kind[0])
            owned = self._norm_owners(kind[0], modules)
            parts: list[tuple[GroupKind, list[str]]] = [("layer", names)]
            for part in ("attention", "mlp"):
                inside = [name for name in names if _inside(name, modules[part]) or owned.get(name.rpartition(".")[0]) == part]
                if inside and modules[part]:
                    parts.append((part, inside))
            for part, inside in parts:
                members = tuple(Member(name, 0, "out", size=self._shapes[name][0]) for name in inside)
                group = Group("", part, kind[0], 1, members, sum(math.prod(self._shapes[name]) for name in inside))
                found += [self._repeated(group, layer) for layer in kind]
        return found

    def _part_modules(self, layer: int) -> dict[str, tuple[str, ...]]:
        """Returns the names of the modules of a layer's attention and of its feed-forward network."""
        prefix = f"{self.layers.name}.{layer}"
        found: dict[str, tuple[str, ...]] = {"attention": (), "mlp": ()}
        inside = [units for units in self._coupled if {self.layers.index(name) for name in units.parameters} == {layer}]
        attending = [units for units in inside if np.isin(units.components, self._attended).any()]
        feeding = self._feeding([units for units in inside if all(units is not other for other in attending)], layer)
        for part, sets in (("attention", attending), ("mlp", feeding)):
            for units in sets:
                children = {name.removeprefix(f"{prefix}.").partition(".")[0] for name in units.parameters}
                found[part] = (*found[part], *sorted(f"{prefix}.{child}" for child in children))
        return found

    def _norm_owners(self, layer: int, modules: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
        prefix = f"{self.layers.name}.{layer}."
        everything = (*modules["attention"], *modules["mlp"])
        norms = {name.rpartition(".")[0] for name in self._shapes if name.startswith(prefix) and not _inside(name, everything)}
        component = next((units.components for units in self._coupled if None in map(self.layers.index, units.parameters)), [])
        sums = {node.name for node, label in self._state.sums if self._coarse[label] in component}

        def part_of(module: str) -> str | None:
            return next((part for part, inside in modules.items() if _inside(module, inside)), None)

        def place(node: fx.Node) -> str:
            return self.layers.representative(module_of(node))

        parameters = {holder: name.rpartition(".")[0] for holder, name in self._graph.parameters.items()}
        return owners(self._graph.module.graph, place, part_of, norms, parameters, sums)


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _renamed(member: Member, parameter: str) -> Member:
    return Member(parameter, member.axis, member.side, member.offset, member.size, member.repeats, member.stride)


def _statistic_reason(statistic: Statistic, units: Labels, made_up_for: bool) -> str | None:
    """Returns the reason why a number computed from several units prevents a cut, or None."""
    mine = units >= 0
    low = np.where(mine, units, np.iinfo(np.int64).max).min(axis=1)
    high = np.where(mine, units, -1).max(axis=1)
    if made_up_for or not (mine.any(axis=1) & (low != high)).any():
        return None
    what = "subtracts the mean of all channels" if statistic.kind == "layer" else "computes one number from all channels"
    return f"'{statistic.module or 'the model'}' (node '{statistic.node}') {what}, so that removing one changes the others"


def _tells_apart(constant: Constant, units: Labels) -> bool:
    """Returns whether a constant has different values for different units."""
    mine = units >= 0
    if not mine.any():
        return False
    met = np.unique(np.stack([units[mine], constant.slots[mine]]), axis=1)
    values = len(np.unique(met[1]))
    return bool((np.bincount(met[0])[np.unique(met[0])] != values).any())
