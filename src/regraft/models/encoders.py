"""Encoders without a head, such as sentence encoders: load them, find their linear layers, and save them with factored ones."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from regraft.atomic import atomic_folder
from regraft.errors import ModelError
from regraft.models.checks import check_checksums, check_finite
from regraft.models.folder import write_folder
from regraft.models.load import Loaded, checkpoint_as, device_named, locate_by, read_config
from regraft.models.provenance import read_provenance
from regraft.models.quiet import quiet
from regraft.models.tokenizer import load_tokenizer
from regraft.models.uneven import encoder_regraft
from regraft.models.uneven.factored_regraft import FactoredLinear
from regraft.models.view import fingerprint, modules_of
from regraft.models.weights import stored_tensors, weight_files, weights_dtype
from regraft.plans import Provenance
from regraft.reading import read_object
from regraft.settings import LoadSettings

_CODE = ("encoder_regraft.py", "factored_regraft.py")
_ENDINGS = ("Model", "ForMaskedLM")
# What sentence-transformers reads beside the model: how token vectors become one vector.
_BESIDE = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
)


def is_encoder_folder(folder: Path) -> bool:
    """Returns whether a folder's config names an encoder that can be factored, or one that is; loading reports a damaged config."""
    try:
        names = [str(name) for name in read_object(folder / "config.json", ModelError)["architectures"]]
    except (ModelError, KeyError, TypeError):
        return False
    return any(_stock(name) is not None for name in names)


def is_encoder(model: nn.Module) -> bool:
    """Returns whether a model is an encoder that can be factored, or one that is."""
    return _stock(type(model).__name__) is not None and type(model).__name__.endswith("Model")


def load_encoder(source: str | Path, settings: LoadSettings | None = None) -> Loaded:
    """Loads an encoder without a head, with its tokenizer; one with factored layers too.

    Args:
        source: A folder or a hub id.
        settings: Number type and device.

    Raises:
        ModelError: The model is missing, damaged, unsafe, or no encoder that can be factored.
        InputError: The device does not exist.
    """
    settings = settings or LoadSettings()
    device = device_named(settings.device)
    folder = locate_by(source, settings)
    if not is_encoder_folder(folder):
        raise ModelError(f"'{source}' is no encoder of a class that can be factored; known: {', '.join(encoder_regraft.STOCK)}")
    config: Any = read_config(folder, trust_remote_code=False)
    tensors, provenance = stored_tensors(folder), read_provenance(folder)
    check_checksums(folder, provenance)
    dtype = weights_dtype(tensors, settings.dtype)
    if getattr(config, "factored", None):
        model_class = getattr(encoder_regraft, config.architectures[0])
        model = model_class.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    else:
        model, report = checkpoint_as(AutoModel, folder, config, dtype, trust_remote_code=False)
        missing = [name for name in sorted(report["missing_keys"]) if "pooler" not in name]
        if missing:
            raise ModelError(f"'{folder}': the weights lack '{missing[0]}' ({len(missing)} in all); use a complete checkpoint")
    check_finite(model, str(source))
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    return Loaded(model.eval(), load_tokenizer(folder, rows, trust_remote_code=False), str(source), fingerprint(model), provenance)


def encoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Returns the linear layers within the layers of an encoder by full name, in the order of the model.

    Raises:
        ModelError: Some are factored already, or there are none.
    """
    factored = list(modules_of(model, FactoredLinear))
    if factored:
        raise ModelError(
            f"the encoder is factored already ({len(factored)} layers, such as '{factored[0]}'); use the one that it was made from"
        )
    stacks = tuple(f"{stack}." for stack in modules_of(model, nn.ModuleList))
    found = {name: module for name, module in modules_of(model, nn.Linear).items() if name.startswith(stacks)}
    if not found:
        raise ModelError(f"'{type(model).__name__}' has no linear layers in a list of layers; use another model")
    return found


def factored_encoder(
    model: PreTrainedModel, ranks: Mapping[str, tuple[int, bool]], tensors: Mapping[str, Tensor], layout: str
) -> PreTrainedModel:
    """Returns a new encoder with factored layers; the given one is left as it is, and nothing is shared with it.

    Args:
        model: The dense encoder.
        ranks: Rank of every factored layer by full name, and whether it has a bias.
        tensors: Tensors of the factored layers by full name.
        layout: How they are stored.
    """
    config: Any = copy.deepcopy(model.config)
    name = f"Factored{type(model).__name__}"
    config.factored = {module: {"rank": rank, "bias": bias} for module, (rank, bias) in ranks.items()}
    config.factor_layout = layout
    config.architectures = [name]
    config.auto_map = {"AutoModel": f"encoder_regraft.{name}"}
    state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in ranks} | dict(tensors)
    with quiet(), torch.random.fork_rng(devices=[]):
        new = getattr(encoder_regraft, name)(config, **_pooling(model)).to(model.device, model.dtype)
    new.load_state_dict({key: value.clone() for key, value in state.items()})
    return new.train(model.training)


def save_encoder(loaded: Loaded, model: PreTrainedModel, folder: Path, provenance: Provenance, card: str) -> Provenance:
    """Writes a folder that ``AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`` loads, completely or not at all.

    Args:
        loaded: The encoder that it was made from, whose settings of pooling are kept.
        model: The factored encoder.
        folder: The folder to write.
        provenance: How the encoder came to be.
        card: Start of the model card; how to load it is added.
    """
    lines = ["from transformers import AutoModel", "", "model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)"]
    how = "\n".join(["## How to load it", "", "Its code is in this folder.", "", "```python", *lines, "```", ""])
    card = card.replace("pipeline_tag: text-generation", "pipeline_tag: feature-extraction", 1)
    before = Path(loaded.source)
    with atomic_folder(folder) as partial:
        with quiet():
            model.save_pretrained(partial)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(partial)
        for name in _CODE:
            shutil.copyfile(Path(encoder_regraft.__file__).with_name(name), partial / name)
        for name in _BESIDE:
            if (before / name).is_file():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(before / name, partial / name)
        for file in weight_files(partial):
            file.chmod((partial / "config.json").stat().st_mode)
        return write_folder(partial, provenance, card.rstrip() + "\n\n" + how)


def sentence_vectors(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], *, most_tokens: int = 128, batch: int = 64) -> Tensor:
    """Returns the mean of the last hidden states of every text, scaled to length 1, float32 (texts, width) on the CPU."""
    found = torch.zeros(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with torch.no_grad():
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            rows = tokenizer([texts[index] for index in chosen], padding=True, truncation=True, max_length=most_tokens, return_tensors="pt")
            rows = rows.to(model.device)
            found[chosen] = pooled(model(**rows).last_hidden_state, rows["attention_mask"]).float().cpu()
    return found


def pooled(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns the mean of hidden states over the tokens that are no padding, scaled to length 1, (batch, width)."""
    weights = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    return nn.functional.normalize((hidden_BTD * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0), dim=-1)


def _stock(architecture: str) -> str | None:
    """Returns the stock class of an encoder's architecture, with a masked-language head or factored or neither; None for others."""
    name = architecture.removeprefix("Factored")
    for ending in _ENDINGS:
        base = f"{name.removesuffix(ending)}Model"
        if name.endswith(ending) and base in encoder_regraft.STOCK:
            return base
    return None


def _pooling(model: PreTrainedModel) -> dict[str, bool]:
    """Returns the argument by which a class makes no pooler where the model has none."""
    return {"add_pooling_layer": False} if "pooler" in model._modules and model._modules["pooler"] is None else {}
