"""Coupled weights found by following a model's computation, without a table for its family.

The model is exported with fake weights and one layer of each kind (``skeleton``); every channel of every parameter gets a label
(``labels``), which is carried through each operator (``follow``, ``rules``); what was joined on the way is read as units of groups
(``units``, ``report``). LLM-Pruner (arXiv 2305.11627, section 3.1) finds the same dependencies between neurons by following the
graph from each neuron in turn; here all are followed at once, and fused projections and grouped-query attention are seen as they
are. What is not understood is refused: see :func:`follow_channels` for the reasons.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from regraft.groups.traced.interpreter import Follower
from regraft.groups.traced.report import Refusal, Report
from regraft.groups.traced.rules import RULES
from regraft.groups.traced.skeleton import export, find_layers, without_weights
from regraft.models.view import fingerprint, parameter_count, parameter_shapes
from regraft.plans import Groups

__all__ = ["Refusal", "Traced", "follow_channels", "trace"]


@dataclass(frozen=True)
class Traced:
    """What following a model gave.

    Attributes:
        groups: Everything that can be cut exactly, of every kind.
        refusals: What was found but cannot be cut, with the reason.
    """

    groups: Groups
    refusals: tuple[Refusal, ...]


def trace(model: nn.Module | PreTrainedConfig) -> Groups:
    """Returns the groups of a causal language model: heads, query heads, feed-forward channels, the residual width, whole parts.

    Args:
        model: A model that takes token ids, or the config of one; weights are neither read nor changed.

    Returns:
        Groups in the order of the layers: ``layers.<i>.heads``, ``query_heads`` (where key-value heads are shared), ``ffn``,
        ``attention``, ``mlp``, ``layer``, and ``residual`` last.

    Raises:
        ModelError: The computation cannot be exported or followed; the message names the node.
    """
    return follow_channels(model).groups


def follow_channels(
    model: nn.Module | PreTrainedConfig,
    *,
    numbered_heads: bool = False,
    counted_layer_norms: bool = False,
    rescaled_norms: Collection[str] | None = None,
) -> Traced:
    """Returns the groups of a causal language model, as :func:`trace` does, and why the others are missing.

    Args:
        model: A model that takes token ids, or the config of one; weights are neither read nor changed.
        numbered_heads: Whether a pruned model can be told which of the first model's heads it has left, so that constants which
            differ from head to head (the slopes of ALiBi) do not stand in the way.
        counted_layer_norms: Whether layer norms can go on counting the channels that were removed from the residual stream.
        rescaled_norms: Names inside a layer of the RMS norms over several heads, or over feed-forward channels, that are rescaled when
            some of these go, so that they do not stand in the way; None: all of them.

    Raises:
        ModelError: The computation cannot be exported or followed; the message names the node.
    """
    module = without_weights(model) if isinstance(model, PreTrainedConfig) else model
    layers = find_layers(module)
    graph = export(module, layers)
    state = Follower(RULES, graph.parameters, graph.constants)
    state.walk(graph.module)
    report = Report(
        module,
        layers,
        graph,
        state,
        numbered_heads=numbered_heads,
        counted_layer_norms=counted_layer_norms,
        rescaled_norms=rescaled_norms,
    )
    found = report.groups()
    config = getattr(module, "config", None)
    family = str(getattr(config, "model_type", "") or type(module).__name__).removeprefix("regraft_")
    groups = Groups(fingerprint(module), family, layers.count, parameter_count(module), found, parameter_shapes(module))
    return Traced(groups, tuple(report.refusals))
