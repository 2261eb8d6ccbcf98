"""Distillation: a pruned model learns from the dense model (Hinton et al., arXiv 1503.02531).

    loss = (1 - a) * task + a * T² KL(teacher_T || student_T) + h * distance of hidden states

summed over predicted tokens. The divergence uses the teacher's full distribution, or its likeliest tokens from
:mod:`regraft.training.teacher_cache`. Only the last hidden states of the two models are in memory for all positions; logits are computed,
compared and freed piece by piece (:func:`regraft.training.losses.in_pieces`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.errors import ModelError
from regraft.models.trainable import evaluating
from regraft.settings import RecoverSettings
from regraft.training.losses import divergence, divergence_of_top, in_pieces, predicting

# Number of logits in one piece: small enough for a CPU's caches (16 MiB of float32), large enough for efficient products on a GPU.
_PIECE_VALUES = {"cpu": 1 << 22, "cuda": 1 << 25}
_PROBE_TOKENS = 4
_RIDGE = 1e-4

TEACHER_LOG_P, TEACHER_TOKENS = "teacher_log_p", "teacher_tokens"
"""Names of a cached teacher's tensors in a batch: (N, K) each, with rows in the order of the batch's predicting positions."""


@dataclass
class Teacher:
    """The model that a student learns from.

    Attributes:
        model: The model in evaluation mode, on the student's device; None once released.
        name: Name of the teacher, as its user gave it.
        tokenizer: Tokenizer of the teacher; None if its folder has none.
        fingerprint: Fingerprint of the teacher.
    """

    model: PreTrainedModel | None = field(repr=False)
    name: str
    tokenizer: PreTrainedTokenizerBase | None
    fingerprint: str

    def present(self) -> PreTrainedModel:
        """Returns the model, which must not have been released."""
        assert self.model is not None
        return self.model

    def release(self) -> None:
        """Frees the model, once all its needed outputs are on disk."""
        self.model = None


def check_vocabulary(teacher: Teacher, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a teacher whose vocabulary differs from the student's.

    Raises:
        ModelError: The numbers of tokens differ, or an id stands for different tokens.
    """
    theirs, ours = vocabulary_of(teacher.present()), vocabulary_of(model)
    remedy = "give a teacher with the student's tokenizer, such as the model that it was pruned from"
    if theirs != ours:
        raise ModelError(f"the teacher '{teacher.name}' has another vocabulary: {theirs:,} tokens, the student has {ours:,}; {remedy}")
    if teacher.tokenizer is None:
        return
    there, here = teacher.tokenizer.get_vocab(), tokenizer.get_vocab()
    if there != here:
        token = min(token for token in there.keys() | here.keys() if there.get(token) != here.get(token))
        ids = f"{token!r} is {there.get(token)} there and {here.get(token)} here"
        raise ModelError(f"the teacher '{teacher.name}' has another vocabulary: {ids}; {remedy}")


def vocabulary_of(model: PreTrainedModel) -> int:
    """Returns the number of logits of a model for each position."""
    head = model.get_output_embeddings() or model.get_input_embeddings()
    return cast(Tensor, head.weight).shape[0]


