"""A model object that the user holds, taken as it is: checked like one that is loaded, and never changed here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.errors import ModelError, kind_of
from regraft.models.checks import check_finite
from regraft.models.classifier import is_classifier
from regraft.models.load import Loaded, load
from regraft.models.provenance import read_provenance
from regraft.models.tokenizer import largest_id
from regraft.models.view import ModelView, fingerprint
from regraft.plans import Provenance
from regraft.settings import LoadSettings

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torchao.", "bitsandbytes.")  # modules with these homes

_OUR_ADAPTERS = "regraft.surgery.adapted"  # the room that attaches them, which lies above this one
_HOLDERS = ("_orig_mod", "module", "model")  # where torch.compile, parallel wrappers, and trainers and results hold their model

_MADE: WeakKeyDictionary[nn.Module, Provenance] = WeakKeyDictionary()  # what we made in memory, as long as somebody holds it
M = TypeVar("M", bound=nn.Module)

ModelLike = PreTrainedModel | Loaded | str | Path
"""What every call takes for a model: an object in memory, or a folder, a hub id, or ``seedling``."""


@dataclass(frozen=True)
class Lineage:
    """Origin of a model object, as far as it is known.

    Attributes:
        source: Its ``name_or_path``, or the name of its class.
        provenance: How regraft made it: remembered where that was in this process, else the record in that folder.
    """

    source: str
    provenance: Provenance | None


def take(model: ModelLike, tokenizer: PreTrainedTokenizerBase | None = None, load_settings: LoadSettings | None = None) -> Loaded:
    """Returns a model to work on, from whatever the user gave.

    Args:
        model: An object in memory, which is checked and left as it is; what was loaded before; or what :func:`load` takes.
        tokenizer: The tokenizer for an object in memory; for a folder, a replacement for the folder's own.
        load_settings: How a folder or a hub id is loaded.

    Raises:
        ModelError: It cannot be loaded, or such an object cannot be worked on: see :func:`held`.
    """
    match model:
        case Loaded():
            return model
        case str() | Path():
            loaded = load(model, load_settings)
            return loaded if tokenizer is None else Loaded(loaded.model, fitting_tokenizer(tokenizer, loaded.model), *_rest(loaded))
        case _:
            return held(model, tokenizer)


def place_of(model: object) -> str | Path | None:
    """Returns what was given for a model where that is a folder or a hub id, and None for an object in memory."""
    return model if isinstance(model, str | Path) else None


def plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns the model below an adapter of PEFT; one without an adapter is checked.

    Raises:
        ModelError: It is no plain model of transformers: see :func:`check_object`; or its adapter adds tokens of its own.
    """
    match model:
        case PeftModel():
            config: Any = model.active_peft_config
            if config.is_prompt_learning:
                raise ModelError(
                    f"the model carries {config.peft_type.value}, whose virtual tokens stand among those of the text; "
                    "give the model without it, or one with an adapter in its weights, such as LoRA"
                )
            return cast(PreTrainedModel, model.get_base_model())
        case _:
            check_object(model)
            return model


