"""Torch-Pruning and optipfair, each used as its own documentation says, so that a benchmark can prune a Llama with them to a given size.

Both come with ``pip install regraft[bench]``. Every setting below is one entry of :data:`RIVALS`: package, name, and a function
of model, calibration windows and ratio that returns a pruned copy. The ratio is a share of all parameters, as everywhere here; how many
channels that takes is worked out exactly, or by bisection where several widths change at once.

What is done for them, so that they are seen at their best:

* Torch-Pruning's ``GroupHessianImportance.accumulate_grad`` keeps the gradient of the last sample only (it looks names up in a table
  of parameters). It is given the mean of the squared gradients over all calibration windows instead.
* Torch-Pruning prunes an embedding and a tied head apart; they are tied again afterwards, which they may be, having lost the same channels.
* Its ranking over all layers (``global_pruning``) is run without its normalisation by the mean, which makes layers comparable by loss.
* Its iterative variants get new gradients before each of their steps.
* optipfair prunes FFN channels and whole layers; both are combined, with the layers that its own analysis finds least important.
"""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Prune = Callable[[PreTrainedModel, "Evidence", float], PreTrainedModel | None]
"""Gives nothing where the setting alone removes more than the ratio."""

_CLOSE = 0.002
"""Share of the parameters by which a size that is searched may miss."""

logging.getLogger("optipfair").setLevel(logging.ERROR)


@dataclass
class Evidence:
    """Calibration windows, int64 (windows, tokens), and what several settings compute from them alike."""

    windows: Tensor
    first: Mapping[str, Tensor] | None = None
    second: Mapping[str, Tensor] | None = None

    def gradients(self, model: PreTrainedModel) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Mean gradient, and mean over windows of the squared gradient, of the dense model by parameter name; computed once."""
        if self.first is None or self.second is None:
            self.first, self.second = mean_gradients(model, self.windows)
        return self.first, self.second

    def batches(self) -> list[dict[str, Tensor]]:
        """The windows as optipfair wants them."""
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in self.windows.split(16)]


@cache
def _package(name: str) -> Any:
    """Imports a package when it is first measured."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"this benchmark compares with other packages: pip install torch-pruning optipfair ({error})") from None


