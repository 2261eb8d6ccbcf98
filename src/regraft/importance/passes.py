"""Access of a criterion to weights, inputs and gradients, for a model in memory or one that is read layer by layer.

A criterion gets them for some groups at a time, and uses only those of the last step. So the same few lines score a model in memory and a
model that is read layer by layer from a file larger than memory (:mod:`regraft.streaming`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.importance.reader_moments import ReaderMoments, reader_moments
from regraft.models.layerwise import Walk, WholeWalk
from regraft.models.precision import float32_on_cpu
from regraft.models.trainable import only_these_train
from regraft.models.view import ModelView
from regraft.plans import Group, Groups


@dataclass(frozen=True)
class Gradients:
    """Gradients of the mean language-modelling loss over calibration windows, for the members of some groups.

    Attributes:
        groups: The groups whose members have gradients here.
        first: Parameter name to the mean gradient, float32, of the parameter's shape.
        second: Parameter name to the mean over windows of the squared gradient; empty if it was not requested.
    """

    groups: tuple[Group, ...]
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]


class Passes(ABC):
    """A source of evidence for criteria."""

    @abstractmethod
    def weights(self, groups: Groups) -> Iterator[tuple[Group, ...]]:
        """Yields all groups, some at a time. The weights of their members are valid until the next step."""

    @abstractmethod
    def walk(self) -> Walk:
        """Returns a walk of the calibration windows through the layers."""

    @abstractmethod
    def gradients(self, groups: Groups, *, squares: bool) -> Iterator[Gradients]:
        """Yields the gradients of all groups, some at a time, in any order. Weights are valid as in :meth:`weights`.

        Args:
            groups: Groups of the model.
            squares: Whether to compute the mean squares too.
        """

    def reader_moments(self, names: Sequence[str], seed: int) -> Mapping[str, ReaderMoments]:
        """Returns second moments of the inputs of projections, and of the gradients in their outputs, over the calibration windows.

        Args:
            names: Names of projections that read heads or feed-forward channels.
            seed: Seed for the tokens that are drawn from the model's predictions.

        Raises:
            InputError: The model is not in memory as a whole.
        """
        raise InputError("a criterion in nats runs the whole model back, which `memory` leaves no room for; use `criterion=surgeon`")


class WholeModel(Passes):
    """Evidence from a model in memory.

    Args:
        model: The model; it is restored after each pass.
        windows_NT: Calibration tokens, int64 (windows, tokens), or None when only weights are needed.
    """

    def __init__(self, model: PreTrainedModel, windows_NT: Tensor | None) -> None:
        self._model = model
        self._windows = windows_NT
        self._seen: dict[tuple[tuple[str, ...], int], Mapping[str, ReaderMoments]] = {}

    def weights(self, groups: Groups) -> Iterator[tuple[Group, ...]]:
        """Yields all groups at once."""
        yield groups.groups

    def walk(self) -> Walk:
        """Returns a walk through the model."""
        assert self._windows is not None
        return WholeWalk(ModelView(self._model), self._windows)

    def gradients(self, groups: Groups, *, squares: bool) -> Iterator[Gradients]:
        """Yields all gradients at once. The memory is that of one gradient, and with ``squares`` of a second one."""
        assert self._windows is not None
        names = {member.parameter for group in groups.groups for member in group.members}
        parameters = {name: parameter for name, parameter in self._model.named_parameters() if name in names}
        first, second = mean_gradients(self._model, parameters, self._windows, squares=squares)
        yield Gradients(groups.groups, first, second)

    def reader_moments(self, names: Sequence[str], seed: int) -> Mapping[str, ReaderMoments]:
        """Returns what one pass tells, and remembers it for those who ask for the same."""
        assert self._windows is not None
        refuse_single_tokens(self._windows)
        key = (tuple(names), seed)
        if key not in self._seen:
            self._seen[key] = reader_moments(self._model, names, self._windows, seed)
        return self._seen[key]


def refuse_single_tokens(windows_NT: Tensor) -> None:
    """Refuses windows of a single token, which have no loss.

    Raises:
        InputError: The windows have a single token.
    """
    if windows_NT.shape[1] < 2:
        raise InputError("windows of 1 token leave nothing to predict; use a `seq_len` of at least 2")


def mean_gradients(
    model: PreTrainedModel, parameters: Mapping[str, Tensor], windows: Tensor, *, squares: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the mean gradient of the language-modelling loss and, with ``squares``, its mean square over windows, in float32.

    On a CPU the passes are computed in float32 as well, for weights of any dtype.

    Raises:
        InputError: The windows have a single token.
    """
    refuse_single_tokens(windows)
    first = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    second = {name: torch.zeros_like(value) for name, value in first.items()} if squares else {}
    device = next(iter(parameters.values())).device
    with float32_on_cpu(model), only_these_train(model, parameters.values()), torch.enable_grad():
        for window in windows:
            ids = window.unsqueeze(0).to(device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                first[name].add_(gradient.float(), alpha=1.0 / len(windows))
                if squares:
                    second[name].addcmul_(gradient.float(), gradient.float(), value=1.0 / len(windows))
    return first, second
