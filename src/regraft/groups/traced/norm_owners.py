"""Owners of a layer's norms: the attention or the feed-forward network, when a norm serves only one of the two."""
# pyright: standard
# (torch.fx and NumPy leave most types unknown)

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from torch import fx

STREAM = "stream"


def owners(
    graph: fx.Graph,
    place: Callable[[fx.Node], str],
    part_of: Callable[[str], str | None],
    norms: Collection[str],
    parameters: Mapping[str, str],
    stream_sums: Collection[str],
) -> dict[str, str]:
    """Returns the owner of every norm that has a single owner.

    A norm belongs to a part when it feeds only that part, or when it feeds the residual stream and only that part feeds the norm (norms
    after a part, as in Gemma 2 and OLMo 2). A norm that feeds both parts, as in layers that compute them in parallel, belongs to neither.

    Args:
        graph: Graph of the model's computation.
        place: Function from a node to the name of the module that it comes from.
        part_of: Function from a module name to the part that contains the module, or None.
        norms: Names of the norms.
        parameters: Placeholder name to the name of the module that owns the parameter.
        stream_sums: Names of the nodes that add to the residual stream.

    Returns:
        Name of a norm to its owner.
    """
    # Only nodes that depend on the norm's own parameters count: its first nodes may also feed the residual stream around it.
    inside: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        where = parameters.get(node.name, "") if node.op == "placeholder" else place(node)
        if where in norms:
            known = inside.setdefault(where, set())
            if node.op == "placeholder" or not known.isdisjoint(node.all_input_nodes):
                known.add(node)

    def part(node: fx.Node) -> str | None:
        if node.op == "output" or node.name in stream_sums:
            return STREAM
        return None if node.op == "placeholder" else part_of(place(node))

    found: dict[str, str] = {}
    for norm, nodes in inside.items():
        after = _reached(nodes, lambda node: node.users, part)
        before = _reached(nodes, lambda node: node.all_input_nodes, part)
        deciding = before if after == {STREAM} else after
        if len(deciding) == 1 and STREAM not in deciding:
            found[norm] = deciding.pop()
    return found


def _reached(nodes: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]], part: Callable[[fx.Node], str | None]) -> set[str]:
    """Walks from nodes to the nearest parts and the residual stream."""
    waiting = list(nodes)
    seen, found = set(waiting), set[str]()
    while waiting:
        for node in step(waiting.pop()):
            if node in seen:
                continue
            seen.add(node)
            reached = part(node)
            if reached is None:
                waiting.append(node)
            else:
                found.add(reached)
    return found
