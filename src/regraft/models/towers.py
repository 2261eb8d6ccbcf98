"""Towers of a multimodal checkpoint: the language model inside it as a model of its own, and put back beside the untouched rest."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from regraft.atomic import atomic_folder
from regraft.errors import InputError, ModelError
from regraft.models.build import refuse_misfits
from regraft.models.card import sizes_section
from regraft.models.checks import check_checksums, check_finite, check_loading_report, check_towers_config
from regraft.models.folder import write_folder
from regraft.models.load import Loaded, checkpoint_as, device_named, give_generation_config, locate_by, read_config
from regraft.models.provenance import read_provenance
from regraft.models.quiet import quiet
from regraft.models.save import mend_generation_config
from regraft.models.tokenizer import load_tokenizer
from regraft.models.view import ModelView, fingerprint
from regraft.models.weights import stored_tensors, weights_dtype
from regraft.plans import Provenance
from regraft.settings import LoadSettings

# Files of a checkpoint that its processors read and that no model or tokenizer writes.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
_PREDICTING_AHEAD = "mtp."  # start of the names of layers that predict several tokens ahead, which no class of transformers has


def load_tower(source: str | Path, tower: str, settings: LoadSettings) -> Loaded:
    """Loads one tower of a multimodal checkpoint as a causal language model of its own.

    Args:
        source: A folder or a hub id.
        tower: Name of the tower: ``text``.
        settings: Number type, device, and whether code from the folder may run.

    Raises:
        ModelError: The checkpoint has no such tower, or is damaged.
    """
    folder = locate_by(source, settings)
    whole = _whole(folder, tower, settings)
    model = _taken_out(whole)
    give_generation_config(model, folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    name = str(source)
    check_finite(model, name)
    ModelView(model)  # refuses a family that is not known
    embedding: Any = model.get_input_embeddings()
    tokenizer = load_tokenizer(folder, embedding.weight.shape[0], trust_remote_code=settings.trust_remote_code)
    placed: Any = model.eval()
    placed = placed.to(device_named(settings.device))
    return Loaded(placed, tokenizer, name, fingerprint(placed), read_provenance(folder))


def save_inside(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str | Path,
    output: Path,
    provenance: Provenance,
    card: str,
    settings: LoadSettings,
) -> Provenance:
    """Writes a multimodal checkpoint with a changed language model; every other tensor is as it was.

    Args:
        model: The changed language model.
        tokenizer: The tokenizer, or None.
        source: The checkpoint that it was loaded from.
        output: Folder to write.
        provenance: Provenance of the model.
        card: Beginning of the model card.
        settings: As the tower was loaded.

    Returns:
        The record as it was written.

    Raises:
        InputError: The changed model does not fit into the rest: its class or the width of its stream is another.
        OutputError: The folder exists or cannot be written.
    """
    folder = locate_by(source, settings)
    whole = _whole(folder, "text", settings)
    before: Any = whole.config.get_text_config()
    if model.config.model_type != before.model_type:
        raise InputError(
            "the pruned text tower needs a class of ours, and a multimodal class holds stock ones only; leave `keep_rest` out, or prune "
            "with `shape=uniform` and other targets"
        )
    if model.config.hidden_size != before.hidden_size:
        raise InputError(
            "the rest of the checkpoint reads and writes the residual width; leave `residual` out of `targets`, or `keep_rest`"
        )
    changed = _put_back(whole, model)
    view = ModelView(model)
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    with atomic_folder(output) as partial:
        with quiet():
            mend_generation_config(changed)
            changed.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        for name in _PROCESSOR_FILES:
            if (folder / name).is_file() and not (partial / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        return write_folder(partial, provenance, f"{card.rstrip()}\n\n{sizes_section(sizes)}")


def left_behind(source: str | Path, settings: LoadSettings) -> str:
    """Returns a remark on the tensors that a checkpoint holds beside its towers and that are not written again; empty if there are none."""
    names = [name for name in stored_tensors(locate_by(source, settings)) if name.startswith(_PREDICTING_AHEAD)]
    if not names:
        return ""
    return f"{len(names)} tensors that predict several tokens ahead ('{names[0]}') are left out: they were trained with the unpruned model"


def has_towers(config: PreTrainedConfig) -> bool:
    """Returns whether a config is that of a checkpoint with a text tower beside others."""
    return "text_config" in config.sub_configs and config.get_text_config() is not config


def _whole(folder: Path, tower: str, settings: LoadSettings) -> PreTrainedModel:
    """Loads a multimodal checkpoint with all of its towers."""
    check_towers_config(folder)
    config = read_config(folder, trust_remote_code=settings.trust_remote_code)
    if not has_towers(config):
        raise ModelError(f"'{folder}' has no tower '{tower}': it is a {config.model_type}, one model by itself; leave `tower` out")
    tensors = stored_tensors(folder)
    check_checksums(folder, read_provenance(folder))
    dtype: Any = weights_dtype(tensors, settings.dtype)
    model, report = checkpoint_as(
        AutoModelForImageTextToText,
        folder,
        config,
        dtype,
        trust_remote_code=settings.trust_remote_code,
        attn_implementation=settings.attn_implementation,
    )
    check_loading_report(folder, report)
    return model


def _text_part(whole: PreTrainedModel) -> tuple[str, nn.Module]:
    """Returns the language model inside a multimodal one, without its head, and its name."""
    config = whole.config.get_text_config()
    wanted: Any = MODEL_MAPPING.get(type(config), None)
    found = [(name, module) for name, module in whole.named_modules() if wanted is not None and type(module) is wanted]
    if not found or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"the text tower of {type(whole).__name__} is a {config.model_type}, which is no causal language model by itself")
    return found[0]


def _taken_out(whole: PreTrainedModel) -> PreTrainedModel:
    """Returns the language model of a multimodal one, with its head."""
    _, part = _text_part(whole)
    config: Any = copy.deepcopy(whole.config.get_text_config())
    head, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
    config.tie_word_embeddings = head is not None and embedding is not None and head.weight is embedding.weight
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _built(causal, config, _state_alone(part, head, causal), whole)


def _state_alone(part: nn.Module, head: nn.Module | None, causal: Any) -> dict[str, Tensor]:
    found = {f"{causal.base_model_prefix}.{name}": tensor for name, tensor in part.state_dict().items()}
    return found | ({f"lm_head.{name}": tensor for name, tensor in head.state_dict().items()} if head is not None else {})


def _put_back(whole: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """Returns a multimodal model with another language model."""
    name, part = _text_part(whole)
    replaced = {f"{name}.{inner}" for inner in part.state_dict()}
    state = {key: tensor for key, tensor in whole.state_dict().items() if key not in replaced and not key.startswith("lm_head.")}
    prefix = f"{model.base_model_prefix}."
    for key, tensor in model.state_dict().items():
        state[f"{name}.{key.removeprefix(prefix)}" if key.startswith(prefix) else key] = tensor
    config: Any = copy.deepcopy(whole.config)
    text = copy.deepcopy(model.config)
    text.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings
    config.text_config = text
    # By the names that the files have, so that they are written by these again.
    changed = _built(type(whole), config, revert_weight_conversion(whole, state), whole)
    changed.generation_config = whole.generation_config
    return changed


def _built(model_class: Any, config: Any, state: dict[str, Tensor], like: PreTrainedModel) -> PreTrainedModel:
    with quiet():
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=like.dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    refuse_misfits(report)
    return model
