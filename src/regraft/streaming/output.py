"""Writer of a pruned checkpoint, shard by shard, which can resume an interrupted run.

All files are written into the temporary folder that :func:`regraft.atomic.atomic_folder` keeps next to the output. A note in it holds
the settings, the plan, and the SHA-256 of every finished shard. A later run with the same settings resumes from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from regraft.atomic import atomic_folder, sha256_of, write_text
from regraft.errors import ModelError, OutputError, PlanError
from regraft.models.build import config_for
from regraft.models.folder import write_folder
from regraft.models.quiet import quiet
from regraft.models.save import mend_generation_config, whole_card
from regraft.models.stored import as_written, written_of
from regraft.models.uneven import code_paths, register
from regraft.models.view import LayerSizes
from regraft.models.weights import INDEX, SINGLE, stored_tensors
from regraft.plans import WHOLE, Groups, Provenance, PrunePlan, from_json, to_dict
from regraft.progress import Say, Step
from regraft.reading import read_object
from regraft.streaming.checkpoint import CheckpointFiles
from regraft.streaming.skeleton import Skeleton
from regraft.streaming.writer import Shard, ShardWriter
from regraft.surgery.cut import (
    layers_after,
    removed_indices,
    removed_inside,
    removed_parameters,
    renumbered_names,
    sizes_after,
    without_inside,
)
from regraft.surgery.experts import config_of_experts

NOTE = "progress.json"
# Layers are collected into one file up to this size: a small model is one file, a large model one file a layer.
SHARD_BYTES = 1 << 28


class PartialOutput:
    """Output of a run that can be resumed: the plan and the finished shards.

    Args:
        folder: Temporary folder next to the output.
        asked: All settings that decide the written files, as plain JSON types.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self.folder = folder
        self._asked = asked
        note = _read_note(folder)
        same = note is not None and note["asked"] == asked
        self.plan = from_json(PrunePlan, json.dumps(note["plan"])) if note is not None and same else None
        self._shards: dict[str, str] = dict(note["shards"]) if note is not None and same else {}

    def decided(self, plan: PrunePlan) -> None:
        """Records the plan."""
        self.plan = plan
        self._write()

    def finished(self, shards: Sequence[Shard]) -> int:
        """Returns how many shards, from the first on, are present and undamaged; drops the others from the record."""
        count = 0
        for shard in shards:
            path = self.folder / shard.name
            if shard.name not in self._shards or not path.is_file() or sha256_of(path) != self._shards[shard.name]:
                break
            count += 1
        self._shards = {shard.name: self._shards[shard.name] for shard in shards[:count]}
        return count

    def add(self, shard: Shard, sha256: str) -> None:
        """Records a finished shard."""
        self._shards[shard.name] = sha256
        self._write()

    def end(self) -> dict[str, str]:
        """Removes the note; returns the SHA-256 of every shard by name."""
        (self.folder / NOTE).unlink(missing_ok=True)
        return dict(self._shards)

    def _write(self) -> None:
        assert self.plan is not None
        note = {"asked": self._asked, "plan": to_dict(self.plan), "shards": self._shards}
        write_text(self.folder / NOTE, json.dumps(note) + "\n")


@contextmanager
def resumable(output: Path, asked: Mapping[str, Any]) -> Iterator[PartialOutput]:
    """Opens the folder of an interrupted run with the same settings, or an empty folder.

    Args:
        output: The final folder; it appears when the block ends without an error.
        asked: All settings that decide the written files, as plain JSON types.

    Raises:
        OutputError: The folder cannot be written; finished shards are kept for the next attempt.
        ModelError: The input is damaged; nothing is kept.
    """
    asked = json.loads(json.dumps(asked))

    damaged = False

    def worth_keeping(folder: Path) -> bool:
        note = _read_note(folder)
        return not damaged and note is not None and note["asked"] == asked

    left: list[Path] = []
    try:
        with atomic_folder(output, keep=worth_keeping) as folder:
            left.append(folder)
            try:
                yield PartialOutput(folder, asked)
            except ModelError:
                damaged = True
                raise
    except OutputError as error:
        if left and worth_keeping(left[0]):
            raise OutputError(f"{error}; what is finished stays in '{left[0].parent}', and the same command goes on from there") from error
        raise


