"""Writer of a pruned checkpoint, shard by shard, which can resume an interrupted run.

All files are written into the temporary folder that :func:`regraft.atomic.atomic_folder` keeps next to the output. A note in it holds
the settings, the plan, and the SHA-256 of every finished shard. A later run with the same settings resumes from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from regraft.atomic import atomic_folder, sha256_of, write_text
from regraft.errors import ModelError, OutputError, PlanError
from regraft.models.build import config_for
from regraft.models.folder import write_folder
from regraft.models.quiet import quiet
from regraft.models.save import mend_generation_config, whole_card
from regraft.models.uneven import code_paths, register
from regraft.models.view import LayerSizes
from regraft.models.weights import INDEX, SINGLE, stored_tensors
from regraft.plans import WHOLE, Groups, Provenance, PrunePlan, from_json, to_dict
from regraft.progress import Say, Step, say_nothing
from regraft.streaming.checkpoint import CheckpointFiles
from regraft.streaming.skeleton import Skeleton
from regraft.streaming.writer import Shard, ShardWriter
from regraft.surgery.cut import layers_after, removed_indices, removed_parameters, renumbered_names, sizes_after

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
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        from_json(PrunePlan, json.dumps(note["plan"]))
        dict(note["shards"])
        return note if "asked" in note else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, PlanError):
        return None


Refit = Callable[[int, Callable[[int, nn.Module], None]], Iterator[tuple[int, dict[str, Tensor]]]]
"""A function ``refit(finished, restore)`` that yields ``(layer, new tensors)`` for every layer from number ``finished`` on. It calls
``restore(layer, module)`` for each earlier layer, which loads the weights already written for that layer into the module."""


class PrunedWriter:
    """Writes the pruned tensors of a checkpoint.

    Args:
        skeleton: The checkpoint.
        groups: Groups of the checkpoint.
        plan: The units to keep.
    """

    def __init__(self, skeleton: Skeleton, groups: Groups, plan: PrunePlan) -> None:
        self._skeleton = skeleton
        self._groups = groups
        self._plan = plan
        self._removed = removed_indices(groups, plan.cuts)
        self._layers = layers_after(groups, plan.cuts)
        self._names = renumbered_names(self._left(), skeleton.view.family.layers, self._layers)
        self._parts = list(self._split_by_layer())
        self.shards = shards_of(self._parts, skeleton.dtype, SHARD_BYTES)
        sizes = sizes_after(skeleton.view, groups, plan.cuts)
        self.sizes: list[LayerSizes] = [sizes[layer] for layer in self._layers]

    def write(self, progress: PartialOutput, refit: Refit | None, say: Say = say_nothing) -> None:
        """Writes every shard that is not finished.

        Args:
            progress: The folder to write to, and the finished shards.
            refit: Yields the new tensors of the layers; None when nothing is re-fitted.
            say: Called with one line for each shard.
        """
        done = progress.finished(self.shards)
        holder = {name: shard.name for shard in self.shards for name in shard.shapes}
        written = {shard.name for shard in self.shards[:done]}
        finished = max(
            (layer + 1 for layer, shapes in self._parts if layer is not None and holder[next(iter(shapes))] in written), default=0
        )
        refitted: Iterator[tuple[int, dict[str, Tensor]]] = iter(())
        if refit is not None and finished < len(self._skeleton.view.layers):
            source = CheckpointFiles(progress.folder, [progress.folder / name for name in sorted(written)])
            refitted = refit(finished, lambda layer, module: self._restore(source, layer, module))
        for number, shard in enumerate(self.shards[done:], start=done + 1):
            say(Step("writing shards", number, len(self.shards)))
            with ShardWriter(progress.folder, shard) as writer:
                for layer, shapes in self._parts:
                    if holder[next(iter(shapes))] == shard.name:
                        again = layer is not None and refit is not None
                        # A layer without any remaining parameter is in no shard, so its tensors are not needed.
                        changed = next(tensors for index, tensors in refitted if index == layer) if again else {}
                        self._write_part(writer, shapes, changed)
            progress.add(shard, writer.sha256)

    def finish(self, progress: PartialOutput, provenance: Provenance, card: Callable[[Provenance], str]) -> Provenance:
        """Writes all files other than the weights.

        Args:
            progress: Output with all shards finished.
            provenance: Provenance of the model, without the checksums.
            card: Returns the beginning of the model card.
        """
        config = config_for(self._skeleton.loaded.model.config, self.sizes, layers=self._layers)
        return finish_folder(self._skeleton, progress.folder, config, self.sizes, self.shards, provenance, card, progress.end())

    def _write_part(self, writer: ShardWriter, shapes: Mapping[str, Any], changed: Mapping[str, Tensor]) -> None:
        for new in shapes:
            name = self._names[new]
            axes = [axis for parameter, axis in self._removed if parameter == name]
            if name not in changed and not axes:
                writer.write(new, self._skeleton.pieces(name))
                continue
            tensor = changed[name].detach().to(device="cpu", dtype=self._skeleton.dtype) if name in changed else self._skeleton.stored(name)
            for axis in axes:
                tensor = tensor.index_select(axis, self._kept(name, axis, tensor.shape[axis]))
            writer.write(new, [tensor])

    def _kept(self, name: str, axis: int, size: int) -> Tensor:
        keep = torch.ones(size, dtype=torch.bool)
        keep[sorted(self._removed[name, axis])] = False
        return keep.nonzero().squeeze(1)

    @torch.no_grad()
    def _restore(self, source: CheckpointFiles, layer: int, module: nn.Module) -> None:
        """Loads the tensors written for a layer into the layer at full size, with zeros in the removed columns.

        In an uninterrupted run the hidden states pass through this full-size layer, not through the narrow one.
        """
        named = self._groups.named()
        prefix = f"{self._skeleton.view.layer_name(layer)}."
        written = {name: new for new, name in self._names.items()}
        for entry in self._plan.cuts:
            group = named[entry.group]
            if group.layer != layer or group.kind in WHOLE:
                continue
            reader = group.reader
            for key, parameter in module.get_submodule(_module_of(reader.parameter).removeprefix(prefix)).named_parameters():
                name = f"{_module_of(reader.parameter)}.{key}"
                if name not in written:  # removed together with its part
                    continue
                tensor = source.read(written[name]).to(parameter)
                for axis in (axis for cut, axis in self._removed if cut == name):
                    full = torch.zeros(parameter.shape).to(parameter)
                    tensor = full.index_copy(axis, self._kept(name, axis, parameter.shape[axis]).to(parameter.device), tensor)
                parameter.copy_(tensor)

    def _split_by_layer(self) -> Iterator[tuple[int | None, dict[str, tuple[int, ...]]]]:
        """Yields the pruned shapes by new name, for each old layer and for the parameters outside the layers (None), in order."""
        full = {name: parameter.shape for name, parameter in self._skeleton.view.model.named_parameters()}
        shapes: dict[str, tuple[int, ...]] = {}
        for new, name in self._names.items():
            shapes[new] = tuple(size - len(self._removed.get((name, axis), ())) for axis, size in enumerate(full[name]))
        prefix = f"{self._skeleton.view.family.layers}."

        def layer_of(new: str) -> int | None:
            name = self._names[new]
            return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None

        for layer, names in groupby(shapes, key=layer_of):
            yield layer, {name: shapes[name] for name in names}

    def _left(self) -> list[str]:
        """Returns the names of the parameters that are not removed completely."""
        gone = removed_parameters(self._groups, self._plan.cuts)
        return [name for name, _ in self._skeleton.view.model.named_parameters() if name not in gone]


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


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


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
