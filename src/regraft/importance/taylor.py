"""Taylor scores: the approximate change of the loss if a weight were zero (LLM-Pruner, arXiv 2305.11627, section 3.2).

With ``g`` the gradient of the mean language-modelling loss and ``H`` the diagonal empirical Fisher, the mean over calibration
windows of the squared gradient, the saliency of a weight is

* first order: ``w g``
* second order: ``w**2 H``
* mixed: ``w g - w**2 H / 2``

We depart from the released code in two ways. Scores go to the key-value head that the query heads belong to. Gradients are squared for
each window before they are averaged (in the released code the second term is about 1e-10).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from regraft.importance.criteria import CRITERIA, Criterion, Evidence, reduce_saliency
from regraft.importance.passes import Gradients


def taylor_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the Taylor scores of all units. The memory is that of one gradient, and of a second one unless the order is first."""
    parameters = dict(evidence.model.named_parameters())

    def saliency(name: str, seen: Gradients) -> Tensor:
        weight = parameters[name].detach().float()
        if evidence.order == "first":
            return weight * seen.first[name]
        curvature = weight.square() * seen.second[name]
        return curvature if evidence.order == "second" else weight * seen.first[name] - 0.5 * curvature

    found: dict[str, Tensor] = {}
    for seen in evidence.how().gradients(evidence.groups, squares=evidence.order != "first"):
        for group in seen.groups:
            found[group.name] = reduce_saliency(group, lambda name, seen=seen: saliency(name, seen), evidence.granularity, evidence.reduce)
    return found


CRITERIA.include(
    Criterion(
        "taylor",
        needs_text=True,
        units=taylor_units,
        looks_at="gradients",
        reads=frozenset({"order", "granularity", "reduce"}),
        between_layers=True,
    ),
)
