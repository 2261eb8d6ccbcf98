"""Replacement of linear layers by two factors, and of factors by their dense product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import ModelError, PlanError
from regraft.models.build import build
from regraft.models.uneven.factored_regraft import PIFA
from regraft.models.view import ModelView, fingerprint
from regraft.numerics.pivots import pivoted
from regraft.numerics.truncation import Factors
from regraft.plans import FactorPlan

# Keys of configs that give layers a bias, in families where they have one only if asked.
_BIAS_KEYS = ("attention_bias", "mlp_bias")


def factorize(model: PreTrainedModel, plan: FactorPlan, factors: Mapping[str, Factors]) -> PreTrainedModel:
    """Returns a model whose layers are factored by the plan; the other tensors are shared with the given model.

    Args:
        model: The model that the plan was made for; it is not changed.
        plan: The layers to factor, their ranks and the layout.
        factors: Factors of every layer that the plan names.

    Raises:
        PlanError: The plan is of another model, or the factors do not fit it.
    """
    check_factor_plan(model, plan)
    view = ModelView(model)
    state: dict[str, Tensor] = dict(model.state_dict())
    for entry in plan.factorings:
        own = factors[entry.module]
        if own.left_OR.shape[1] != entry.rank:
            raise PlanError(f"the factors of '{entry.module}' have rank {own.left_OR.shape[1]}, the plan says {entry.rank}; make them anew")
        bias = state.pop(f"{entry.module}.bias", None)
        del state[f"{entry.module}.weight"]
        state |= {f"{entry.module}.{name}": value for name, value in factor_tensors(own, bias, plan.layout, model.dtype).items()}
        if (f"{entry.module}.bias" in state) != entry.bias:
            raise PlanError(
                f"the plan says that '{entry.module}' has {'a' if entry.bias else 'no'} bias, its factors differ; make them anew"
            )
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    return build(model, sizes, state, changes=config_changes(model, plan))


def config_changes(model: PreTrainedModel, plan: FactorPlan) -> dict[str, Any]:
    """Returns the entries of a config by which a model's class builds the factored layers of a plan."""
    prefix = f"{model.base_model_prefix}."
    described = {entry.module.removeprefix(prefix): {"rank": entry.rank, "bias": entry.bias} for entry in plan.factorings}
    return {"factored": described, "factor_layout": plan.layout}


def check_factor_plan(model: PreTrainedModel, plan: FactorPlan, known: str | None = None) -> None:
    """Refuses a plan that does not fit the model.

    Args:
        model: The model, whose weights may be absent where its fingerprint is given.
        plan: The plan.
        known: Fingerprint of the model; None to compute it.

    Raises:
        PlanError: It was made for other weights, or names what is not there.
    """
    seen = fingerprint(model) if known is None else known
    if plan.fingerprint != seen:
        raise PlanError(f"the plan is of a model with fingerprint {plan.fingerprint}, this one has {seen}; make it again for this model")
    for entry in plan.factorings:
        rows, columns = shape_of(ModelView(model), entry.module)
        if not 0 < entry.rank < min(rows, columns):
            limit = min(rows, columns) - 1
            raise PlanError(f"rank {entry.rank} of '{entry.module}' ({rows} x {columns}) is not from 1 to {limit}; lower it")


def shape_of(view: ModelView, name: str) -> tuple[int, int]:
    """Returns the outputs and inputs of a linear layer.

    Raises:
        PlanError: There is none of this name.
    """
    try:
        weight = view.model.get_parameter(f"{name}.weight")
    except AttributeError:
        raise PlanError(f"the model has no linear layer '{name}'; make the plan again for this model") from None
    rows, columns = weight.shape
    return (columns, rows) if view.family.transposed else (rows, columns)


def densified(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model with the dense matrix of every factored layer, for runtimes that know no others.

    Raises:
        ModelError: A layer got a bias that its family has no place for.
    """
    view = ModelView(model)
    layers = view.factored()
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in layers.items():
        for key in [key for key in state if key.startswith(f"{name}.") and key != f"{name}.bias"]:
            del state[key]
        weight = module.dense_weight().detach()
        state[f"{name}.weight"] = (weight.T if view.family.transposed else weight).contiguous()
    biases = [name for name, module in layers.items() if module.bias is not None]
    changes: dict[str, Any] = {"factored": None, "factor_layout": None}
    changes |= {key: True for key in _BIAS_KEYS if biases and hasattr(model.config, key)}
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    for name in view.linear_names() if len(changes) > 2 else ():
        for index in range(len(view.layers)):
            full = f"{view.layer_name(index)}.{name}"
            if f"{full}.weight" in state:
                rows = state[f"{full}.weight"].shape[int(view.family.transposed)]
                state.setdefault(f"{full}.bias", torch.zeros(rows, dtype=model.dtype, device=model.device))
    try:
        return build(model, sizes, state, changes=changes)
    except PlanError as error:
        if not biases:
            raise
        raise ModelError(
            f"'{biases[0]}' has a bias that keeps the mean of its outputs, which a dense {view.family.model_class} has no place for; "
            "compress without bias, or leave the model factored"
        ) from error


def factor_tensors(factors: Factors, bias: Tensor | None, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns what a factored layer stores, by name.

    Args:
        factors: Its factors.
        bias: Bias of the dense layer; None where it has none.
        layout: ``plain`` or ``pifa``.
        dtype: Dtype of the model.
    """
    left, right = balanced(factors.left_OR.double(), factors.right_RI.double())
    found: dict[str, Tensor] = {"weight": torch.empty(0, dtype=dtype)}
    if layout == PIFA:
        rows = pivoted(left, right)
        found |= {"reduce.weight": rows.rows_RI.to(dtype), "expand.weight": rows.others_SR.to(dtype), "order": rows.order_O.int()}
    else:
        found |= {"reduce.weight": right.to(dtype).contiguous(), "expand.weight": left.to(dtype).contiguous()}
    if bias is not None or factors.bias_O is not None:
        parts = [part.double() for part in (bias, factors.bias_O) if part is not None]
        found["bias"] = torch.stack(parts).sum(dim=0).to(dtype)
    return found


def balanced(left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same product with both factors of each term of one length, so that rounding to few bits hurts neither more."""
    tiny = torch.finfo(left_OR.dtype).tiny
    left, right = left_OR.norm(dim=0).clamp_min(tiny), right_RI.norm(dim=1).clamp_min(tiny)
    scale = (right / left).sqrt()
    return left_OR * scale, right_RI / scale.unsqueeze(1)
