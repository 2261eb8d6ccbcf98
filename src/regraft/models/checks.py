"""Checks of a model folder before its weights are read, and of a model after; each problem is reported in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from regraft.atomic import sha256_of
from regraft.errors import InputError, ModelError, shown
from regraft.models.family import families, family_of
from regraft.models.provenance import FILE
from regraft.models.weights import INDEX, SINGLE
from regraft.plans import Provenance
from regraft.reading import is_whole, object_in, read_json, read_object, text_in

# Weights of trained language models stay below a few hundred. A flipped top exponent bit makes 1e30 and more.
LARGEST_PLAUSIBLE = 1e6
MOST_EMPTY_LAYERS = 1000  # at the end of one of our models: far more than anyone removes, far less than hurts
SAME_MODEL = "use the config and the weights of the same model"


def check_is_model(folder: Path, base: str | None = None) -> None:
    """Refuses a folder that holds no model: an adapter on a base, or anything else without a config; and a base for what is a model.

    Args:
        folder: The folder.
        base: Where the base of an adapter lies, if the user said so.

    Raises:
        ModelError: The message names the command that folds the adapter in, with the base that was given.
        InputError: There is a model, and a base for it.
    """
    if (folder / "config.json").is_file():
        if base is not None:
            raise InputError(f"`base={shown(base)}` is for the folder of an adapter, and '{shown(folder)}' is a model; leave it out")
        return
    if (named := adapter_base(folder)) is not None:
        fold = f"`regraft export {shown(folder)} --to merged --output DIR`"
        if base is not None:
            fold = f"`regraft export {shown(folder)} --to merged --base {shown(base)} --output DIR`"
        raise ModelError(
            f"'{shown(folder)}' is an adapter on the base '{shown(base or named)}', not a model; fold it in first with {fold}, "
            "and give that"
        )
    raise ModelError(f"'{folder}' has no config.json; give the folder of a Hugging Face model")


def check_config(folder: Path, base: str | None = None) -> dict[str, Any]:
    """Checks the config of a model folder and returns it as plain values; ``base`` is that of :func:`check_is_model`.

    Raises:
        ModelError: There is none, it cannot be read, or its family is not known.
        InputError: A base was given for a model.
    """
    check_is_model(folder, base)
    path = folder / "config.json"
    config: Any = read_json(path, ModelError)
    model_type = text_in(object_in(config).get("model_type"))
    if not model_type:
        known = ", ".join(families())
        raise ModelError(f"'{path}' has no model_type; known families: {known}: give the folder of a causal language model")
    try:
        family_of(model_type)
    except ModelError as error:
        towers = (
            "; to prune the language model inside it, use `regraft prune` with `tower=text`"
            if isinstance(config.get("text_config"), dict)
            else ""
        )
        raise ModelError(f"'{folder}': {error}{towers}") from None
    _check_weights_named(path, config)
    return config


def check_towers_config(folder: Path) -> None:
    """Checks the config of a folder that may hold several towers.

    Raises:
        ModelError: It is missing, damaged or quantized.
    """
    check_is_model(folder, None)
    path = folder / "config.json"
    config = read_json(path, ModelError)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"'{path}' has no model_type; give the folder of a multimodal model")
    _check_weights_named(path, config)


def _check_weights_named(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a config whose weights lie elsewhere, or are quantized."""
    elsewhere = config.get("transformers_weights")
    if elsewhere not in (None, SINGLE, INDEX):
        raise ModelError(
            f"'{path}' names other weights by transformers_weights: {shown(repr(elsewhere))}; remove that entry, or rename the file"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = object_in(quantization).get("quant_method", "unknown")
        raise ModelError(
            f"'{path.parent}' is quantized ({shown(method, 40)}); give the model in float32, bfloat16 or float16 that it was made from"
        )


def adapter_base(folder: Path) -> str | None:
    """Returns the base that the adapter in a folder names, or None where there is no adapter of ours or PEFT's."""
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("adapter.json", "base")):
        if (folder / name).is_file():
            return str(read_object(folder / name, ModelError).get(key) or "unknown")
    return None


def check_checksums(folder: Path, provenance: Provenance | None) -> None:
    """Compares the weight files with the SHA-256 sums that ``regraft.json`` holds.

    Raises:
        ModelError: A file is missing or differs.
    """
    for name, expected in (provenance.files if provenance else {}).items():
        path = folder / name
        if path.parent != folder or path.name != name or not name.endswith(".safetensors"):
            raise ModelError(f"the {FILE} of '{folder}' lists '{shown(name)}', which is no weight file of it; copy the folder again")
        if not path.is_file():
            raise ModelError(f"'{folder}' lacks '{shown(name)}', which its {FILE} lists; copy the folder again")
        found = sha256_of(path)
        if found != expected:
            raise ModelError(
                f"'{path}' is damaged or was changed: SHA-256 {found[:12]}…, {FILE} says {shown(expected[:12])}…; copy it again, "
                f"or remove {FILE} if the change was meant"
            )