def check_predicts(model: PreTrainedModel) -> None:
    """Refuses a model that does not predict the next token of a text.

    Raises:
        ModelError: It is an encoder, a decoder without a head, or one that reads a source text first.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ModelError(
            f"{type(model).__name__} does not predict the next token of a text; give a causal language model, "
            "as AutoModelForCausalLM loads it"
        )


def held(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Loaded:
    """Checks a causal language model in memory.

    Args:
        model: A model of a known family, in floating-point numbers, on one device, without an adapter.
        tokenizer: The model's tokenizer; None where nothing needs one.

    Raises:
        ModelError: It is something else, or its tokenizer does not fit.
    """
    check_object(model)
    if is_classifier(model):
        raise ModelError(f"{type(model).__name__} is a model for labels; give one for causal language modelling")
    inside = next((key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if inside is not None:
        raise ModelError(
            f"{type(model).__name__} carries an adapter of PEFT in '{inside}'; give what merge_and_unload() or unload() of its "
            "PeftModel returns"
        )
    ours = next((key for key, module in model.named_modules() if type(module).__module__ == _OUR_ADAPTERS), None)
    if ours is not None:
        raise ModelError(
            f"{type(model).__name__} carries an adapter of regraft in '{ours}'; recover with `merge` and give that model, or save the "
            "result and give its folder"
        )
    check_predicts(model)
    ModelView(model)  # refuses a family that is not known, and a model that is not built as its family is
    found = lineage(model)
    check_finite(model, found.source)
    return Loaded(model, fitting_tokenizer(tokenizer, model), found.source, fingerprint(model), found.provenance)


def check_object(model: Any) -> None:
    """Refuses what is not a plain model of transformers in memory.

    Raises:
        ModelError: The message says what it is and what to give.
    """
    name = type(model).__name__
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{name} carries an adapter of PEFT; fold it in with merge_and_unload() or take it off with unload(), and give that"
        )
    if not isinstance(model, PreTrainedModel):
        held_in = next((word for word in _HOLDERS if isinstance(getattr(model, word, None), PreTrainedModel)), None)
        remedy = f"its `{held_in}`" if held_in else "a PreTrainedModel of transformers, a folder, or a hub id"
        raise ModelError(f"{kind_of(model)} is not a model; give {remedy}")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"{name} is quantized; load it again without a quantization_config")
    packed = next((key for key, module in model.named_modules() if type(module).__module__.startswith(_QUANTIZED)), None)
    if packed is not None:
        home = type(model.get_submodule(packed)).__module__
        raise ModelError(f"{name} is quantized: '{packed}' is of {home}; give the model as it was before, in floating-point numbers")
    odd = next((key for key, parameter in model.named_parameters() if not parameter.is_floating_point()), None)
    if odd is not None:
        raise ModelError(f"{name} holds '{odd}' in {model.get_parameter(odd).dtype}; give a model in float32, bfloat16 or float16")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if "meta" in devices or len(devices) != 1:
        where = ", ".join(devices) or "no device"
        raise ModelError(f"{name} lies on {where}; load it whole on one device: device_map=None or one device")


def lineage(model: PreTrainedModel) -> Lineage:
    """Returns where a model object came from: what was remembered of it, else what its config says."""
    source = str(model.name_or_path or "")
    folder = Path(source)
    provenance = _MADE.get(model)
    if provenance is None and source and folder.is_dir():
        provenance = read_provenance(folder)
    return Lineage(source or type(model).__name__, provenance)


def remember(model: M, provenance: Provenance | None) -> M:
    """Keeps how a model object was made, for the calls that it is given to next, and returns it.

    A folder holds this record beside the weights. An object holds none, so that it is kept here, by the object and not by its weights, for
    as long as the object lives. Copies of it and what transformers loads from its folder are other objects.

    Args:
        model: A model that was made in this process.
        provenance: How it was made; None where that is not known.
    """
    if provenance is not None:
        _MADE[model] = provenance
    return model


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and afterwards each of its modules into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def own_tensors(model: nn.Module, other: nn.Module) -> None:
    """Gives a model copies of what it shares with another, so that changing one leaves the other; tied tensors stay tied."""
    shared = {tensor.data_ptr() for tensor in (*other.parameters(), *other.buffers())}
    with torch.no_grad():
        for parameter in model.parameters():  # each tied one once
            if parameter.data_ptr() in shared:
                parameter.data = parameter.data.clone()
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.data_ptr() in shared:
                    module._buffers[name] = buffer.clone()


def become(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """Makes one model object the other: its class, config and weights. Whoever holds the object holds the other model then."""
    model.__class__ = other.__class__
    model.__dict__.clear()
    model.__dict__.update(other.__dict__)
    return model


def fitting_tokenizer(tokenizer: Any, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Returns a tokenizer that was given for a model, or None.

    Raises:
        ModelError: It is no tokenizer, or has ids that the embedding has no row for.
    """
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"`tokenizer` is {kind_of(tokenizer)}; give the model's own, from AutoTokenizer.from_pretrained")
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if largest_id(tokenizer) >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {largest_id(tokenizer)}, the embedding of {type(model).__name__} has {rows} rows; "
            "give the tokenizer that the model was trained with"
        )
    return tokenizer


def _rest(loaded: Loaded) -> tuple[str, str, Provenance | None]:
    return loaded.source, loaded.fingerprint, loaded.provenance