def _read_note(folder: Path) -> dict[str, Any] | None:
    try:
        note = read_object(folder / NOTE, PlanError)
        from_json(PrunePlan, json.dumps(note["plan"]))
        dict(note["shards"])
        return note if "asked" in note else None
    except (ValueError, KeyError, TypeError, PlanError):
        return None


@dataclass(frozen=True)
class PrunedLayout:
    """Layout of a pruned checkpoint: which tensor gets which name, shape and file. It holds no weights.

    Attributes:
        skeleton: The checkpoint that is pruned.
        removed: Name and axis of a parameter to the indices that it loses there.
        inside: Name and axis of a stack to the indices that each of its entries loses there.
        layers: Indices of the layers that are left.
        names: New name of each parameter that is left to its old name, in order.
        written: Name of each tensor that is written to the new name of its parameter, in order: transformers stores some parameters under
            other names, or in several tensors.
        parts: For each layer, by its old index, and for the parameters outside the layers (None): written names and shapes, in order.
        shards: The files.
        sizes: Sizes of the layers that are left.
        config: Config of the pruned model.
    """

    skeleton: Skeleton
    removed: Mapping[tuple[str, int], Collection[int]]
    inside: Mapping[tuple[str, int], Mapping[int, Collection[int]]]
    layers: Sequence[int]
    names: Mapping[str, str]
    written: Mapping[str, str]
    parts: Sequence[tuple[int | None, Mapping[str, tuple[int, ...]]]]
    shards: Sequence[Shard]
    sizes: Sequence[LayerSizes]
    config: Any

    def kept(self, name: str, axis: int, size: int) -> Tensor:
        """Returns the indices that a parameter keeps along an axis of the given full length, (kept,) int64."""
        keep = torch.ones(size, dtype=torch.bool)
        keep[sorted(self.removed[name, axis])] = False
        return keep.nonzero().squeeze(1)

    def cut_axes(self, name: str) -> list[int]:
        """Returns the axes along which a parameter of the checkpoint loses indices."""
        return [axis for parameter, axis in self.removed if parameter == name]

    def parts_of(self, shard: Shard) -> list[tuple[int | None, Mapping[str, tuple[int, ...]]]]:
        """Returns the parts that a file holds; a layer without any remaining parameter is in none."""
        return [part for part in self.parts if next(iter(part[1])) in shard.shapes]

    def finished_layers(self, count: int) -> int:
        """Returns how many layers, from the first on, are in the first ``count`` files."""
        inside = [layer for shard in self.shards[:count] for layer, _ in self.parts_of(shard) if layer is not None]
        return max(inside, default=-1) + 1


def layout_of(skeleton: Skeleton, groups: Groups, plan: PrunePlan) -> PrunedLayout:
    """Returns the layout of what a plan leaves of a checkpoint."""
    view, layers = skeleton.view, layers_after(groups, plan.cuts)
    removed, gone = removed_indices(groups, plan.cuts), removed_parameters(groups, plan.cuts)
    inside = removed_inside(groups, plan.cuts)
    full = skeleton.shapes
    names = renumbered_names([name for name in full if name not in gone], view.family.layers, layers)
    prefix = f"{view.family.layers}."

    def layer_of(new: str) -> int | None:
        name = names[new]
        return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None

    def shape_of(new: str) -> tuple[int, ...]:
        name = names[new]
        lost = {axis: len(indices) for (parameter, axis), indices in removed.items() if parameter == name}
        lost |= {axis: max(map(len, entries.values())) for (parameter, axis), entries in inside.items() if parameter == name}
        return tuple(size - lost.get(axis, 0) for axis, size in enumerate(full[name]))

    sizes = sizes_after(view, groups, plan.cuts)
    left = [sizes[layer] for layer in layers]
    of_experts = any(group.kind in ("experts", "expert_ffn") for group in groups.groups)
    config = config_of_experts(view, groups, plan) if of_experts else config_for(view.model.config, left, layers=layers)
    tensors = _written(view.model, config, {new: shape_of(new) for new in names})
    by_layer = groupby(names, key=layer_of)
    parts = [(layer, {key: shape for new in every for key, shape in tensors[new].items()}) for layer, every in by_layer]
    written = {key: new for new in names for key in tensors[new]}
    shards = shards_of(parts, skeleton.dtype, SHARD_BYTES)
    return PrunedLayout(skeleton, removed, inside, layers, names, written, parts, shards, left, config)


