"""Taylor scores: what the loss would change by if a weight were zero (LLM-Pruner, arXiv 2305.11627, section 3.2).

With ``g`` the gradient of the mean language-modelling loss and ``H`` the diagonal empirical Fisher, the mean over calibration
windows of the squared gradient, the saliency of a weight is

* first order: ``w g``
* second order: ``w**2 H``
* mixed: ``w g - w**2 H / 2``

We depart from the released code in two ways: scores go to the key-value head that the query heads really belong to, and the
squared gradients are taken per window, before they are averaged (the code's second term comes out near 1e-10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.importance.criteria import CRITERIA, Criterion, Evidence, reduce_saliency


def taylor_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the Taylor scores of all units. Memory: one gradient, and one square where the order asks for it."""
    assert evidence.windows is not None
    names = {member.parameter for group in evidence.groups.groups for member in group.members}
    parameters = {name: parameter for name, parameter in evidence.model.named_parameters() if name in names}
    first, second = _gradients(evidence.model, parameters, evidence.windows, squares=evidence.order != "first")

    def saliency(name: str) -> Tensor:
        weight = parameters[name].detach().float()
        if evidence.order == "first":
            return weight * first[name]
        curvature = weight.square() * second[name]
        return curvature if evidence.order == "second" else weight * first[name] - 0.5 * curvature

    return {group.name: reduce_saliency(group, saliency, evidence.granularity, evidence.reduce) for group in evidence.groups.groups}


def _gradients(
    model: PreTrainedModel, parameters: Mapping[str, Tensor], windows: Tensor, *, squares: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the mean gradient and, if asked, the mean squared gradient over windows, in float32."""
    first = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    second = {name: torch.zeros_like(value) for name, value in first.items()} if squares else {}
    device = next(iter(parameters.values())).device
    with _only_these_train(model, parameters):
        for window in windows:
            ids = window.unsqueeze(0).to(device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                first[name].add_(gradient.float(), alpha=1.0 / len(windows))
                if squares:
                    second[name].addcmul_(gradient.float(), gradient.float(), value=1.0 / len(windows))
    return first, second


@contextmanager
def _only_these_train(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Asks for the gradients of these parameters alone, in evaluation mode, and puts everything back afterwards."""
    wanted = {id(parameter) for parameter in parameters.values()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        model.eval()
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        model.train(training)


CRITERIA.add("taylor", Criterion("taylor", needs_text=True, units=taylor_units))
