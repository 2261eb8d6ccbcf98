"""LoRA and its variants in PEFT: their configs and initial values.

References:
    [HU21] LoRA, arXiv 2106.09685. [KAL23] rsLoRA, arXiv 2312.03732. [LIU24] DoRA, arXiv 2402.09353.
    [MEN24] PiSSA, arXiv 2404.02948. [BUY24] OLoRA, arXiv 2406.01775. [PAI24] EVA, arXiv 2410.07170.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from pydantic import Field
from transformers import PreTrainedModel

from regraft.adapters.contract import ADAPTERS, AdapterRequest, Evidence
from regraft.adapters.linear_like import is_table, is_transposed, oriented, weight_of
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
        lora_alpha=cast(int, whole_number(alpha)),
        lora_dropout=request.dropout,
        target_modules=target_names(request.ranks, [name for name, _ in model.named_modules()]),
        rank_pattern={name: value for name, value in request.ranks.items() if value != rank},
        alpha_pattern=cast(dict[str, int], {name: whole_number(value) for name, value in request.alphas.items() if value != alpha}),
        fan_in_fan_out=stored_in_other_order(model, request.ranks),
        bias="none",
        modules_to_save=saved_whole(model),
        task_type=task_type_of(model),
        **switches,
    )


def whole_number(alpha: float) -> float | int:
    """Writes a whole alpha as an integer, which is what readers of the config expect."""
    return int(alpha) if alpha == int(alpha) else alpha


def stored_in_other_order(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Returns whether any of the modules stores its weight as (in, out), as GPT-2's do."""
    return any(is_transposed(model.get_submodule(name)) for name in names)


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
        raise InputError(f"EVA cannot start: {str(error).splitlines()[0].rstrip('.')}; use larger batches or a lower `rank`") from None


DORA_IS_NO_LORA = "adapter 'dora' normalises every row of the weight, which no plain LoRA does"


def eva_config(request: AdapterRequest, model: PreTrainedModel) -> LoraConfig:
    """Returns the config of EVA: a LoRA whose initial values are set by :func:`eva_start`.

    Raises:
        InputError: An embedding is among the modules; its inputs are not vectors.
    """
    for name in request.ranks:
        if is_table(model.get_submodule(name)):
            raise InputError(f"adapter 'eva' starts from the inputs of a module, and '{name}' is an embedding; choose other `targets`")
    return lora_config(request, model, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))


ADAPTERS.add("lora", PeftAdapter(lora_config, first=shared_start))
ADAPTERS.add("rslora", PeftAdapter(partial(lora_config, use_rslora=True), first=shared_start))
ADAPTERS.add("dora", PeftAdapter(partial(lora_config, use_dora=True), first=shared_start, whole=DORA_IS_NO_LORA))
ADAPTERS.add("pissa", PeftAdapter(partial(lora_config, init_lora_weights="pissa"), moves_weights=True))
ADAPTERS.add("olora", PeftAdapter(lora_config, first=olora_start, moves_weights=True))
ADAPTERS.add("eva", PeftAdapter(eva_config, first=eva_start, options=EvaOptions))
