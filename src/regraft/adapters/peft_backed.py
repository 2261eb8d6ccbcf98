"""Adapters of the PEFT library, each defined by a function that makes its PEFT config."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.adapters.contract import AdapterRequest, Defaults, Evidence, LowRank
from regraft.adapters.linear_like import oriented, untie, weight_of
from regraft.adapters.plain_lora import CONFIG, tidy_config, write_plain_lora
from regraft.adapters.seeding import isolated
from regraft.errors import InputError
from regraft.models.quiet import in_one_line
from regraft.reading import object_in, text_in
from regraft.settings import Settings

NAME = "default"  # name of the adapter inside the PeftModel
_FIRST = "regraft_first"  # prefix of buffers with the initial factors of an adapter whose start is subtracted from the weights

FirstValues = Callable[[PeftModel, AdapterRequest, Evidence | None], None]


def _nothing(model: PeftModel, request: AdapterRequest, evidence: Evidence | None) -> None:
    """Keeps the initial values of PEFT."""


@final
@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that PEFT builds, merges and saves.

    Attributes:
        config: Makes the PEFT config from the request and the model.
        first: Sets initial values that PEFT does not set.
        moves_weights: Whether the adapter's start is subtracted from the weights. Such an adapter does not fit the original weights.
            Therefore its start is stored, and the difference from it is saved: a plain LoRA of twice the rank.
        whole: The reason why it cannot be written as a plain LoRA, or empty.
    """

    config: Callable[[AdapterRequest, PreTrainedModel], PeftConfig]
    first: FirstValues = _nothing
    moves_weights: bool = False
    whole: str = ""
    options: type[Settings] = Settings
    defaults: Defaults = field(default_factory=Defaults)

    def attach(self, model: PreTrainedModel, request: AdapterRequest, evidence: Evidence | None) -> nn.Module:
        """Returns a ``PeftModel`` around the model; see :class:`~regraft.adapters.contract.Adapter`."""
        with isolated(request.seed), warnings.catch_warnings():
            # PEFT 0.21 reads a property that transformers 5.23 renamed, and reports its own setting for Conv1D.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", message="lora with eva initialization")
            config = self.config(request, model)
            if self.moves_weights:  # a head that shares the weight is to stay where it is
                for name in request.ranks:
                    if untie(model, model.get_submodule(name)):
                        model.config.tie_word_embeddings = False
            before = _weights(model, request.ranks) if self.moves_weights else {}
            try:
                adapted = cast(PeftModel, get_peft_model(model, config))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise InputError(
                    f"PEFT cannot put this adapter there: {str(error).splitlines()[0].rstrip('.')}; choose other `targets`"
                ) from None
            try:
                self.first(adapted, request, evidence)
                for name, layer in layers_of(adapted):
                    if self.moves_weights:
                        _move_start(layer, before[name])
            except BaseException:
                cast(Any, adapted.base_model).unload()
                for name, weight in before.items():
                    weight_of(model.get_submodule(name)).data.copy_(weight)
                raise
            return adapted

    def after_step(self, adapted: nn.Module, step: int) -> None:
        """Does nothing: the adapter keeps its form while it trains."""

    def penalty(self, adapted: nn.Module) -> None:
        """Returns nothing: it trains on the loss alone."""

    def state(self, adapted: nn.Module) -> dict[str, Tensor]:
        """Returns nothing: all that it learns is in its parameters."""
        return {}

    def put_state(self, adapted: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Does nothing."""

    def finish(self, adapted: nn.Module) -> None:
        """Does nothing: what was trained is what is kept."""

    def factors(self, adapted: nn.Module) -> dict[str, LowRank]:
        """Returns B and A of every module for its original weight, with the scale in B."""
        if self.whole:
            raise InputError(f"{self.whole}; fold it into the weights instead, with `regraft export ADAPTER --to merged`")
        return {name: _low_rank(layer) for name, layer in layers_of(cast(PeftModel, adapted))}

    def merge(self, adapted: nn.Module) -> PreTrainedModel:
        """Merges the factors into the weights in float32 and casts back, one module at a time."""
        return merge_stock(cast(PeftModel, adapted))

    def save(self, adapted: nn.Module, folder: Path, base: str) -> None:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's format.

        An adapter whose start was subtracted from the weights is written as a plain LoRA for the original weights.
        """
        peft_model = cast(PeftModel, adapted)
        if self.moves_weights:
            modules = {name: layer.get_base_layer() for name, layer in layers_of(peft_model)}
            task = peft_model.peft_config[NAME].task_type
            names, head = module_names(peft_model), trained_whole(peft_model)
            write_plain_lora(self.factors(adapted), modules, names, folder, base, str(task) if task else None, head)
            return
        peft_model.peft_config[NAME].base_model_name_or_path = base
        # "auto" would query the hub for the base model's vocabulary. An adapted embedding is saved as its two factors.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*invalid shape")  # AdaLoRA may give some modules rank 0
            peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        tidy_config(folder / CONFIG)


def layers_of(adapted: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yields PEFT's layers with the names of their modules."""
    for name, module in cast(nn.Module, adapted.base_model.model).named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def module_names(adapted: PeftModel) -> tuple[str, ...]:
    """Returns the names of the model's own modules."""
    inner = cast(nn.Module, adapted.base_model.model).named_modules()
    return tuple(name.replace(".base_layer", "").replace(".original_module", "") for name, _ in inner)


def trained_whole(adapted: PeftModel) -> dict[str, Tensor]:
    """Returns the parameters of the modules that PEFT trains completely (``modules_to_save``), by their names in the plain model."""
    found: dict[str, Tensor] = {}
    for name, module in cast(nn.Module, adapted.base_model.model).named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            kept = module.modules_to_save[NAME]
            found |= {f"{name}.{key}": value.detach() for key, value in kept.named_parameters()}
    return found


def retrained_tokens(adapted: PeftModel) -> tuple[int, ...]:
    """Returns the token ids whose rows of the embedding PEFT trains beside the adapter (``trainable_token_indices``)."""
    given = getattr(adapted.peft_config[NAME], "trainable_token_indices", None) or ()
    rows = object_in(given).values() or [given]
    return tuple(sorted({int(row) for some in rows for row in some}))


def _weights(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns copies of weights, so that they can be restored exactly."""
    return {name: weight_of(model.get_submodule(name)).detach().clone() for name in names}


def factors_of(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns the trained parameters A ``(r, in)`` and B ``(out, r)`` of a PEFT layer."""
    if NAME in layer.lora_embedding_A:
        return layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
    first, second = layer.lora_A[NAME], layer.lora_B[NAME]
    return (first, second) if isinstance(first, nn.Parameter) else (first.weight, second.weight)


def merge_stock(adapted: PeftModel) -> PreTrainedModel:
    """Merges a PEFT adapter into the weights in float32 and casts back, one module at a time.

    If an embedding and its head share a weight and only one of them was adapted, that one gets its own copy first.

    Raises:
        InputError: PEFT cannot fold this adapter in, as a bias into a module that has none.
    """
    model = cast(PreTrainedModel, adapted.get_base_model())
    for name, layer in layers_of(adapted):
        base = layer.get_base_layer()
        if untie(model, base):
            model.config.tie_word_embeddings = False
        weight = weight_of(base)
        dtype = weight.dtype
        # PEFT adds in the dtype of the weight, so that in bfloat16 the sum would be rounded twice.
        weight.data = weight.data.to(torch.float32)
        try:
            layer.merge()
        except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
            raise InputError(f"PEFT cannot fold the adapter into '{name}' ({in_one_line(error)}); keep it beside its base") from None
        weight.data = weight.data.to(dtype)
    return cast(Any, adapted.base_model).unload()


def stock_factors(adapted: PeftModel) -> dict[str, LowRank]:
    """Returns the factors of an adapter that PEFT loaded, with the scale in the left ones.

    Raises:
        InputError: It is no plain LoRA, or its start was subtracted from the weights and it was saved without conversion.
    """
    config = adapted.peft_config[NAME]
    if not isinstance(config, LoraConfig):
        raise InputError(f"an adapter of type {config.peft_type} is no plain LoRA; merge it with PEFT's merge_and_unload instead")
    start = config.init_lora_weights
    if (text_in(start) or "").split("_")[0] in {"olora", "pissa", "corda", "loftq", "lora-ga"}:
        raise InputError(
            f"the adapter started from its weights ({start}) and was not converted when it was saved, so it is wrong beside the original "
            "ones; save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    beside = {"bias": config.bias != "none", "lora_bias": config.lora_bias, "trainable_token_indices": config.trainable_token_indices}
    if own := [name for name, there in beside.items() if there]:
        raise InputError(
            f"an adapter with `{own[0]}` changes more than products of two factors, which a plain LoRA has no place for; fold it in with "
            "`regraft export ADAPTER --to merged`"
        )
    if config.use_dora or (config.modules_to_save and config.task_type != TaskType.SEQ_CLS):
        what = "DoRA" if config.use_dora else "an adapter with modules of its own (modules_to_save)"
        raise InputError(f"{what} is no plain LoRA; merge it with `regraft export ADAPTER --to merged`, or PEFT's merge_and_unload")
    return {name: _scaled(layer) for name, layer in layers_of(adapted)}


def _move_start(layer: Any, weight: Tensor) -> None:
    """Subtracts the adapter's start from the original weight, W - s B A, and stores it in buffers that are not saved."""
    start = LowRank(*(factor.clone() for factor in (_scaled(layer).left, _scaled(layer).right)))
    base = layer.get_base_layer()
    moved = weight.to(torch.float32) - oriented(base, start.left @ start.right)
    weight_of(base).data.copy_(moved)
    layer.register_buffer(f"{_FIRST}_left", start.left, persistent=False)
    layer.register_buffer(f"{_FIRST}_right", start.right, persistent=False)


def _scaled(layer: Any) -> LowRank:
    """Returns the weight change of a PEFT layer as two factors, with the scale in the left one."""
    first, second = (factor.detach().to(torch.float32) for factor in factors_of(layer))
    scale = float(layer.scaling[NAME])
    if isinstance(layer, AdaLoraLayer):  # B (E * A), divided by the number of ranks plus 1e-5, as in PEFT
        first = first * layer.lora_E[NAME].detach()
        scale /= float(layer.ranknum[NAME].detach()) + 1e-5
    return LowRank(scale * second, first)


def _low_rank(layer: Any) -> LowRank:
    """Returns the change of the original weight; if the start B0 A0 was subtracted, B A - B0 A0 as factors of twice the rank."""
    now = _scaled(layer)
    left, right = (getattr(layer, f"{_FIRST}_{side}", None) for side in ("left", "right"))
    if left is None or right is None:
        return now
    return LowRank(torch.cat([now.left, -left], dim=1), torch.cat([now.right, right], dim=0))
