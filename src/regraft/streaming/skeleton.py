"""A model without weights, whose layers are read from a file one at a time.

The skeleton is an ordinary transformers model in which every parameter is a single NaN, expanded to the parameter's shape. A parameter
that is used before it was read makes the result NaN, which is refused, so that an error is never silent. Reading a layer replaces the
data of its parameters, which remain the same objects, so that code for a model in memory also works on a layer that was read.

Layers are computed in float32, for every dtype of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from regraft.compat import own_buffers, own_parameters
from regraft.errors import InputError, ModelError
from regraft.groups.discover import USUAL, look_for
from regraft.groups.traced import Traced
from regraft.models.checks import check_loading_report, check_values
from regraft.models.family import Family, family_of
from regraft.models.load import Loaded, check_folder, device_named, give_generation_config, locate_by, read_config
from regraft.models.quiet import in_one_line, quiet
from regraft.models.stored import Source, sources_of
from regraft.models.tokenizer import load_tokenizer
from regraft.models.view import ModelView, digest_of, fingerprint_of, refuse_factored
from regraft.models.weights import weights_dtype
from regraft.plans import WHOLE, GroupKind, Groups
from regraft.settings import LoadSettings
from regraft.streaming.checkpoint import CheckpointFiles

# Kinds of groups within one layer, which can be cut while the layer is written.
WITHIN_A_LAYER: tuple[GroupKind, ...] = ("heads", "query_heads", "mixer_heads", "ffn", *WHOLE)


class Skeleton:
    """A checkpoint as a model with one layer in memory at a time; made by :func:`open_skeleton`.

    Attributes:
        loaded: The model without its weights, with tokenizer, source and provenance.
        view: View of the model.
        checkpoint: The files of the weights.
        dtype: Dtype of the weights, for loading and for writing.
        device: Device on which layers are computed.
    """

    def __init__(
        self, loaded: Loaded, checkpoint: CheckpointFiles, stored: Mapping[str, Source], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.loaded = loaded
        self.view = ModelView(loaded.model)
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self._stored = stored
        self._nan = torch.full((), torch.nan, device=device)
        self._checked: set[str] = set()
        self._project: Callable[[Tensor], Tensor] = lambda hidden: hidden[..., :1]
        model: Any = loaded.model
        self.embedding: Any = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.embedding_name = names[id(self.embedding.weight)]
        self.head_name = names[id(self.head.weight)]
        self._outer = {name: parameter for name, parameter in model.named_parameters() if self._is_small_and_outside(name)}
        for name, parameter in self._outer.items():
            parameter.data = self.values(name)
        self.embedding.__dict__["forward"] = self._embed
        self.head.__dict__["forward"] = lambda hidden: self._project(hidden)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what the checkpoint stores, parameters and buffers, in the order of the modules."""
        return {name: tuple(values.shape) for name, values in self.loaded.model.state_dict().items() if name in self._stored}

    def groups(self, kinds: Sequence[GroupKind] = USUAL) -> Groups:
        """Returns the prunable groups, as :func:`regraft.groups.discover.discover` finds them in the model in memory."""
        return self.look_for(kinds).groups

    def look_for(self, kinds: Sequence[GroupKind] = USUAL) -> Traced:
        """Returns the prunable groups, with the reasons why other groups of these kinds cannot be cut."""
        reading = {module: module.__dict__.pop("forward") for module in (self.embedding, self.head)}
        try:
            found = look_for(self.view, kinds)
            return replace(found, groups=replace(found.groups, fingerprint=self.loaded.fingerprint))
        finally:
            for module, forward in reading.items():
                module.__dict__["forward"] = forward

    @property
    def head_shape(self) -> tuple[int, int]:
        """Number of rows and of channels of the output projection."""
        rows, channels = self.head.weight.shape
        return rows, channels

    def stored(self, name: str) -> Tensor:
        """Returns a parameter in the model's dtype, on the CPU."""
        return self._stored[name].made(self.checkpoint.read, self.loaded.model).to(self.dtype)

    def pieces(self, name: str, together: int = 1) -> Iterator[Tensor]:
        """Yields a parameter in the model's dtype, in blocks of rows, on the CPU; each is whole or has a multiple of ``together`` rows.

        Raises:
            ModelError: The parameter holds NaN, infinity or values far beyond those of a trained model.
        """
        source = self._stored[name]
        for piece in self.checkpoint.pieces(source.parts[0], together) if source.plain else [self.stored(name)]:
            values = piece.to(self.dtype)
            if name not in self._checked:
                check_values(name, values, self.loaded.source)
            yield values

    def values(self, name: str) -> Tensor:
        """Returns a parameter for computation: float32, on the device.

        Raises:
            ModelError: The parameter holds NaN, infinity or values far beyond those of a trained model.
        """
        tensor = self.stored(name)
        if name not in self._checked:  # one check of each parameter is enough
            check_values(name, tensor, self.loaded.source)
            self._checked.add(name)
        return tensor.to(self.device).float()

    def head_rows(self, start: int, stop: int) -> Tensor:
        """Returns rows of the output projection for computation: float32 (rows, channels), on the device."""
        rows = self.checkpoint.rows(self._stored[self.head_name].parts[0], start, stop).to(self.dtype)
        check_values(self.head_name, rows, self.loaded.source)
        return rows.to(self.device).float()

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Reads a decoder layer, and frees it at the end of the block."""
        module = self.view.layers[index]
        prefix = self.view.layer_name(index)
        try:
            for name, parameter in module.named_parameters():
                parameter.data = self.values(f"{prefix}.{name}")
            yield module
        finally:
            for parameter in module.parameters():
                parameter.grad = None
                parameter.requires_grad_(False)
                parameter.data = self._nan.expand(parameter.shape)

    @contextmanager
    def projecting(self, project: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replaces the output projection by a function of the final hidden states, (..., channels) to (..., anything)."""
        before = self._project
        self._project = project
        try:
            yield
        finally:
            self._project = before

    def _embed(self, ids: Tensor) -> Tensor:
        """Computes the token embedding, reading only the rows of the tokens that occur."""
        embedding: Any = self.embedding
        unique, inverse = ids.unique(return_inverse=True)
        rows = self.checkpoint.gather(self._stored[self.embedding_name].parts[0], unique.cpu()).to(self.dtype)
        check_values(self.embedding_name, rows, self.loaded.source)
        padding, embedding.padding_idx = embedding.padding_idx, None
        whole, embedding.weight.data = embedding.weight.data, rows.to(self.device).float()
        try:
            return type(embedding).forward(embedding, inverse.to(self.device))
        finally:
            embedding.padding_idx, embedding.weight.data = padding, whole

    def _is_small_and_outside(self, name: str) -> bool:
        inside = name.startswith(f"{self.view.family.layers}.")
        return not inside and name not in (self.embedding_name, self.head_name)


