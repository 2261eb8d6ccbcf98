"""Torch-Pruning and optipfair, each used as its own documentation says, so that a benchmark can prune a Llama with them to a given size.

Both come with ``pip install regraft[bench]``. Every setting below is one entry of :data:`RIVALS`: package, name, and a function
of model, calibration windows and ratio that returns a pruned copy. The ratio is a share of all parameters, as everywhere here; how many
channels that takes is worked out exactly, or by bisection where several widths change at once.

What is done for them, so that they are seen at their best:

* Torch-Pruning's ``GroupHessianImportance.accumulate_grad`` keeps the gradient of the last sample only (it looks names up in a table
  of parameters). It is given the mean of the squared gradients over all calibration windows instead.
* Torch-Pruning prunes an embedding and a tied head apart; they are tied again afterwards, which they may be, having lost the same channels.
* Its ranking over all layers (``global_pruning``) is run without its normalisation by the mean, which makes layers comparable by loss.
* Its heads stay: with transformers 5.23 following the attention of a model with grouped queries does not come to an end in it (version
  1.6.1; the index maps of a group grow for ever), and with a key-value cache in the traced pass not even without grouped queries.
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
"""Gives nothing where the setting cannot remove so much, or cannot remove so little."""

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
        """Mean gradient, and mean over windows of the squared gradient, by parameter name; those of the dense model are computed once."""
        found = {name: parameter.shape for name, parameter in model.named_parameters()}
        if self.first is None or self.second is None:
            self.first, self.second = mean_gradients(model, self.windows)
        elif any(shape != self.first[name].shape for name, shape in found.items()):
            return mean_gradients(model, self.windows)  # something was cut since
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


def torch_pruning_ffn(importance: str, *, everywhere: bool, steps: int = 1) -> Prune:
    """FFN channels.

    Args:
        importance: ``magnitude``, ``taylor``, ``taylor-multi`` (its multivariable form) or ``hessian``.
        everywhere: One ranking for all layers (``global_pruning``).
        steps: Iterations, with new gradients before each.
    """

    def prune(model: PreTrainedModel, evidence: Evidence, ratio: float) -> PreTrainedModel:
        pruned = copy.deepcopy(model)
        all_channels = sum(layer.mlp.up_proj.out_features for layer in model.model.layers)
        # Half a channel of each layer more: it rounds what stays down to whole channels.
        share = (ffn_channels(model, ratio * count(model)) + (0.0 if everywhere else 0.5)) / all_channels
        pruner = _pruner(pruned, _importance(importance, everywhere=everywhere), share, everywhere=everywhere, steps=steps)
        for _ in range(steps):
            _fill(pruned, importance, evidence)
            pruner.step()
        return _finished(pruned)

    return prune


def torch_pruning_width(importance: str) -> Prune:
    """Residual width and FFN channels by one share, as in the package's own example for language models, but for the heads."""

    def prune(model: PreTrainedModel, evidence: Evidence, ratio: float) -> PreTrainedModel:
        total, low, high = count(model), 0.4 * ratio, ratio  # a matrix that loses the share on both sides loses nearly twice of it
        found: list[PreTrainedModel] = []
        for _ in range(6):
            share = 0.5 * (low + high)
            pruned = copy.deepcopy(model)
            _fill(pruned, importance, evidence)
            _pruner(pruned, _importance(importance, everywhere=False), share, width=True).step()
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
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = (second if kind == "hessian" else first)[name].clone()


def _pruner(model: PreTrainedModel, importance: Any, share: float, *, width: bool = False, everywhere: bool = False, steps: int = 1) -> Any:
    ignored: list[nn.Module] = [model.lm_head]
    ignored += [getattr(layer.self_attn, name) for layer in model.model.layers for name in ("q_proj", "k_proj", "v_proj")]
    if not width:
        ignored.append(model.model.embed_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _package("torch_pruning").pruner.BasePruner(
            model,
            example_inputs={"input_ids": torch.ones(1, 8, dtype=torch.int64), "use_cache": False},
            importance=importance,
            global_pruning=everywhere,
            pruning_ratio=share,
            ignored_layers=ignored,
            out_channel_groups={},
            in_channel_groups={},
            iterative_steps=steps,
            output_transform=lambda output: output.logits,
        )


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    model.zero_grad(set_to_none=True)
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
        if channels >= width:
            return None
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
    ("torch-pruning", "Taylor, width and FFN"): torch_pruning_width("taylor"),
    ("torch-pruning", "Hessian, width and FFN"): torch_pruning_width("hessian"),
    ("torch-pruning", "magnitude, width and FFN"): torch_pruning_width("magnitude"),
    ("optipfair", "PPM"): optipfair_ffn("PPM"),
    ("optipfair", "VOW"): optipfair_ffn("VOW"),
    ("optipfair", "PON"): optipfair_ffn("PON"),
    ("optipfair", "L2"): optipfair_ffn("L2"),
    ("optipfair", "PPM with activations"): optipfair_ffn("PPM", data=True),
    ("optipfair", "PPM with activations, most important layer whole"): optipfair_ffn("PPM", data=True, spared=1),
    ("optipfair", "PPM with activations, two most important layers whole"): optipfair_ffn("PPM", data=True, spared=2),
    ("optipfair", "one layer removed, PPM with activations"): optipfair_ffn("PPM", data=True, layers_removed=1),
    ("optipfair", "two layers removed, PPM with activations"): optipfair_ffn("PPM", data=True, layers_removed=2),
    ("optipfair", "three layers removed, PPM with activations"): optipfair_ffn("PPM", data=True, layers_removed=3),
}
"""Package and setting to what prunes with it."""
