"""Load a causal language model and its tokenizer from a folder, the Hugging Face hub, or the package itself."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from regraft import seedling
from regraft.errors import InputError, ModelError, did_you_mean, shown
from regraft.in_short import in_short
from regraft.models.checks import (
    SAME_MODEL,
    check_checksums,
    check_config,
    check_finite,
    check_generation,
    check_layer_count,
    check_loading_report,
)
from regraft.models.gguf_folder import is_gguf, unpacked
from regraft.models.provenance import read_provenance
from regraft.models.quiet import in_one_line, quiet
from regraft.models.tokenizer import load_tokenizer
from regraft.models.uneven import register
from regraft.models.view import ModelView, fingerprint
from regraft.models.weights import StoredTensor, read_tensor, stored_tensors, weights_dtype
from regraft.plans import Provenance
from regraft.reading import home_expanded, is_folder, is_whole, path_of, read_object
from regraft.settings import LoadSettings, takes_settings, with_keywords

SEEDLING = "seedling"
MAPPINGS: Mapping[Any, Any] = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModel: MODEL_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}
OWN = "regraft_"  # start of our own model types, whose code never comes from a folder
LEGACY_LAYER_TYPES = (
    "mamba",
    "attention",
    "deepseek_sparse_attention",
    "qwen_sparse_attention",
)  # names that transformers turns into those of today
MOST_NEW_PARAMETERS = 10**7  # a config may ask for this much more than the files hold before it is looked at tensor by tensor
# What is fetched from the hub: nothing in subfolders, no pickles, no second copy of the weights in the maker's own format.
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
UNWANTED = ("*/*", "consolidated*")
_DEVICES = "cpu, cuda, cuda:N, mps or auto"
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(repr=False)
class Loaded:
    """A loaded and checked model, with its tokenizer and its origin.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: None where the folder has none.
        source: The folder or hub id, as it was given.
        fingerprint: Short hash of the model's parameters.
        provenance: How the folder came to be; None where regraft did not make it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    fingerprint: str
    provenance: Provenance | None

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)


@takes_settings(LoadSettings)
def load(source: str | Path, settings: LoadSettings | None = None, **keywords: Any) -> Loaded:
    """Loads a model and checks that it is complete.

    Args:
        source: A folder or a GGUF file, which never touch the network; ``seedling``, the model in the package; or a hub id.
        settings: Number type, device, and whether code from the folder may run.
        **keywords: Single settings by name, such as ``dtype="float32"``; they count before those in ``settings``.

    Raises:
        ModelError: The model is missing, damaged, unsafe or of an unknown family.
        InputError: The device does not exist, or a keyword.
    """
    (settings,) = with_keywords("regraft.load", keywords, settings or LoadSettings())
    device = device_named(settings.device)
    folder = locate_by(source, settings)
    name = str(source)
    tensors, provenance = check_folder(folder, settings.base)
    dtype = weights_dtype(tensors, settings.dtype)
    model = _load_model(folder, dtype, settings)
    check_finite(model, name)
    ModelView(model)  # refuses a model that is not built as its family is
    embedding: Any = model.get_input_embeddings()
    tokenizer = load_tokenizer(folder, embedding.weight.shape[0], trust_remote_code=settings.trust_remote_code)
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    return Loaded(model, tokenizer, name, fingerprint(model), provenance)


def check_folder(folder: Path, base: str | None = None) -> tuple[dict[str, StoredTensor], Provenance | None]:
    """Returns the stored tensors and the provenance of a model folder, after all checks that are possible before weights are read.

    Args:
        folder: The folder.
        base: The base that was given for an adapter, which a model has not.

    Raises:
        ModelError: The folder is damaged or an adapter, or its config and its weights are of different models.
        InputError: A base was given for a model.
    """
    try:
        config = check_config(folder, base)
        tensors = stored_tensors(folder)
        provenance = read_provenance(folder)
        check_layer_count(folder, config, tensors)
        check_checksums(folder, provenance)
    except OSError as error:
        raise ModelError(f"'{folder}' cannot be read: {error.strerror} ({error.filename}); check its permissions") from error
    return tensors, provenance


def require_tokenizer(loaded: Loaded) -> PreTrainedTokenizerBase:
    """Returns the tokenizer; that of a model in memory, where none was given, from the place that the model was loaded from.

    Raises:
        ModelError: There is none, or it does not fit the model.
    """
    if loaded.tokenizer is not None:
        return loaded.tokenizer
    folder = _local_folder(loaded.source)
    if folder is None:
        raise ModelError(f"'{loaded.source}' has no tokenizer, which a model in memory does not bring; give its own as `tokenizer`")
    embedding: Any = loaded.model.get_input_embeddings()
    loaded.tokenizer = load_tokenizer(folder, embedding.weight.shape[0], trust_remote_code=False)
    if loaded.tokenizer is None:
        files = "tokenizer.json and tokenizer_config.json"
        raise ModelError(f"'{loaded.source}' has no tokenizer; copy the model's {files} into it, or in Python give `tokenizer`")
    return loaded.tokenizer