def check_layer_count(folder: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Compares the number of layers in the config, where it has one, with the names of the weights, before a model is built.

    Raises:
        ModelError: They differ. In models that regraft pruned, the last layers may be empty; in others every layer has weights.
    """
    model_type = str(config["model_type"])
    container = family_of(model_type).layers.rpartition(".")[2]
    numbered = re.compile(rf"(?:^|\.){container}\.([0-9]{{1,9}})\.")
    held = max((int(match[1]) for name in tensors if (match := numbered.search(name))), default=-1) + 1
    said = config.get("num_hidden_layers", config.get("n_layer"))  # as GPT-2 and BLOOM have it
    may_be_empty = model_type.startswith("regraft_") and said in range(held, held + MOST_EMPTY_LAYERS + 1)
    if said is not None and said != held and not may_be_empty:
        raise ModelError(f"'{folder}': config.json says {said} layers, the weights hold {held}; {SAME_MODEL}")


def check_loading_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuses a model whose files do not hold exactly its tensors, because missing ones would be random.

    Args:
        folder: The folder that it was loaded from.
        report: ``output_loading_info`` of ``from_pretrained``.

    Raises:
        ModelError: A tensor is missing, superfluous or of another shape; the message names the first.
    """
    for entry in sorted(report["mismatched_keys"], key=str):
        name, stored, wanted = entry
        raise ModelError(
            f"'{folder}': '{shown(name)}' is {list(stored)} in the weights, but config.json asks for {list(wanted)}; {SAME_MODEL}"
        )
    # Old checkpoints carry the rotary frequencies, which every model computes for itself.
    unexpected = sorted(name for name in report["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq"))
    missing = sorted(report["missing_keys"])
    for verdict, names in (("lack", missing), ("hold", unexpected)):
        if names:
            but = "which its config.json asks for" if verdict == "lack" else "which its config.json does not know"
            raise ModelError(f"'{folder}': the weights {verdict} '{shown(names[0])}' ({len(names)} in all), {but}; {SAME_MODEL}")
    errors = report.get("error_msgs") or report.get("conversion_errors")
    if errors:
        raise ModelError(f"'{folder}': the weights cannot be read: {str(errors).splitlines()[0]}; copy or download them again")


def check_finite(model: PreTrainedModel, source: str) -> None:
    """Refuses a model with weights that are NaN, infinite or larger than training produces.

    Raises:
        ModelError: The message names the first such tensor.
    """
    for name, parameter in model.named_parameters():
        check_values(name, parameter.detach(), source)


def check_values(name: str, tensor: Tensor, source: str) -> None:
    """Refuses a tensor with values that are NaN, infinite or larger than training produces.

    Args:
        name: The tensor's name, for the message.
        tensor: A tensor of any float dtype.
        source: The folder or hub id that it came from, for the message.

    Raises:
        ModelError: There are such values.
    """
    if not tensor.numel():
        return
    smallest, largest = (float(value) for value in torch.aminmax(tensor))
    extreme = max(abs(smallest), abs(largest))  # NaN and infinity pass through aminmax
    if not math.isfinite(smallest + largest):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"'{source}': '{name}' holds NaN or infinity in {bad} of {tensor.numel()} values; "
            "the file is damaged or the training diverged: use another copy or an earlier checkpoint"
        )
    if extreme > LARGEST_PLAUSIBLE:
        raise ModelError(
            f"'{source}': '{name}' holds a value of {extreme:.3g}, above {LARGEST_PLAUSIBLE:.0e}; "
            "the file is damaged: copy or download it again"
        )


def check_generation(config: GenerationConfig, rows: int, source: str) -> None:
    """Refuses a generation config with invalid token ids, or with ids to generate or suppress that the vocabulary does not have.

    Raises:
        ModelError: The message names the entry.
    """
    values: dict[str, Any] = config.to_dict()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        for one in _items(values.get(name)):
            if one is not None and not is_whole(one, -(2**31) + 1, 2**31 - 1):
                raise ModelError(f"'{source}': {name} {shown(repr(values[name]), 60)} is no token id; mend it, or remove the entry")
    for name in ("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        for one in _flat(values.get(name)):
            if not is_whole(one, 0, rows - 1):
                raise ModelError(
                    f"'{source}': {name} has {shown(repr(one), 60)}, the vocabulary {rows} tokens; mend it, or remove the entry"
                )
    strings: Any = config.stop_strings
    if not all(text_in(one) for one in _flat(strings)):
        raise ModelError(f"'{source}': stop_strings {shown(repr(strings), 60)} are no texts; mend them, or remove the entry")


def _items(value: Any) -> list[Any]:
    """Returns the items of a list, and anything else as its only item."""
    match value:
        case list():
            return value
        case _:
            return [value]


def _flat(value: Any) -> Iterator[Any]:
    """Yields the items of nested lists; None yields nothing."""
    match value:
        case None:
            return
        case list() | tuple():
            for one in value:
                yield from _flat(one)
        case _:
            yield value
