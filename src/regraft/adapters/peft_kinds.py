"""LoRA and its variants in PEFT: their configs and initial values.

References:
    [HU21] LoRA, arXiv 2106.09685. [KAL23] rsLoRA, arXiv 2312.03732. [LIU24] DoRA, arXiv 2402.09353.
    [MEN24] PiSSA, arXiv 2404.02948. [BUY24] OLoRA, arXiv 2406.01775. [PAI24] EVA, arXiv 2410.07170.
    [ZHA23] AdaLoRA, arXiv 2303.10512.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, cast

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regraft.adapters.contract import ADAPTERS, AdapterRequest, Defaults, Evidence
from regraft.adapters.linear_like import oriented, weight_of
from regraft.adapters.nested_init import shared_start
from regraft.adapters.peft_backed import PeftAdapter, factors_of, layers_of
from regraft.adapters.plain_lora import saved_whole, target_names, task_type_of
from regraft.errors import InputError
from regraft.numerics import linalg
from regraft.settings import Positive, Settings


def lora_config(request: AdapterRequest, model: PreTrainedModel, **switches: Any) -> LoraConfig:
    """Returns the config of LoRA [HU21]: ``W + alpha/r * B A``, B ``(out, r)`` from zero, A ``(r, in)`` Kaiming uniform.

    The most common rank and alpha are set in the config and the others in its patterns, so that a uniform plan needs no pattern.

    Args:
        request: Ranks, alphas and options.
        model: The model to adapt.
        switches: Further fields of PEFT's config, which select the variant.
    """
    rank = Counter(request.ranks.values()).most_common(1)[0][0]
    alpha = Counter(request.alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=cast(int, _whole(alpha)),
        lora_dropout=request.dropout,
        target_modules=target_names(request.ranks, [name for name, _ in model.named_modules()]),
        rank_pattern={name: value for name, value in request.ranks.items() if value != rank},
        alpha_pattern=cast(dict[str, int], {name: _whole(value) for name, value in request.alphas.items() if value != alpha}),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in request.ranks),
        bias="none",
        modules_to_save=saved_whole(model),
        task_type=task_type_of(model),
        **switches,
    )


def _whole(alpha: float) -> float | int:
    """Returns a whole-numbered alpha as an integer, as readers of the config expect."""
    return int(alpha) if alpha == int(alpha) else alpha


def olora_start(model: PeftModel, request: AdapterRequest, evidence: Evidence | None) -> None:
    """Sets the start of OLoRA ([BUY24], algorithm 1): W = Q R without pivots, B = the first r columns of Q, A = the first r rows of R.

    These r columns depend only on the first r columns of W, and the rows of R are Q_r^T W, so that no full decomposition is needed. PEFT's
    own start computes the full decomposition, in the stored layout of the weight, and fails on Conv1D.
    """
    for _, layer in layers_of(model):
        base = layer.get_base_layer()
        weight = oriented(base, weight_of(base)).detach().double()
        first, second = factors_of(layer)
        frame = linalg.qr(weight[:, : second.shape[1]]).q
        second.data.copy_(frame)
        first.data.copy_(frame.T @ weight)


class EvaOptions(Settings):
    """Options of EVA."""

    batches: Positive = Field(default=4, description="training batches whose activations are decomposed")


def eva_start(model: PeftModel, request: AdapterRequest, evidence: Evidence | None) -> None:
    """Sets the start of EVA [PAI24]: A = the leading right singular vectors of the inputs, computed by PEFT. Ranks are not redistributed.

    Raises:
        InputError: There are no batches, or a batch has fewer tokens than the rank.
    """
    options = cast(EvaOptions, request.options)
    if evidence is None:
        raise InputError("adapter 'eva' starts from the inputs of training batches, and none were given; train it with regraft recover")
    # PEFT leaves out positions without a label; labels of whole rows say nothing about positions, so they are dropped here.
    batches = [
        {name: part for name, part in batch.items() if name != "labels" or part.shape == batch["input_ids"].shape}
        for batch in evidence.batches(options.batches)
    ]
    try:
        with torch.no_grad():
            initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)
    except ValueError as error:
        raise InputError(f"EVA cannot start: {str(error).splitlines()[0].rstrip('.')}; use larger batches or a lower --rank") from None


class AdaLoraOptions(Settings):
    """Options of AdaLoRA, as in the paper: training starts above the rank budget, and ranks are pruned down to it."""

    init_factor: float = Field(default=1.5, ge=1.0, le=8.0, description="first rank over the rank that is asked for")
    warm: float = Field(default=0.1, ge=0.0, lt=0.5, description="share of the steps before ranks are pruned")
    settle: float = Field(default=0.3, ge=0.0, lt=0.5, description="share of the steps after ranks are settled")
    every: Positive = Field(default=5, description="steps between two moves of the budget")


def adalora_config(request: AdapterRequest, model: PreTrainedModel) -> AdaLoraConfig:
    """Returns the config of AdaLoRA [ZHA23]: ``W + alpha/r * B diag(E) A``; entries of E are zeroed down to the requested mean rank.

    Raises:
        InputError: The request has different ranks, which AdaLoRA would find itself, or no number of steps.
    """
    options = cast(AdaLoraOptions, request.options)
    ranks = sorted(set(request.ranks.values()))
    if len(ranks) > 1:
        raise InputError(f"adapter 'adalora' finds its own ranks, but the plan gives {ranks[0]} to {ranks[-1]}; use --rank")
    if request.steps < 1:
        raise InputError("adapter 'adalora' needs the number of optimizer steps; give --steps")
    rank, steps, settled = ranks[0], request.steps, round(options.settle * request.steps)
    if steps - settled < 2:
        raise InputError(f"adapter 'adalora' has {steps - settled} of {steps} steps before its ranks settle, too few; give more --steps")
    return AdaLoraConfig(
        init_r=max(rank, round(options.init_factor * rank)),
        target_r=rank,
        tinit=round(options.warm * steps),
        tfinal=settled,
        deltaT=options.every,
        total_step=steps,
        orth_reg_weight=0.0,  # the trainer adds the penalty once for each step
        lora_alpha=cast(int, _whole(next(iter(request.alphas.values())))),
        lora_dropout=request.dropout,
        target_modules=target_names(request.ranks, [name for name, _ in model.named_modules()]),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in request.ranks),
        bias="none",
        modules_to_save=saved_whole(model),
        task_type=task_type_of(model),
    )


DORA_IS_NO_LORA = "adapter 'dora' normalises every row of the weight, which no plain LoRA does"


def eva_config(request: AdapterRequest, model: PreTrainedModel) -> LoraConfig:
    """Returns the config of EVA: a LoRA whose initial values are set by :func:`eva_start`.

    Raises:
        InputError: An embedding is among the modules; its inputs are not vectors.
    """
    for name in request.ranks:
        if isinstance(model.get_submodule(name), nn.Embedding):
            raise InputError(f"adapter 'eva' starts from the inputs of a module, and '{name}' is an embedding; choose other --targets")
    return lora_config(request, model, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))


ADAPTERS.add("lora", PeftAdapter(lora_config, first=shared_start))
ADAPTERS.add("rslora", PeftAdapter(partial(lora_config, use_rslora=True), first=shared_start))
ADAPTERS.add("dora", PeftAdapter(partial(lora_config, use_dora=True), first=shared_start, whole=DORA_IS_NO_LORA))
ADAPTERS.add("pissa", PeftAdapter(partial(lora_config, init_lora_weights="pissa"), moves_weights=True))
ADAPTERS.add("olora", PeftAdapter(lora_config, first=olora_start, moves_weights=True))
ADAPTERS.add("eva", PeftAdapter(eva_config, first=eva_start, options=EvaOptions))
ADAPTERS.add("adalora", PeftAdapter(adalora_config, options=AdaLoraOptions, defaults=Defaults(lr=2e-3)))