def _local_folder(source: str) -> Path | None:
    """Returns where the files of a model are on this machine, by its folder or hub id, without the network; None where nowhere."""
    folder = Path(source)
    if is_folder(folder):
        return folder
    if source == SEEDLING:
        return seedling.path()
    if "/" not in source or not HUB_ID.fullmatch(source):
        return None
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception:  # whatever keeps the cache from being read, the user can give the tokenizer
        return None


def locate_by(source: str | Path, settings: LoadSettings) -> Path:
    """Returns the folder of a model, as :func:`locate` does, with the revision and the token of the settings."""
    return locate(source, trust_remote_code=settings.trust_remote_code, revision=settings.revision, token=settings.token)


def locate(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None, token: str | None = None) -> Path:
    """Returns the folder of a model; a hub id is first downloaded to Hugging Face's cache, a GGUF file is first unpacked to ours.

    Args:
        source: A folder, ``seedling``, or a hub id.
        trust_remote_code: Whether the code that a model brings is downloaded too.
        revision: Branch, tag or commit of a hub id; None for its main branch.
        token: Access token for the hub; None for that of ``hf auth login``.

    Raises:
        ModelError: There is no such folder, and no such model on the hub or no way to reach it.
    """
    given = path_of(source, "model")
    name = shown(str(source))
    folder = home_expanded(given)
    try:
        if folder.is_dir():
            return folder
        if is_gguf(folder):
            return unpacked(folder)
        if folder.is_file():
            raise ModelError(f"'{name}' is a file; give the folder that holds config.json and the weights, or a .gguf file")
    except OSError as error:
        raise ModelError(f"'{name}' cannot be read: {error.strerror}; check the path and its permissions") from None
    if name == SEEDLING:
        return seedling.path()
    beside = len(folder.parts) > 1 and is_folder(folder.parent)
    if isinstance(source, Path) or beside or not HUB_ID.fullmatch(name):
        raise ModelError(f"there is no folder '{name}'; give the folder of a model, a hub id, or '{SEEDLING}'")
    wanted: list[str] = [*WANTED, "*.py"] if trust_remote_code else [*WANTED]
    nowhere = f"'{name}' is not a folder here"
    remedy = f"check the name, or give the folder of a model or '{SEEDLING}'{did_you_mean(name, [SEEDLING])}"
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted, ignore_patterns=list(UNWANTED)))
    except GatedRepoError:
        raise ModelError(f"'{name}' is gated on the hub; accept its terms on its page and log in with: hf auth login") from None
    except RevisionNotFoundError:
        raise ModelError(f"'{name}' has no `revision={revision}` on the hub; give a branch, a tag or a commit of it") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(f"{nowhere}, and the hub has no model of this name; {remedy}") from None
    except Exception as error:  # the hub's client lets many kinds through: sockets, proxies, certificates, its own
        reason = in_one_line(error).split(" An error happened")[0]  # the rest of the client's message says no more
        raise ModelError(f"{nowhere}, and the hub cannot be reached ({reason}); {remedy}") from error


def read_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Returns the config of a model folder, of the class that it names.

    Raises:
        ModelError: It is not valid.
    """
    register()
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
            config.return_dict = True  # what we compute with is read by name
            return config
    except Exception as error:  # each config class validates in its own way
        unknown = _unknown_layer_type(folder / "config.json") if "layer" in str(error) else None
        if unknown is not None:
            raise ModelError(
                f"'{folder / 'config.json'}' has layers of type '{shown(unknown)}', which transformers {transformers.__version__} does not "
                "know; install a version that does, or mend the config"
            ) from error
        raise ModelError(f"'{folder / 'config.json'}' is not valid: {in_one_line(error)}; mend it or download it again") from error


def _unknown_layer_type(path: Path) -> str | None:
    """Returns the first type of layers in a config that transformers does not know, old names included; None where it knows all."""
    values = read_object(path, ModelError)
    listed: list[Any] = [entry for key in ("layer_types", "layers_block_type") for entry in values.get(key) or []]
    known = {*ALLOWED_LAYER_TYPES, *LEGACY_LAYER_TYPES}
    return next((entry for entry in listed if isinstance(entry, str) and entry not in known), None)


def checkpoint_as(
    auto: Any,
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns the model that one of transformers' Auto classes makes from a folder, and its report of keys.

    The weights are those that :func:`regraft.models.weights.stored_tensors` has checked, read by us and handed over: nothing in a
    folder (``transformers_weights``, an adapter's or a distributed checkpoint's files, pickles) leads transformers to others.

    Raises:
        ModelError: The modelling code refuses the config.
    """
    stored = stored_tensors(folder)
    try:
        with quiet():
            model_class, config = _class_of(auto, folder, config, trust_remote_code=trust_remote_code)
            _refuse_promises(folder, config, stored)
            state = {name: read_tensor(tensor) for name, tensor in stored.items()}
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                attn_implementation=attn_implementation,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:  # whatever the modelling code raises on a config that does not fit
        raise ModelError(f"'{folder}' cannot be loaded: {in_one_line(error)}; check its config.json") from error
    model.config.name_or_path = model.name_or_path = str(folder)
    give_generation_config(model, folder)
    return model, report


