"""Groups of coupled weights, read from the table of a family (``models/architectures/*.toml``).

Structural pruning removes a channel from everything that writes it and everything that reads it at once (LLM-Pruner,
arXiv 2305.11627, section 3.1). Under grouped-query attention the unit is a key-value head with its ``n_q / n_kv`` query heads,
which are adjacent rows of the query projection; scores and cuts use that order.
"""

from __future__ import annotations

from regraft.models.family import Block, Coupling
from regraft.models.view import LayerSizes, ModelView, fingerprint, parameter_count, parameter_shapes
from regraft.plans import Group, Groups, Member


def discover(view: ModelView) -> Groups:
    """Returns the prunable groups of a model: the heads and the feed-forward channels of every layer.

    Args:
        view: The model; its layers may have different sizes, or lack a part.

    Returns:
        Groups named ``layers.<index>.<kind>``, in the order of the layers.
    """
    groups: list[Group] = []
    for layer in range(len(view.layers)):
        sizes = view.sizes(layer)
        for coupling in view.family.couplings:
            group = _group(view, layer, sizes, coupling)
            if group is not None:
                groups.append(group)
    return Groups(
        fingerprint=fingerprint(view.model),
        family=view.family.model_type,
        layers=len(view.layers),
        parameters=parameter_count(view.model),
        groups=tuple(groups),
        shapes=parameter_shapes(view.model),
    )


def _group(view: ModelView, layer: int, sizes: LayerSizes, coupling: Coupling) -> Group | None:
    """Returns one group of a layer, or None where that part was removed."""
    members: list[Member] = []
    units = unit_parameters = 0
    for axis in coupling.axes:
        module = view.linear(layer, axis.module)
        if module is None:
            return None
        size = _channels(axis.block, sizes)
        name = f"{view.layer_name(layer)}.{axis.module}"
        rows, columns = module.weight.shape
        members.append(Member(f"{name}.weight", axis=0 if axis.side == "out" else 1, side=axis.side, size=size))
        units = (rows if axis.side == "out" else columns) // size
        unit_parameters += size * (columns if axis.side == "out" else rows)
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        if axis.side == "out" and bias is not None:
            members.append(Member(f"{name}.bias", axis=0, side="out", size=size))
            unit_parameters += size
    return Group(f"layers.{layer}.{coupling.kind}", coupling.kind, layer, units, tuple(members), unit_parameters)


def _channels(block: Block, sizes: LayerSizes) -> int:
    """Returns how many channels of a projection one unit owns."""
    if block == "head":
        return sizes.head_dim
    if block == "query_group":
        return sizes.head_dim * (sizes.query_heads // sizes.kv_heads)
    return 1
