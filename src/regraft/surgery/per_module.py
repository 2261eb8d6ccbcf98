"""The model-level adapter of a per-module method: injection, freezing, merging and saving, once for all methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final

from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.adapters.contract import (
    AdapterRequest,
    Defaults,
    Delta,
    Evidence,
    LowRank,
    Method,
    ParameterGroup,
    groups_by_rate,
    make_specs,
)
from regraft.adapters.linear_like import oriented, untie, weight_of
from regraft.errors import InputError
from regraft.models.classifier import classes_of, head_parameters
from regraft.numerics.svd import factored_triplets
from regraft.settings import Settings
from regraft.surgery.adapted import Adapted, adapted_modules, unwrap, wrap
from regraft.surgery.adapter_files import Master, base_fingerprint, write_master
from regraft.surgery.first_gradients import first_gradients

HEAD_RATE = 1e-3


@final
@dataclass(frozen=True)
class PerModule:
    """An adapter of one method for a whole model.

    Attributes:
        method: Method that makes the adapter of each module.
        name: Name of this adapter among several on one model.
    """

    method: Method
    name: str = "default"

    @property
    def options(self) -> type[Settings]:
        """Class of the method's options."""
        return self.method.options

    @property
    def defaults(self) -> Defaults:
        """Training defaults of the method."""
        return self.method.defaults

    def attach(self, model: PreTrainedModel, request: AdapterRequest, evidence: Evidence | None) -> nn.Module:
        """Injects an adapter into every module that has a rank; returns the model, which is trained directly."""
        modules = {name: _plain(model, name) for name in request.ranks}
        specs = make_specs(modules, request)
        for name, spec in specs.items():
            self.method.check(spec)
            if isinstance(module := adapted_modules(model).get(name), Adapted) and self.name in module.deltas:
                raise InputError(f"the model has an adapter '{self.name}' already; give this one another name")
        deltas = {name: self.method.make(specs[name], given) for name, given in self._given(model, modules, request, evidence)}
        assert all(_trained(delta) == self.method.count(specs[name]) for name, delta in deltas.items())
        self.put(model, deltas)
        return model

    def put(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        """Adds module adapters to a model, and freezes all other parameters except a classification head."""
        model.requires_grad_(False)
        for name, delta in deltas.items():
            place = wrap(model, name)
            place.add(self.name, delta.to(weight_of(place.base).device).train(model.training))
        for _, parameter in head_parameters(model):
            parameter.requires_grad_(True)

    def _given(
        self, model: PreTrainedModel, modules: Mapping[str, nn.Module], request: AdapterRequest, evidence: Evidence | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields for each module the weight or gradient that the method initialises its adapter from."""
        batches = self.method.gradient_batches(request.options)
        if not batches:
            yield from ((name, oriented(module, weight_of(module)).detach()) for name, module in modules.items())
            return
        if evidence is None:
            raise InputError(f"adapter '{self.method.name}' starts from gradients over training batches, and none were given")
        yield from first_gradients(model, modules, evidence, batches)

    def deltas(self, adapted: nn.Module) -> dict[str, Delta]:
        """Returns the adapter of each module."""
        places = adapted_modules(adapted)
        return {name: cast(Delta, place.deltas[self.name]) for name, place in places.items() if self.name in place.deltas}

    def parameter_groups(self, adapted: nn.Module, lr: float | None) -> tuple[ParameterGroup, ...]:
        """Returns the parameters in groups of one learning rate; a head has the given rate or its own default."""
        rates: list[tuple[nn.Parameter, float]] = []
        for delta in self.deltas(adapted).values():
            wanted = delta.rates(lr, self.defaults.lr)
            rates += [(parameter, wanted[name]) for name, parameter in delta.named_parameters()]
        rates += [(parameter, lr if lr is not None else HEAD_RATE) for _, parameter in head_parameters(adapted)]
        return groups_by_rate(rates, self.defaults.eps)

    def after_step(self, adapted: nn.Module, step: int) -> None:
        """Does nothing, because no per-module method changes its form during training."""

    def penalty(self, adapted: nn.Module) -> None:
        """Returns None, because per-module methods add no penalty to the loss."""

    def state(self, adapted: nn.Module) -> dict[str, Tensor]:
        """Returns no state, because per-module methods have only parameters."""
        return {}

    def put_state(self, adapted: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Does nothing, because per-module methods have no state."""

    def finish(self, adapted: nn.Module) -> None:
        """Brings the adapter of every module into its final form: trimmed or quantised, as its options say."""
        deltas = self.deltas(adapted)
        tolerance = self.method.trim_tolerance(next(iter(deltas.values())).spec.options) if deltas else 0.0
        if tolerance > 0:
            self.trim(adapted, tolerance)
        for name, delta in self.deltas(adapted).items():
            cast(Adapted, adapted.get_submodule(name)).deltas[self.name] = delta.finished()

    def trim(self, adapted: nn.Module, tolerance: float) -> dict[str, int]:
        """Truncates the adapter of every module to its numerical rank; adapters of rank 0 are removed.

        The output of a module changes by at most ``tolerance * largest * |x|``, where largest is the largest singular value of the
        weight changes of all modules.

        Args:
            adapted: The model with the adapter.
            tolerance: Singular values up to this share of the largest one are removed.

        Returns:
            Module name to its new rank, with 0 for removed adapters.
        """
        threshold = tolerance * max(max(values, default=0.0) for values in self.spectra(adapted).values())
        ranks: dict[str, int] = {}
        for name, delta in self.deltas(adapted).items():
            place = cast(Adapted, adapted.get_submodule(name))
            cut = delta.truncated(threshold)
            ranks[name] = cut.spec.rank if cut is not None else 0
            if cut is not None:
                place.deltas[self.name] = cut.to(weight_of(place.base).device)
            elif len(place.deltas) > 1:
                place.drop(self.name)
            else:
                unwrap(adapted, name, place.base)
        return ranks

    def spectra(self, adapted: nn.Module) -> dict[str, tuple[float, ...]]:
        """Returns the singular values of every weight change, descending, computed from its factors (for methods of low rank)."""
        found: dict[str, tuple[float, ...]] = {}
        for name, delta in self.deltas(adapted).items():
            factors = delta.factored()
            values = factored_triplets(factors.left.double(), factors.right.double().T).values
            found[name] = tuple(values.tolist())
        return found

    def factors(self, adapted: nn.Module) -> dict[str, LowRank]:
        """Returns the weight change of every module as two factors."""
        return {name: delta.low_rank() for name, delta in self.deltas(adapted).items()}

    def merge(self, adapted: nn.Module) -> PreTrainedModel:
        """Merges all adapters that are on into the weights, and removes all adapters.

        If an embedding and its head share a weight and only one of them was adapted, that one gets its own copy first.
        """
        model = cast(PreTrainedModel, adapted)
        for name, place in adapted_modules(model).items():
            if any(True for _ in place.active()) and untie(model, place.base):
                model.config.tie_word_embeddings = False
            unwrap(model, name, place.merged())
        return model

    def save(self, adapted: nn.Module, folder: Path, base: str) -> None:
        """Writes the adapter's files; see :mod:`regraft.surgery.adapter_files`."""
        deltas = self.deltas(adapted)
        head = {name: parameter.detach() for name, parameter in head_parameters(adapted)}
        classes = classes_of(cast(PreTrainedModel, adapted)) if head else ()
        write_master(folder, Master(self.method.name, base, base_fingerprint(adapted), deltas, head, classes))


def _plain(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.base if isinstance(module, Adapted) else module


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