def _written(
    model: PreTrainedModel, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the tensors that are written for each parameter; our own classes store each as it is."""
    if config.model_type != model.config.model_type or config.model_type.startswith("regraft_"):
        return {name: {name: shape} for name, shape in shapes.items()}
    return written_of(model, shapes)


def write_shards(
    layout: PrunedLayout, progress: PartialOutput, done: int, refitted: Iterator[tuple[int, Mapping[str, Tensor]]] | None, say: Say
) -> None:
    """Writes every shard that is not finished.

    Args:
        layout: What goes where.
        progress: The folder to write to.
        done: How many shards, from the first on, are finished.
        refitted: The new tensors of every layer that is not finished, in order; None when nothing is re-fitted.
        say: Called with one line for each shard.
    """
    for number, shard in enumerate(layout.shards[done:], start=done + 1):
        say(Step("writing shards", number, len(layout.shards)))
        with ShardWriter(progress.folder, shard) as writer:
            for layer, shapes in layout.parts_of(shard):
                changed: Mapping[str, Tensor] = {}
                if refitted is not None and layer is not None:
                    changed = next(tensors for index, tensors in refitted if index == layer)
                for new, keys in groupby(shapes, key=lambda key: layout.written[key]):
                    pieces = _pieces(layout, layout.names[new], changed)
                    match [*keys]:
                        case [key]:
                            writer.write(key, pieces)
                        case several:
                            (whole,) = pieces  # a parameter that is stored in several tensors comes in one
                            tensors = as_written(layout.skeleton.loaded.model, new, whole)
                            for key in several:
                                writer.write(key, [tensors[key]])
        progress.add(shard, writer.sha256)


def _pieces(layout: PrunedLayout, name: str, changed: Mapping[str, Tensor]) -> Iterable[Tensor]:
    """Returns a parameter as it is written: re-fitted, cut, or piece by piece as it is stored."""
    skeleton, axes = layout.skeleton, layout.cut_axes(name)
    within = {axis: entries for (parameter, axis), entries in layout.inside.items() if parameter == name}
    if name not in changed and not axes and not within:
        return skeleton.pieces(name)
    tensor = changed[name].detach().to(device="cpu", dtype=skeleton.dtype) if name in changed else skeleton.stored(name)
    for axis in axes:
        tensor = tensor.index_select(axis, layout.kept(name, axis, tensor.shape[axis]))
    for axis, entries in within.items():
        tensor = without_inside(tensor, axis, entries)
    return [tensor]


class FinishedLayers:
    """Layers of a checkpoint whose pruned weights an interrupted run has written.

    Args:
        layout: What the run wrote where.
        folder: The folder of the run.
        done: How many shards, from the first on, are finished.
        readers: Layer to the modules that read the channels which are cut, by full name.
    """

    def __init__(self, layout: PrunedLayout, folder: Path, done: int, readers: Mapping[int, Sequence[str]]) -> None:
        self._layout = layout
        self._readers = readers
        self._files = CheckpointFiles(folder, sorted(folder / shard.name for shard in layout.shards[:done]))
        self.count = layout.finished_layers(done)

    @torch.no_grad()
    def put(self, layer: int, module: nn.Module) -> None:
        """Puts the written tensors of a layer into the layer at full size, with zeros in the removed columns.

        In an uninterrupted run the hidden states pass through this full-size layer, not through the narrow one.
        """
        layout = self._layout
        written = {layout.names[new]: key for key, new in layout.written.items()}
        prefix = f"{layout.skeleton.view.layer_name(layer)}."
        for reader in self._readers.get(layer, ()):
            for key, parameter in module.get_submodule(reader.removeprefix(prefix)).named_parameters():
                name = f"{reader}.{key}"
                if name not in written:  # removed together with its part
                    continue
                tensor = self._files.read(written[name]).to(parameter)
                for axis in layout.cut_axes(name):
                    full = torch.zeros(parameter.shape).to(parameter)
                    tensor = full.index_copy(axis, layout.kept(name, axis, parameter.shape[axis]).to(parameter.device), tensor)
                parameter.copy_(tensor)


def readers_of(groups: Groups, plan: PrunePlan) -> dict[int, list[str]]:
    """Returns, for each layer, the modules that read the channels which a plan cuts, by full name."""
    named = groups.named()
    found: dict[int, list[str]] = {}
    for entry in plan.cuts:
        group = named[entry.group]
        if group.layer is not None and group.kind not in WHOLE:
            found.setdefault(group.layer, []).append(group.reader.parameter.rpartition(".")[0])
    return found


def finish_pruned(layout: PrunedLayout, progress: PartialOutput, provenance: Provenance, card: Callable[[Provenance], str]) -> Provenance:
    """Writes all files other than the weights.

    Args:
        layout: What was written where.
        progress: Output with all shards finished.
        provenance: Provenance of the model, without the checksums.
        card: Returns the beginning of the model card.
    """
    return finish_folder(layout.skeleton, progress.folder, layout.config, layout.sizes, layout.shards, provenance, card, progress.end())


def finish_folder(
    skeleton: Skeleton,
    folder: Path,
    config: Any,
    sizes: Sequence[LayerSizes],
    shards: Sequence[Shard],
    provenance: Provenance,
    card: Callable[[Provenance], str],
    checksums: Mapping[str, str],
) -> Provenance:
    """Writes all files of a model folder other than the weights, after reading their headers back.

    Args:
        skeleton: The checkpoint that the model was made from.
        folder: Folder with the shards.
        config: Config of the new model.
        sizes: Sizes of its layers.
        shards: The shards.
        provenance: Provenance of the model, without the checksums.
        card: Returns the beginning of the model card.
        checksums: SHA-256 of the shards by name.
    """
    model_class = write_all_but_weights(skeleton, folder, config, shards)
    return write_folder(folder, provenance, whole_card(card(provenance), model_class, sizes), checksums)


def write_all_but_weights(skeleton: Skeleton, folder: Path, config: Any, shards: Sequence[Shard]) -> type[PreTrainedModel]:
    """Writes config, code, index and tokenizer beside finished shards, and reads the headers of these back.

    Args:
        skeleton: The checkpoint that the model was made from.
        folder: Folder with the shards.
        config: Config of the new model.
        shards: The shards.

    Returns:
        The class of the model.

    Raises:
        OutputError: A shard does not hold what it was meant to hold.
    """
    model_class = _write_config(skeleton, folder, config)
    if len(shards) > 1:
        mapping = {name: shard.name for shard in shards for name in shard.shapes}
        count = sum(prod(shape) for shard in shards for name, shape in shard.shapes.items() if name not in shard.others)
        total = {"total_parameters": count, "total_size": sum(shard.nbytes for shard in shards)}
        index = {"metadata": total, "weight_map": mapping}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with quiet():
        if skeleton.loaded.tokenizer is not None:
            skeleton.loaded.tokenizer.save_pretrained(folder)
    stored = stored_tensors(folder)
    for shard in shards:
        for name, shape in shard.shapes.items():
            if name not in stored or stored[name].shape != shape:
                raise OutputError(f"'{name}' was not written as it was meant; start again on another disk")
    return model_class


def _write_config(skeleton: Skeleton, folder: Path, config: Any) -> type[PreTrainedModel]:
    """Writes the config, the generation config, and our modelling code if the model needs it; returns the model's class."""
    model = skeleton.loaded.model
    register()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.dtype = str(skeleton.dtype).partition(".")[2]
    config.architectures = [model_class.__name__]
    with quiet():
        config.save_pretrained(folder)
        mend_generation_config(model)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    if config.model_type.startswith("regraft_"):
        for path in code_paths():
            (folder / path.name).write_bytes(path.read_bytes())
    return model_class


def shards_of(parts: Sequence[tuple[int | None, Mapping[str, tuple[int, ...]]]], dtype: torch.dtype, limit_bytes: int) -> list[Shard]:
    """Returns the files, each with as many consecutive parts as fit below the limit."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for _, shapes in parts:
        part = sum(map(prod, shapes.values())) * dtype.itemsize
        if files[-1] and size + part > limit_bytes:
            files.append({})
            size = 0
        files[-1] |= shapes
        size += part
    if len(files) == 1:
        return [Shard(SINGLE, files[0], dtype)]
    return [Shard(f"model-{number:05}-of-{len(files):05}.safetensors", shapes, dtype) for number, shapes in enumerate(files, start=1)]
