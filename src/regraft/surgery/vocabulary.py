"""Cutting of a model's vocabulary: the rows of the embedding and of the head for some of the tokens, and the token ids in its configs."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.errors import ModelError
from regraft.models.build import build
from regraft.models.live import resting
from regraft.models.view import ModelView, fingerprint, modules_of, parameter_count, parameter_shapes
from regraft.models.vocabulary import ids_in, renumbered_ids
from regraft.plans import Group, Groups, Member, PrunePlan
from regraft.surgery.cut import check_plan, cut_state, without_doubles

VOCABULARY = "vocabulary"
# Config keys of the number of tokens of further embeddings that are read by token ids.
_FURTHER_SIZES = ("vocab_size_per_layer_input",)


def vocabulary_groups(model: PreTrainedModel) -> Groups:
    """Returns the group of a model's tokens alone; see :func:`token_group`."""
    view = ModelView(model)
    found = (token_group(model),)
    return Groups(fingerprint(model), view.family.model_type, len(view.layers), parameter_count(model), found, parameter_shapes(model))


def token_group(model: PreTrainedModel) -> Group:
    """Returns the group of a model's tokens: a unit is a row of every embedding that token ids index, and of the head.

    Raises:
        ModelError: The head has another number of rows than the embedding.
    """
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters: dict[str, nn.Parameter] = {}
    head: Any = model.get_output_embeddings()
    for module in (*_read_by_ids(model, rows), head):
        for parameter in module.parameters(recurse=False):
            if parameter.shape[0] != rows:
                raise ModelError(f"'{names[id(parameter)]}' has {parameter.shape[0]} rows, the embedding {rows}: its vocabulary is not cut")
            parameters[names[id(parameter)]] = parameter
    members = tuple(Member(name, 0, "out") for name in parameters)
    unit = sum(math.prod(parameter.shape[1:]) for parameter in parameters.values())
    return Group(VOCABULARY, "vocabulary", None, rows, members, unit)


def ids_of_configs(model: PreTrainedModel) -> set[int]:
    """Returns the token ids that a model's configs name, such as the beginning and the end of a text."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    generation: Any = model.generation_config
    found = ids_in(model.config.to_dict()) | (ids_in(generation.to_dict()) if generation is not None else set())
    return {number for number in found if number < rows}


def cut_vocabulary(model: PreTrainedModel, groups: Groups, plan: PrunePlan) -> PreTrainedModel:
    """Returns the model with the tokens that a plan keeps, numbered anew in their order.

    Its logits for a text of kept tokens equal those of the model at the kept tokens.

    Args:
        model: The model; the result shares every tensor that is not cut with it.
        groups: What :func:`vocabulary_groups` returned.
        plan: The tokens to keep.

    Raises:
        PlanError: The plan belongs to another model.
    """
    check_plan(groups, plan)
    kept = plan.cuts[0].kept
    place = {old: new for new, old in enumerate(kept)}
    view = ModelView(model)
    values = model.config.to_dict()
    sizes = {key: len(kept) for key in _FURTHER_SIZES if values.get(key) == groups.groups[0].units}
    size_key = model.config.attribute_map.get("vocab_size", "vocab_size")
    smaller = build(
        model,
        [view.sizes(layer) for layer in range(len(view.layers))],
        cut_state(without_doubles(model), groups, plan.cuts),
        changes={size_key: len(kept), **sizes, **renumbered_ids(values, place)},
    )
    generation: Any = smaller.generation_config
    if generation is not None:
        for key, value in renumbered_ids(generation.to_dict(), place).items():
            setattr(generation, key, value)
    return smaller


def _read_by_ids(model: PreTrainedModel, rows: int) -> list[nn.Embedding]:
    """Returns the embeddings of a model that read token ids, and not positions or kinds."""
    ids = torch.tensor([[rows - 1, 0, rows - 2]], device=model.device)
    found: dict[int, nn.Embedding] = {}

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given: Any = inputs[0] if inputs else None
        if isinstance(given, Tensor) and given.shape == ids.shape and torch.equal(given, ids):
            found[id(module)] = cast(nn.Embedding, module)

    handles = [module.register_forward_pre_hook(see) for module in modules_of(model, nn.Embedding).values()]
    try:
        with resting(model), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())