@final
class Readout:
    """Access to the last hidden states of a model, and computation of logits from them.

    If the model's logits are its frozen output matrix times the output of its decoder, a forward pass computes the logits of one position
    only, and the others are computed piece by piece. This is tested, because some models change their logits (Gemma 2 caps them, Granite
    scales them). For these models the "hidden states" are the logits themselves.

    Args:
        model: The plain model; :meth:`__call__` takes the module that wraps it.
        autocast: Dtype of matrix products outside the model's own forward pass; float32 for no autocast.
    """

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype) -> None:
        self._model = model
        self._autocast = autocast
        self._last: Tensor | None = None
        self.vocabulary = vocabulary_of(model)
        self.fused = self._is_plain()

    def __call__(self, module: nn.Module, inputs: Mapping[str, Tensor], *, layers: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs a forward pass.

        Args:
            module: The model, or the module that wraps it.
            inputs: Inputs of the model, without labels.
            layers: Whether to return the hidden states of all layers.

        Returns:
            The input of :meth:`logits`, (B, L, D) or (B, L, V), and the output of every layer, (B, L, D) each, or an empty tuple.
        """
        asked: dict[str, Any] = {"use_cache": False, "output_hidden_states": layers}
        if not self.fused:
            output = module(**inputs, **asked)
            return output.logits, tuple(output.hidden_states[1:]) if layers else ()
        with self._listening():
            output = module(**inputs, **asked, logits_to_keep=1)
        last, self._last = self._last, None
        assert last is not None
        return last, tuple(output.hidden_states[1:]) if layers else ()

    def logits(self, last: Tensor) -> Tensor:
        """Returns the logits of given positions, float32 (…, V)."""
        if not self.fused:
            return last.float()
        kind = last.device.type
        with torch.autocast(kind, dtype=self._autocast, enabled=self._autocast != torch.float32):
            return self._head(last).float()

    def _head(self, last: Tensor) -> Tensor:
        head: Any = self._model.get_output_embeddings()
        # The parameters are used directly, so that wrappers of the module do not count this as another forward pass.
        return F.linear(last if self._autocast != torch.float32 else last.to(head.weight.dtype), head.weight, head.bias)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._last = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

        handle = self._model.get_decoder().register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _is_plain(self) -> bool:
        head: Any = self._model.get_output_embeddings()
        if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
            return False
        if "logits_to_keep" not in inspect.signature(self._model.forward).parameters:
            return False
        ids = torch.arange(_PROBE_TOKENS, device=self._model.device)[None]
        with evaluating(self._model), self._listening():
            logits = self._model(input_ids=ids, use_cache=False).logits.float()
        last, self._last = self._last, None
        if last is None or last.shape[-1] != head.weight.shape[-1]:
            return False
        return torch.allclose(self._head(last.to(head.weight.dtype)).float(), logits, rtol=1e-2, atol=1e-3 * float(logits.abs().max()))


@final
class Distillation:
    """Distillation loss of a batch, summed over its predicted tokens.

    Args:
        student: The model with its adapter, all other weights frozen.
        teacher: The teacher's model, or None if batches hold its likeliest tokens.
        settings: Shares of the losses and temperature.
        compute: Dtype of matrix products.
        projections: For each pair of layers, a map (teacher's D, student's D) of the teacher's hidden states; empty if the widths are
            equal.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        settings: RecoverSettings,
        compute: torch.dtype,
        projections: Sequence[Tensor] = (),
    ) -> None:
        self._student = Readout(student, compute)
        self._teacher = Readout(teacher, compute) if teacher is not None else None
        self._teacher_model = teacher
        self._settings = settings
        self._compute = compute
        self._projections = tuple(projections)

    def __call__(self, module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the summed loss of a batch, float32, with its gradients.

        Args:
            module: The trained module, perhaps wrapped.
            batch: ``input_ids``, ``labels``, if needed ``attention_mask`` or ``position_ids``, and perhaps a cached teacher's tensors.
        """
        settings = self._settings
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        chosen_BL = predicting(batch["labels"])
        targets_N = batch["labels"][:, 1:][chosen_BL[:, :-1]]
        layers = settings.distill_hidden > 0
        last, hidden = self._student(module, inputs, layers=layers)
        taught, taught_hidden = self._teach(inputs, layers=layers)
        taught_ND = taught[chosen_BL] if taught is not None else None
        share, temperature = settings.distill, settings.temperature

        def loss_of(part_nD: Tensor, piece: slice) -> Tensor:
            logits_nV = self._student.logits(part_nD)
            found = logits_nV.new_zeros(())
            if share < 1.0:
                found = found + (1.0 - share) * F.cross_entropy(logits_nV, targets_N[piece], reduction="sum")
            if share > 0.0 and taught_ND is not None and self._teacher is not None:
                with torch.no_grad():
                    taught_nV = self._teacher.logits(taught_ND[piece])
                found = found + share * divergence(logits_nV, taught_nV, temperature)
            elif share > 0.0:
                top, tokens = batch[TEACHER_LOG_P][piece], batch[TEACHER_TOKENS][piece].long()
                found = found + share * divergence_of_top(logits_nV, top, tokens, temperature)
            return found

        rows = max(1, _PIECE_VALUES["cpu" if last.device.type == "cpu" else "cuda"] // self._student.vocabulary)
        loss = in_pieces(last[chosen_BL], loss_of, rows)
        if layers:
            loss = loss + settings.distill_hidden * self._distance(hidden, taught_hidden, chosen_BL)
        return loss

    def _teach(self, inputs: Mapping[str, Tensor], *, layers: bool) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        if self._teacher is None or self._teacher_model is None:
            return None, ()
        kind = inputs["input_ids"].device.type
        with torch.no_grad(), torch.autocast(kind, dtype=self._compute, enabled=self._compute != torch.float32):
            return self._teacher(self._teacher_model, inputs, layers=layers)

    def _distance(self, hidden: Sequence[Tensor], taught: Sequence[Tensor], chosen_BL: Tensor) -> Tensor:
        """Returns the squared distance of hidden states over the teacher's mean square, summed over tokens, averaged over layers."""
        total = hidden[0].new_zeros((), dtype=torch.float32)
        for index, (ours, theirs) in enumerate(layer_pairs(len(hidden), len(taught))):
            target_ND = taught[theirs][chosen_BL].float()
            if self._projections:
                target_ND = target_ND @ self._projections[index].to(target_ND.device, torch.float32)
            scale = target_ND.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
            total = total + (hidden[ours][chosen_BL].float() - target_ND).square().mean(-1).sum() / scale
        return total / len(hidden)


def layer_pairs(ours: int, theirs: int) -> list[tuple[int, int]]:
    """Returns for each layer of the student the teacher's layer at the same relative depth; the last layers form a pair.

    >>> layer_pairs(3, 6)
    [(0, 1), (1, 3), (2, 5)]
    """
    return [(index, (index + 1) * theirs // ours - 1) if theirs >= ours else (index, index * theirs // ours) for index in range(ours)]


def _width_of(model: PreTrainedModel) -> int:
    return cast(Tensor, model.get_input_embeddings().weight).shape[-1]


def fit_projections(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], compute: torch.dtype
) -> tuple[Tensor, ...]:
    """Returns maps of the teacher's hidden states to the student's width, or none if the widths are equal.

    The map of each pair of layers is the ridge regression of the untrained student's hidden states on the teacher's, over some batches, in
    float64. It is not trained, because a trained map could adapt the target to the student.

    Args:
        student: The student before training.
        teacher: The teacher in evaluation mode.
        batches: Batches as for :class:`Distillation`; all predicting positions are used.
        compute: Dtype of matrix products.

    Returns:
        One map for each pair of :func:`layer_pairs`, float32 (teacher's D, student's D).
    """
    if _width_of(student) == _width_of(teacher):
        return ()
    readouts = (Readout(student, compute), Readout(teacher, compute))
    moments: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "position_ids")}
        chosen_BL = predicting(batch["labels"])
        with evaluating(student):
            _, ours = readouts[0](student, inputs, layers=True)
            _, theirs = readouts[1](teacher, inputs, layers=True)
        for index, (one, other) in enumerate(layer_pairs(len(ours), len(theirs))):
            wanted_ND, given_ND = ours[one][chosen_BL].double(), theirs[other][chosen_BL].double()
            gram, right = given_ND.T @ given_ND, given_ND.T @ wanted_ND
            if index < len(moments):
                moments[index] = (moments[index][0] + gram, moments[index][1] + right)
            else:
                moments.append((gram, right))
    return tuple(_solve(gram, right) for gram, right in moments)


def _solve(gram_DD: Tensor, right_DE: Tensor) -> Tensor:
    ridge = _RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    return torch.linalg.solve(gram_DD + ridge, right_DE).float()
