"""Groups of coupled weights, found by tracing a model's computation without a table for its family.

The model is exported with fake weights and one layer of each kind (``skeleton``). Every channel of every parameter gets a label
(``labels``), which is carried through each operator (``interpreter``, ``rules``). Channels whose labels were joined on the way become
the units of groups (``units``, ``report``). LLM-Pruner (arXiv 2305.11627, section 3.1) finds the same dependencies by following the
graph from one neuron after another; here all neurons are followed at once, with fused projections and grouped-query attention. An
operator without a rule is refused: see :func:`follow_channels`.
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
    """Result of tracing a model.

    Attributes:
        groups: All groups that can be cut exactly, of every kind.
        refusals: Groups that were found but cannot be cut, with the reasons.
    """

    groups: Groups
    refusals: tuple[Refusal, ...]


def trace(model: nn.Module | PreTrainedConfig) -> Groups:
    """Returns the groups of a causal language model: heads, query heads, feed-forward channels, parts, layers, the residual width.

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
    mlp: Collection[str] = (),
    whole: Collection[str] = (),
) -> Traced:
    """Returns the groups of a causal language model, as :func:`trace` does, and the reasons why others cannot be cut.

    Args:
        model: A model that takes token ids, or the config of one; weights are neither read nor changed.
        numbered_heads: Whether a pruned model stores the original numbers of its heads, so that constants which differ from head to
            head (the slopes of ALiBi) do not prevent a cut.
        counted_layer_norms: Whether a pruned model's layer norms still count the removed channels of the residual stream.
        rescaled_norms: Names, within a layer, of the RMS norms over several heads or over feed-forward channels that are rescaled after
            a cut, so that they do not prevent it; None for all of them.
        mlp: Names, within a layer, of the modules of the feed-forward network, where a layer has other channels of its own too; empty
            if they are not known.
        whole: Names, within a layer, of attentions that are never cut and not followed.

    Raises:
        ModelError: The computation cannot be exported or followed; the message names the node.
    """
    module = without_weights(model) if isinstance(model, PreTrainedConfig) else model
    layers = find_layers(module)
    graph = export(module, layers, whole)
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
        mlp=mlp,
    )
    found = report.groups()
    config = getattr(module, "config", None)
    family = str(getattr(config, "model_type", "") or type(module).__name__).removeprefix("regraft_")
    groups = Groups(fingerprint(module), family, layers.count, parameter_count(module), found, parameter_shapes(module))
    return Traced(groups, tuple(report.refusals))
