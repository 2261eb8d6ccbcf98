"""Factors of a checkpoint's linear layers on disk, and the writer of a factored checkpoint, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from regraft.models.build import config_for
from regraft.numerics.truncation import Factors, Truncation
from regraft.plans import FactorPlan, Provenance
from regraft.progress import Say, Step, say_nothing
from regraft.streaming.checkpoint import CheckpointFiles
from regraft.streaming.output import SHARD_BYTES, finish_folder, shards_of
from regraft.streaming.skeleton import Skeleton
from regraft.streaming.writer import ShardWriter
from regraft.surgery.factorize import config_changes, factor_tensors


class StoredFactors:
    """Factors of every rank, a file for each linear layer, of which the first terms are read.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, truncation: Truncation) -> None:
        """Writes the factors of a layer."""
        tensors = {"left": truncation.left_OK.T.contiguous(), "right": truncation.right_KI.contiguous()}
        if truncation.mean_I is not None and truncation.mean_O is not None:
            tensors |= {"mean_inputs": truncation.mean_I.contiguous(), "mean_outputs": truncation.mean_O.contiguous()}
        save_file(tensors, self._path(name))

    def at(self, name: str, rank: int) -> Factors:
        """Returns the factors of a layer at a rank."""
        stored = CheckpointFiles(self._folder, [self._path(name)])
        left_OR, right_RI = stored.rows("left", 0, rank).T, stored.rows("right", 0, rank)
        if "mean_inputs" not in stored.places:
            return Factors(left_OR, right_RI, None)
        return Factors(left_OR, right_RI, stored.read("mean_outputs") - left_OR @ (right_RI @ stored.read("mean_inputs")))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


class FactoredWriter:
    """Writes a checkpoint with factored layers.

    Args:
        skeleton: The dense checkpoint.
        plan: The layers to factor and their ranks.
        factors: Returns the factors of a layer at a rank.
    """

    def __init__(self, skeleton: Skeleton, plan: FactorPlan, factors: Callable[[str, int], Factors]) -> None:
        self._skeleton = skeleton
        self._plan = plan
        self._factors = factors
        self._planned = {entry.module: entry for entry in plan.factorings}
        parts = list(self._split_by_layer())
        orders = {name: torch.int32 for _, shapes in parts for name in shapes if name.endswith(".order")}
        self.shards = [
            replace(shard, others={name: dtype for name, dtype in orders.items() if name in shard.shapes})
            for shard in shards_of(parts, skeleton.dtype, SHARD_BYTES)
        ]

    def write(self, folder: Path, provenance: Provenance, card: Callable[[Provenance], str], say: Say = say_nothing) -> Provenance:
        """Writes all files of the folder.

        Args:
            folder: An empty folder.
            provenance: Provenance of the model, without the checksums.
            card: Returns the beginning of the model card.
            say: Called with one line for each shard.
        """
        checksums: dict[str, str] = {}
        for number, shard in enumerate(self.shards, start=1):
            say(Step("writing shards", number, len(self.shards)))
            with ShardWriter(folder, shard) as writer:
                # The tensors of one layer follow one another in the file, and are made together.
                for module, names in groupby(shard.shapes, key=self._module_of):
                    if module is None:
                        for name in names:
                            writer.write(name, self._skeleton.pieces(name))
                        continue
                    made = self._made(module)
                    for name in names:
                        writer.write(name, [made[name]])
            checksums[shard.name] = writer.sha256
        view = self._skeleton.view
        sizes = [view.sizes(index) for index in range(len(view.layers))]
        model = self._skeleton.loaded.model
        config = config_for(model.config, sizes, changes=config_changes(model, self._plan))
        return finish_folder(self._skeleton, folder, config, sizes, self.shards, provenance, card, checksums)

    def _made(self, module: str) -> dict[str, Tensor]:
        entry = self._planned[module]
        bias = self._skeleton.stored(f"{module}.bias") if self._has_bias(module) else None
        tensors = factor_tensors(self._factors(module, entry.rank), bias, self._plan.layout, self._skeleton.dtype)
        return {f"{module}.{name}": tensor for name, tensor in tensors.items()}

    def _has_bias(self, module: str) -> bool:
        return self._skeleton.view.model.get_submodule(module)._parameters.get("bias") is not None

    def _module_of(self, name: str) -> str | None:
        """Returns the factored layer that a tensor belongs to, or None for tensors that are written as they are."""
        module = name.rpartition(".")[0]
        if module in self._planned:
            return module
        outer = module.rpartition(".")[0]
        return outer if outer in self._planned and module.endswith((".reduce", ".expand")) else None

    def _split_by_layer(self) -> Iterator[tuple[int | None, Mapping[str, tuple[int, ...]]]]:
        """Yields the shapes by name, for each decoder layer and for the parameters outside the layers (None), in order."""
        view = self._skeleton.view
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in view.model.named_parameters():
            module, _, last = name.rpartition(".")
            if module not in self._planned:
                shapes[name] = tuple(parameter.shape)
            elif last == "weight":
                shapes |= self._shapes_of(module, tuple(parameter.shape))
        prefix = f"{view.family.layers}."

        def layer_of(name: str) -> int | None:
            return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None

        for layer, names in groupby(shapes, key=layer_of):
            yield layer, {name: shapes[name] for name in names}

    def _shapes_of(self, module: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        rows, columns = shape[::-1] if self._skeleton.view.family.transposed else shape
        entry, pifa = self._planned[module], self._plan.layout == "pifa"
        found: dict[str, tuple[int, ...]] = {"weight": (0,), "reduce.weight": (entry.rank, columns)}
        found["expand.weight"] = (rows - entry.rank if pifa else rows, entry.rank)
        found |= {"order": (rows,)} if pifa else {}
        found |= {"bias": (rows,)} if entry.bias else {}
        return {f"{module}.{name}": size for name, size in found.items()}