def _class_of(auto: Any, folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool) -> tuple[Any, PreTrainedConfig]:
    """Returns the class that an Auto class chooses for a config, and the part of the config that this class reads."""
    named: Any = getattr(config, "auto_map", None) or {}
    known = type(config) in MAPPINGS[auto]
    if trust_remote_code and auto.__name__ in named and not (known and config.model_type.startswith(OWN)):
        return add_generation_mixin_to_remote_model(
            get_class_from_dynamic_module(named[auto.__name__], str(folder), local_files_only=True)
        ), config
    if not known:
        raise ModelError(f"'{folder}': transformers has no {auto.__name__} of type '{shown(config.model_type)}'; use another model")
    found: Any = MAPPINGS[auto][type(config)]
    if isinstance(found, tuple | list):
        wanted = getattr(config, "architectures", None) or []
        found = next((one for one in found if one.__name__ in wanted), found[0])
    text = config.sub_configs.get("text_config")
    return found, config.get_text_config() if text is not None and found.config_class == text else config


def _refuse_promises(folder: Path, config: PreTrainedConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses a config that asks for a matrix far larger than the files hold, before memory is taken for it."""
    held = sum(tensor.numel for tensor in stored.values())
    sizes = config.to_dict()
    names = {key: config.attribute_map.get(key, key) for key in ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")}
    width = sizes.get(names.pop("hidden_size"))
    for name in names.values():
        size = sizes.get(name)
        if is_whole(size, 1, math.inf) and is_whole(width, 1, math.inf) and size * width > 4 * held + MOST_NEW_PARAMETERS:
            raise ModelError(f"'{folder}': config.json asks for {name} {size:,}, the weights hold {held:,} values in all; {SAME_MODEL}")


def give_generation_config(model: Any, folder: Path) -> None:
    """Gives a model the generation config of its folder; as transformers does, that of its config where it cannot be read.

    Raises:
        ModelError: It holds what no text can be generated with.
    """
    if not model.can_generate():
        return
    rows = model.get_input_embeddings().weight.shape[0]
    for name, further in (("generation_config.json", {}), ("config.json", {"config_file_name": "config.json", "_from_model_config": True})):
        try:
            with quiet():
                found = GenerationConfig.from_pretrained(str(folder), local_files_only=True, **further)
        except OSError:
            continue
        except Exception as error:  # each entry is validated in its own way
            raise ModelError(f"'{folder / name}' is not valid: {in_one_line(error)}; mend it, or remove it to do without") from error
        check_generation(found, rows, str(folder / name))
        model.generation_config = found
        return


def _load_model(folder: Path, dtype: torch.dtype, settings: LoadSettings) -> PreTrainedModel:
    trusted = settings.trust_remote_code
    config = read_config(folder, trust_remote_code=trusted)
    loaded: Any = checkpoint_as(
        AutoModelForCausalLM, folder, config, dtype, trust_remote_code=trusted, attn_implementation=settings.attn_implementation
    )
    model, report = loaded
    check_loading_report(folder, report)
    if model.config.tie_word_embeddings and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # the file holds two different matrices, and transformers keeps both
    return model


def device_named(name: str) -> torch.device:
    """Returns a device; ``auto`` is the first that is here of a CUDA GPU, Apple's (MPS) and the CPU.

    Raises:
        InputError: It is not known, or not here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device '{name}' is not known; use {_DEVICES}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"device '{name}' is not here ({count} CUDA devices); use cpu" + (" or cuda" if count else ""))
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device '{name}' is not here; use cpu")
    elif device.type not in ("cpu", "mps"):
        raise InputError(f"device '{name}' is not supported; use {_DEVICES}")
    return device


def free_bytes(device: torch.device) -> int:
    """Returns the bytes of memory that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def with_float64(settings: LoadSettings) -> LoadSettings:
    """Returns the settings with a device that computes in float64, as pruning does; Apple's GPU does not, and ``auto`` passes it over.

    Raises:
        InputError: That GPU was asked for.
    """
    if device_named(settings.device).type != "mps":
        return settings
    if settings.device == "auto":
        return settings.model_copy(update={"device": "cpu"})
    raise InputError(f"pruning computes in float64, which `device={settings.device}` does not know; use `device=cpu`")