def open_skeleton(source: str | Path, settings: LoadSettings | None = None, *, fingerprint: bool = True) -> Skeleton:
    """Opens a checkpoint for reading layer by layer, after checking that it is complete and fits its config.

    Args:
        source: Folder or hub id, as in :func:`regraft.models.load.load`.
        settings: Loading settings. The dtype is that of the written weights; computation is in float32.
        fingerprint: Whether to compute the model's fingerprint now, which reads all weights; empty where not.

    Raises:
        ModelError: The model is missing, damaged, unsafe, of an unknown family, or has layers that are stored as two factors.
        InputError: The device does not exist.
    """
    settings = settings or LoadSettings()
    device = device_named(settings.device)
    folder = locate_by(source, settings)
    tensors, provenance = check_folder(folder, settings.base)
    dtype = weights_dtype(tensors, settings.dtype)
    checkpoint = CheckpointFiles(folder)
    model = _empty_model(folder, device, trust_remote_code=settings.trust_remote_code)
    stored = _stored_names(model, checkpoint, dtype)
    ModelView(model)  # refuses a model whose structure differs from its family's
    embedding: Any = model.get_input_embeddings()
    tokenizer = load_tokenizer(folder, embedding.weight.shape[0], trust_remote_code=settings.trust_remote_code)
    known = _fingerprint(model, checkpoint, stored, dtype) if fingerprint else ""
    loaded = Loaded(model, tokenizer, str(source), known, provenance)
    return Skeleton(loaded, checkpoint, stored, dtype, device)


def refuse_beyond_layers(family: Family, groups: Groups) -> None:
    """Refuses groups whose cut changes more than one layer.

    Raises:
        InputError: A group cannot be cut layer by layer; the message names the kind or the norm.
    """
    wide = [group.kind for group in groups.groups if group.kind not in WITHIN_A_LAYER]
    if wide:
        raise InputError(
            f"`targets={','.join(dict.fromkeys(wide))}` changes more than one layer at a time, which is all that `memory` leaves room "
            "for; choose other `targets`, or leave `memory` out"
        )
    norms = tuple(f".{norm}.weight" for norm in family.head_norms)
    for group in groups.groups:
        normed = [member.parameter for member in group.members if member.parameter.endswith(norms)] if norms else []
        if group.kind in ("heads", "query_heads") and normed:
            raise InputError(
                f"'{normed[0]}' normalises all heads of a layer together, and has to be rescaled when one goes, which `memory` does not "
                "do yet; use `targets=ffn`, or leave `memory` out"
            )


