"""Saving of a model so that ``AutoModelForCausalLM.from_pretrained`` loads the model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from regraft.atomic import atomic_folder
from regraft.errors import OutputError
from regraft.models.build import conform
from regraft.models.card import loading_section, sizes_section
from regraft.models.folder import write_folder
from regraft.models.quiet import quiet
from regraft.models.view import LayerSizes, ModelView
from regraft.models.weights import stored_tensors, weight_files
from regraft.plans import Provenance
from regraft.reading import path_of


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    provenance: Provenance,
    card: str,
    *,
    replace: bool = False,
) -> Provenance:
    """Writes a model folder, completely or not at all.

    A model with equal layers is saved as a stock class; any other as our class, with its code in the folder.

    Args:
        model: The model; a config that does not match the weights is corrected first.
        tokenizer: Tokenizer to save with the model, or None.
        folder: Folder to write.
        provenance: Provenance of the model; written as ``regraft.json`` with the checksums of the weight files.
        card: Beginning of the model card; the sizes and the section on loading are added.
        replace: Whether an existing folder is replaced.

    Returns:
        The written provenance.

    Raises:
        OutputError: The folder exists or cannot be written, or the written files cannot be read back; an existing folder is not changed.
        PlanError: The sizes of the model do not fit each other.
    """
    model = conform(model)
    view = ModelView(model)
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    with atomic_folder(path_of(folder, "folder"), replace=replace) as partial:
        with quiet():
            mend_generation_config(model)
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        _read_back(model, partial)
        for file in weight_files(partial):  # safetensors creates files that only their owner can read
            file.chmod((partial / "config.json").stat().st_mode)
        return write_folder(partial, provenance, whole_card(card, type(model), sizes))


def whole_card(card: str, model_class: type[PreTrainedModel], sizes: Sequence[LayerSizes]) -> str:
    """Returns the card of a model folder: its start, the sizes of the layers, and how to load the model.

    Args:
        card: Start of the card.
        model_class: Class of the model that loading the folder gives.
        sizes: Sizes of its layers.
    """
    config_class: Any = model_class.config_class
    uneven = str(config_class.model_type).startswith("regraft_")
    sections = (card.rstrip(), sizes_section(sizes), loading_section(model_class.__name__, uneven=uneven))
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def mend_generation_config(model: PreTrainedModel) -> None:
    """Changes a generation config that transformers loads with a warning into one that it also saves.

    Many published models set a temperature without enabling sampling, which transformers refuses to save.
    """
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def _read_back(model: PreTrainedModel, folder: Path) -> None:
    """Compares the names and shapes in the files with those in memory; a tied tensor is stored once.

    Some families are saved under the original names of their checkpoints: GPT-NeoX's ``lm_head`` is ``embed_out`` there.
    """
    stored = stored_tensors(folder)
    state = revert_weight_conversion(model, model.state_dict())
    kept = {state[name].data_ptr() for name in stored if name in state}
    for name, tensor in state.items():
        same = stored[name].shape == tuple(tensor.shape) if name in stored else tensor.data_ptr() in kept
        if not same:
            raise OutputError(f"'{name}' was not written as it is in memory; save again to another disk")