def mean_gradients(model: PreTrainedModel, windows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradient of the language-modelling loss, and mean over windows of its square, by parameter name."""
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    second = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for ids in windows.split(1):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                first[name].add_(gradient, alpha=1.0 / len(windows))
                second[name].addcmul_(gradient, gradient, value=1.0 / len(windows))
    return first, second


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def ffn_channels(model: PreTrainedModel, parameters: float) -> int:
    """FFN channels, of all layers together, that hold so many parameters."""
    return round(parameters / (3 * model.config.hidden_size))


# ---- Torch-Pruning ----------------------------------------------------------------------------------------------------------------


def torch_pruning_ffn(importance: str, *, everywhere: bool, steps: int = 1, heads: float = 0.0) -> Prune:
    """FFN channels, and query heads evenly from every KV head where ``heads`` is a share of them.

    Args:
        importance: ``magnitude``, ``taylor``, ``taylor-multi`` (its multivariable form) or ``hessian``.
        everywhere: One ranking for all layers (``global_pruning``).
        steps: Iterations, with new gradients before each.
        heads: Share of the query heads.
    """

    def prune(model: PreTrainedModel, evidence: Evidence, ratio: float) -> PreTrainedModel:
        total = count(model)
        pruned = copy.deepcopy(model)
        if heads:
            _fill(pruned, importance, evidence)
            _pruner(pruned, _importance(importance, everywhere=False), heads=heads, ffn=0.0).step()
            _count_heads(pruned)
        wanted = ffn_channels(model, ratio * total - (total - count(pruned)))
        all_channels = sum(layer.mlp.up_proj.out_features for layer in model.model.layers)
        # Half a channel of each layer more: it rounds what stays down to whole channels.
        share = (wanted if everywhere else wanted + 0.5) / all_channels
        pruner = _pruner(pruned, _importance(importance, everywhere=everywhere), ffn=share, everywhere=everywhere, steps=steps)
        for _ in range(steps):
            _fill(pruned, importance, evidence)
            pruner.step()
        return _finished(pruned)

    return prune


def torch_pruning_all(importance: str) -> Prune:
    """Residual width, query heads and FFN channels by one share, as in the package's own example for language models."""

    def prune(model: PreTrainedModel, evidence: Evidence, ratio: float) -> PreTrainedModel:
        total, low, high = count(model), 0.4 * ratio, ratio  # a matrix that loses the share on both sides loses nearly twice of it
        found: list[PreTrainedModel] = []
        for _ in range(6):
            share = 0.5 * (low + high)
            pruned = copy.deepcopy(model)
            _fill(pruned, importance, evidence)
            _pruner(pruned, _importance(importance, everywhere=False), ffn=share, heads=share, width=True).step()
            found.append(_finished(pruned))
            removed = 1.0 - count(found[-1]) / total
            if abs(removed - ratio) < _CLOSE:
                break
            low, high = (share, high) if removed < ratio else (low, share)
        return min(found, key=lambda model: abs(1.0 - count(model) / total - ratio))

    return prune


def _importance(kind: str, *, everywhere: bool) -> Any:
    normalizer = None if everywhere else "mean"
    if kind == "magnitude":
        return _package("torch_pruning").importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
    if kind == "hessian":
        return _package("torch_pruning").importance.GroupHessianImportance(normalizer=normalizer)
    return _package("torch_pruning").importance.GroupTaylorImportance(normalizer=normalizer, multivariable=kind == "taylor-multi")


def _fill(model: PreTrainedModel, kind: str, evidence: Evidence) -> None:
    """Puts the gradients where an importance looks for them: ``.grad``."""
    if kind == "magnitude":
        return
    first, second = evidence.gradients(model)
    if any(parameter.shape != first[name].shape for name, parameter in model.named_parameters()):
        first, second = mean_gradients(model, evidence.windows)  # something was cut since
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = (second if kind == "hessian" else first)[name].clone()


def _pruner(
    model: PreTrainedModel,
    importance: Any,
    *,
    ffn: float,
    heads: float = 0.0,
    width: bool = False,
    everywhere: bool = False,
    steps: int = 1,
) -> Any:
    layers = list(model.model.layers)
    attention = [layer.self_attn for layer in layers]
    ignored: list[nn.Module] = [model.lm_head]
    if not width:
        ignored.append(model.model.embed_tokens)
    if not heads:
        ignored += [module for layer in attention for module in (layer.q_proj, layer.k_proj, layer.v_proj)]
    head_dim = attention[0].head_dim
    num_heads = {module: module.out_features // head_dim for layer in attention for module in (layer.q_proj, layer.k_proj, layer.v_proj)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _package("torch_pruning").pruner.BasePruner(
            model,
            example_inputs=torch.ones(1, 8, dtype=torch.int64),
            importance=importance,
            global_pruning=everywhere,
            pruning_ratio=ffn,
            ignored_layers=ignored,
            num_heads=num_heads if heads else {},
            out_channel_groups={},
            in_channel_groups={},
            prune_num_heads=bool(heads),
            prune_head_dims=False,
            head_pruning_ratio=heads,
            iterative_steps=steps,
            output_transform=lambda output: output.logits,
        )


def _count_heads(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    model.zero_grad(set_to_none=True)
    _count_heads(model)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False)


# ---- optipfair --------------------------------------------------------------------------------------------------------------------


def optipfair_ffn(method: str, *, data: bool = False, layers_removed: int = 0, spared: int = 0) -> Prune:
    """FFN channels, evenly, after whole layers where asked for.

    Args:
        method: ``PPM`` (also known as MAW), ``VOW``, ``PON`` or ``L2``.
        data: Its hybrid of weights and activations, which it has for PPM alone.
        layers_removed: Whole layers, those of least importance by its analysis.
        spared: Layers of the greatest importance whose FFN stays whole.
    """

    def prune(model: PreTrainedModel, evidence: Evidence, ratio: float) -> PreTrainedModel | None:
        total, pruned = count(model), copy.deepcopy(model)
        ranked: list[int] = []
        if layers_removed or spared:
            found = _package("optipfair").analyze_layer_importance(pruned, evidence.batches(), show_progress=False)
            ranked = sorted(found, key=lambda index: found[index])
        if layers_removed:
            _package("optipfair").prune_model(pruned, pruning_type="DEPTH", layer_indices=ranked[:layers_removed], show_progress=False)
        kept = [index for index in range(len(pruned.model.layers)) if not spared or index not in ranked[-spared:]]
        missing = ratio * total - (total - count(pruned))
        width = pruned.model.layers[0].mlp.up_proj.out_features
        channels = round(ffn_channels(pruned, missing) / len(kept))
        if channels < 1:
            return pruned if abs(missing) <= 0.005 * total else None
        return _package("optipfair").prune_model(
            pruned,
            pruning_type="MLP_GLU",
            neuron_selection_method="MAW" if data else method,
            pruning_percentage=100.0 * (channels + 0.5) / width,
            dataloader=evidence.batches() if data else None,
            layer_indices=kept if spared else None,
            show_progress=False,
        )

    return prune


RIVALS: dict[tuple[str, str], Prune] = {
    ("torch-pruning", "magnitude, each layer alike"): torch_pruning_ffn("magnitude", everywhere=False),
    ("torch-pruning", "Taylor, each layer alike"): torch_pruning_ffn("taylor", everywhere=False),
    ("torch-pruning", "Taylor multivariable, each layer alike"): torch_pruning_ffn("taylor-multi", everywhere=False),
    ("torch-pruning", "Hessian, each layer alike"): torch_pruning_ffn("hessian", everywhere=False),
    ("torch-pruning", "Taylor, one ranking"): torch_pruning_ffn("taylor", everywhere=True),
    ("torch-pruning", "Taylor multivariable, one ranking"): torch_pruning_ffn("taylor-multi", everywhere=True),
    ("torch-pruning", "Hessian, one ranking"): torch_pruning_ffn("hessian", everywhere=True),
    ("torch-pruning", "Taylor, one ranking, 3 steps"): torch_pruning_ffn("taylor", everywhere=True, steps=3),
    ("torch-pruning", "Hessian, one ranking, 3 steps"): torch_pruning_ffn("hessian", everywhere=True, steps=3),
    ("torch-pruning", "Taylor, query heads and FFN"): torch_pruning_ffn("taylor", everywhere=False, heads=0.3),
    ("torch-pruning", "Taylor, width, heads and FFN"): torch_pruning_all("taylor"),
    ("torch-pruning", "magnitude, width, heads and FFN"): torch_pruning_all("magnitude"),
    ("optipfair", "PPM"): optipfair_ffn("PPM"),
    ("optipfair", "VOW"): optipfair_ffn("VOW"),
    ("optipfair", "PON"): optipfair_ffn("PON"),
    ("optipfair", "L2"): optipfair_ffn("L2"),
    ("optipfair", "PPM with activations"): optipfair_ffn("PPM", data=True),
    ("optipfair", "PPM with activations, most important layer whole"): optipfair_ffn("PPM", data=True, spared=1),
    ("optipfair", "one layer removed, PPM with activations"): optipfair_ffn("PPM", data=True, layers_removed=1),
    ("optipfair", "two layers removed, PPM with activations"): optipfair_ffn("PPM", data=True, layers_removed=2),
    ("optipfair", "three layers removed, PPM with activations"): optipfair_ffn("PPM", data=True, layers_removed=3),
}
"""Package and setting to what prunes with it."""
