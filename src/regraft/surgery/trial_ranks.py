"""A copy of a model in which layers are truncated and restored, to measure rank vectors without building a model for each.

It computes the same as the factored model, with the product of the factors in place of the dense weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.models.layerwise import Layerwise
from regraft.models.precision import float32_on_cpu
from regraft.models.view import ModelView
from regraft.numerics.divergence import log_probabilities, summed_divergence
from regraft.numerics.truncation import Factors, Truncation
from regraft.plans import FactorSpace

JUDGED_WINDOWS = 8  # for the damage of one layer alone: every one is run for every rank of every layer
_POINTS = (0.35, 0.7)  # stored shares of a layer at which its damage is measured
_LEAST = 1e-12


class TrialModel:
    """A copy of a model whose layers can be truncated in place.

    Args:
        model: Copied; left as it is.
        truncations: Decompositions of the layers that may be truncated, by name.
    """

    def __init__(self, model: PreTrainedModel, truncations: Mapping[str, Truncation]) -> None:
        self.model = copy.deepcopy(model)
        self._transposed = ModelView(self.model).family.transposed
        self._truncations = truncations
        self._whole = {name: _kept(self.model.get_submodule(name)) for name in truncations}

    @torch.no_grad()
    def set(self, ranks: Mapping[str, int]) -> None:
        """Truncates the layers that are named and makes all others whole."""
        for name in self._truncations:
            module = self.model.get_submodule(name)
            weight, bias = self._whole[name]
            if name in ranks:
                truncate(module, self._truncations[name].at(ranks[name]), bias, transposed=self._transposed)
            else:
                module.get_parameter("weight").data = weight
                module._parameters["bias"] = bias


def truncate(module: nn.Module, factors: Factors, bias: nn.Parameter | None, *, transposed: bool) -> None:
    """Puts the product of factors into a dense layer, and adds their bias to its own.

    Args:
        module: The layer, which is changed.
        factors: Factors of its weight.
        bias: The layer's own bias, or None.
        transposed: Whether weights are stored (in, out).
    """
    weight = module.get_parameter("weight")
    product = factors.left_OR @ factors.right_RI
    weight.data = (product.T if transposed else product).to(weight)
    if factors.bias_O is not None:
        added = factors.bias_O.to(weight)
        module.bias = nn.Parameter(added if bias is None else bias.data + added, requires_grad=False)


def measured_damage(
    model: PreTrainedModel, space: FactorSpace, truncations: Mapping[str, Truncation], windows_NT: Tensor
) -> dict[str, tuple[float, ...]]:
    """Returns the damage of every choice of every layer in nats: the predicted curve, corrected by what is measured at a few ranks.

    One layer is truncated at a time; the divergence of the predictions from the dense model's is measured on windows that nothing was
    fitted to. Between the measured ranks, measured over predicted is interpolated in logarithms, outside it is kept.

    Args:
        model: Left as it is.
        space: The choices and their predicted damage.
        truncations: Decompositions of all layers, by name.
        windows_NT: Tokens, int64 (windows, tokens); a few of them are used.

    Returns:
        By layer, one number for each of its ranks.
    """
    view = ModelView(model)
    found: dict[str, tuple[float, ...]] = {}
    with float32_on_cpu(model), torch.no_grad():
        walk = Layerwise(view, windows_NT[:JUDGED_WINDOWS])
        inputs = [walk.first]
        for layer in range(len(view.layers)):
            inputs.append(walk.run(layer, inputs[-1]))
        dense = [log_probabilities(logits) for logits in walk.logits(inputs[-1])]
        for site in space.sites:
            ranks = _measured_at(space, site.ranks, site.rows, site.columns)
            ratios: list[float] = []
            for rank in ranks:
                module = copy.deepcopy(view.layers[site.layer])
                inner = module.get_submodule(site.name.removeprefix(f"{view.layer_name(site.layer)}."))
                truncate(inner, truncations[site.name].at(rank), _kept(inner)[1], transposed=view.family.transposed)
                hidden = walk.run(site.layer, inputs[site.layer], module)
                for above in range(site.layer + 1, len(view.layers)):
                    hidden = walk.run(above, hidden)
                pairs = zip(walk.logits(hidden), dense, strict=True)
                total = sum(float(summed_divergence(log_probabilities(logits), aim)) for logits, aim in pairs)
                measured = total / windows_NT[:JUDGED_WINDOWS].numel()
                ratios.append(max(measured, _LEAST) / max(site.damage[site.ranks.index(rank)], _LEAST))
            found[site.name] = _corrected(site.ranks, site.damage, ranks, ratios)
    return found


def _measured_at(space: FactorSpace, choices: Sequence[int], rows: int, columns: int) -> list[int]:
    """Returns the ranks at which a layer is measured, ascending."""
    factored = choices[:-1] or choices
    limit = factored[-1]
    return sorted({min(factored, key=lambda rank: abs(rank - share * limit)) for share in _POINTS})


def _corrected(choices: Sequence[int], damage: Sequence[float], ranks: Sequence[int], ratios: Sequence[float]) -> tuple[float, ...]:
    known = torch.tensor(ratios, dtype=torch.float64).log()
    found: list[float] = []
    for rank, price in zip(choices, damage, strict=True):
        if len(ranks) == 1 or rank <= ranks[0]:
            factor = known[0]
        elif rank >= ranks[-1]:
            factor = known[-1]
        else:
            share = (rank - ranks[0]) / (ranks[-1] - ranks[0])
            factor = (1.0 - share) * known[0] + share * known[-1]
        found.append(price * float(factor.exp()))
    return tuple(torch.tensor(found, dtype=torch.float64).flip(0).cummax(0).values.flip(0).tolist())


def _kept(module: nn.Module) -> tuple[Tensor, nn.Parameter | None]:
    return module.get_parameter("weight").data, module._parameters.get("bias")