def _empty_model(folder: Path, device: torch.device, *, trust_remote_code: bool) -> PreTrainedModel:
    """Returns a model of the folder's config whose parameters are NaN and take no memory; its buffers have their real values."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    try:
        with quiet(), init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the modelling code raises on a config that does not fit
        raise ModelError(f"'{folder}' cannot be loaded: {in_one_line(error)}; check its config.json") from error
    refuse_factored(model, f"'{folder}'")
    nan = torch.full((), torch.nan, device=device)
    for module in model.modules():
        for name, parameter in list(own_parameters(module).items()):
            if parameter is not None:
                own_parameters(module)[name] = nn.Parameter(nan.expand(parameter.shape), requires_grad=False)
        for name, buffer in list(own_buffers(module).items()):
            if buffer is not None:
                own_buffers(module)[name] = buffer.to(device)
    with quiet():
        model.tie_weights()
    give_generation_config(model, folder)
    return model.eval()


def _stored_names(model: PreTrainedModel, checkpoint: CheckpointFiles, dtype: torch.dtype) -> dict[str, Source]:
    """Returns where each parameter is stored; unties tied parameters that the file holds twice with different values.

    Raises:
        ModelError: A tensor is missing, superfluous or of another shape.
    """
    known = sources_of(model, {name: place.shape for name, place in checkpoint.places.items()})
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    found: dict[str, Source] = {}
    used: set[str] = set()
    for names in aliases.values():
        there = [source for name in names if (source := _source(model, name, checkpoint, known)) is not None]
        used.update(part for source in there for part in source.parts)
        if len(there) > 1 and not _equal(checkpoint, there[0].parts[0], there[1].parts[0], dtype):
            _untie(model)
            return _stored_names(model, checkpoint, dtype)
        if there:
            found[names[0]] = there[0]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    buffers = dict(model.named_buffers())
    kept = {name: buffers[name] for name in model.state_dict() if name in buffers and name in checkpoint.places}
    extra = [name for name in checkpoint.places if name not in used and not any(pattern.search(name) for pattern in ignored)]
    wrong = [(name, source.shape, shapes[name]) for name, source in found.items()]
    wrong += [(name, checkpoint.places[name].shape, tuple(buffer.shape)) for name, buffer in kept.items()]
    report = {
        "missing_keys": [name for name in shapes if name not in found],
        "unexpected_keys": [name for name in extra if name not in buffers],
        "mismatched_keys": [entry for entry in wrong if entry[1] != entry[2]],
    }
    check_loading_report(checkpoint.folder, report)
    for name, buffer in kept.items():  # such as the factor on what a layer of Gemma 4 makes
        buffer.copy_(checkpoint.read(name))
        found[name] = Source((name,), tuple(buffer.shape))
    return found


def _source(model: PreTrainedModel, name: str, checkpoint: CheckpointFiles, known: Mapping[str, Source]) -> Source | None:
    """Returns where a parameter is stored: as transformers knows, or under the name that its family's table gives."""
    module, _, last = name.rpartition(".")
    renamed = f"{family_of(model.config.model_type).stored_as.get(module, module)}.{last}"
    if renamed in checkpoint.places:
        return Source((renamed,), checkpoint.places[renamed].shape)
    return known.get(name)


def _equal(checkpoint: CheckpointFiles, first: str, second: str, dtype: torch.dtype) -> bool:
    if checkpoint.places[first].shape != checkpoint.places[second].shape:
        return False
    pairs = zip(checkpoint.pieces(first), checkpoint.pieces(second), strict=True)
    return all(torch.equal(one.to(dtype), other.to(dtype)) for one, other in pairs)


def _untie(model: Any) -> None:
    """Gives the output projection its own matrix, as transformers does when the file holds two different ones."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.data, requires_grad=False)
    model.config.tie_word_embeddings = False


def _fingerprint(model: PreTrainedModel, checkpoint: CheckpointFiles, stored: Mapping[str, Source], dtype: torch.dtype) -> str:
    """Returns the fingerprint of the model in memory, from the file."""

    def digest(source: Source) -> bytes | None:
        if source.plain:
            return checkpoint.digest(source.parts[0], dtype)
        return digest_of(source.made(checkpoint.read, model).to(dtype))

    return fingerprint_of((name, tuple(parameter.shape), dtype, digest(stored[name])) for name, parameter in model.named_parameters())
