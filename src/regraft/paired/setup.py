"""Common setup of all measurements in a rank search: the frozen model, the batches, the held-out rows, and the target.

Differences between rank vectors are far smaller than differences between draws of data and initial values: in 867 scores that the authors
of RankAdaptor (arXiv 2406.15734) published, each from a new draw, the ranks explain at most 2 % of the variance. If only the ranks differ
between two measurements, the difference of the losses is the effect of the ranks.

Legend of shapes: K adapters in one pass, B rows of a batch, T tokens, V vocabulary, D residual channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.adapters import ADAPTERS
from regraft.adapters.seeding import isolated
from regraft.data.instructions import IGNORED
from regraft.data.text import Corpus
from regraft.data.tokens import window_tokens
from regraft.errors import InputError, did_you_mean
from regraft.models.view import ModelView, fingerprint
from regraft.paired.prefix import Batch, KeptTensors, Prefix
from regraft.settings import TRAINING_TOKENS, RecoverSettings
from regraft.training.batches import (
    Ordered,
    collate,
    digest,
    is_blind_to_neighbours,
    make_examples,
    padding_token,
    record_format,
    spread,
)
from regraft.training.distill import Teacher, check_vocabulary
from regraft.training.losses import divergence, predicted_tokens, predicting
from regraft.training.optimizer import rate_shape
from regraft.training.precision import compute_dtype, trainable_weights

CACHE_BYTES = 1 << 28
"""Size of the cache for hidden states and teacher logits between passes; tensors that do not fit are computed again."""


@final
class PairedRows:
    """Training rows of a recovery for every seed, and its held-out rows.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training data.
        held_out: Held-out data.
        settings: Settings of the recovery, with the length of a window and the packing that the model allows.

    Attributes:
        held_out: Batches of the held-out rows.
        held_out_count: Number of held-out rows.
        held_out_tokens: Number of predicted tokens in them.
        held_out_digest: Hash of the held-out rows.

    Raises:
        DataError: The held-out data have no token to predict.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train: Corpus, held_out: Corpus, settings: RecoverSettings) -> None:
        assert settings.seq_len is not None
        self._tokenizer, self._train, self._settings, self._seq_len = tokenizer, train, settings, settings.seq_len
        self._padding = padding_token(tokenizer)
        self._ordered: tuple[int, Ordered] | None = None
        wanted, size = settings.held_out_windows, settings.batch
        form = dataclasses.replace(record_format(settings), packing=False)
        rows = spread(make_examples(held_out, tokenizer, self._seq_len, wanted=wanted, seed=0, records=form), wanted)
        self.held_out = [collate(rows[start : start + size], self._padding) for start in range(0, len(rows), size)]
        self.held_out_count = len(rows)
        self.held_out_tokens = sum(predicted_tokens(batch["labels"]) for batch in self.held_out)
        self.held_out_digest = digest(rows)

    def of(self, seed: int) -> Ordered:
        """Returns the training rows of a seed, in their order.

        Raises:
            DataError: The rows are fewer than one batch.
        """
        if self._ordered is None or self._ordered[0] != seed:
            settings = self._settings
            wanted = settings.steps * settings.accumulate * settings.batch
            examples = make_examples(self._train, self._tokenizer, self._seq_len, wanted=wanted, seed=seed, records=record_format(settings))
            self._ordered = seed, Ordered(examples, settings, seed, self._train.name)
        return self._ordered[1]

    def batches(self, seed: int, step: int) -> list[Batch]:
        """Returns the batches of one optimizer step, one for each forward pass."""
        rows, size = self.of(seed), self._settings.batch
        start = step * self._settings.accumulate * size
        starts = range(start, start + self._settings.accumulate * size, size)
        return [collate([rows[index] for index in range(first, first + size)], self._padding) for first in starts]


@final
class PairedSetup:
    """A frozen model with the batches of a recovery.

    Rows, their order, the training loss and the held-out rows are those of a recovery (:func:`regraft.training.recover.recover`) with
    the same settings and seed. There is no early stopping: candidates are compared after equal numbers of steps.

    Args:
        model: A model of a known family, on the device for training.
        tokenizer: Tokenizer of the model.
        train: Training data of the recovery.
        held_out: Held-out data, disjoint from the training data.
        modules: Names of the adapted modules of a rank space.
        settings: Settings of a full recovery.
        teacher: The dense model, on the same device. The share ``settings.distill`` of the training loss is the divergence from it.
        objective: Measure on the held-out rows: the loss of the text, or the divergence from the teacher.
        cache_bytes: Size of the cache; see :data:`CACHE_BYTES`.

    Raises:
        InputError: The model lacks a module, a window is longer than the model's context, a divergence is requested without a teacher, or
            the settings distil hidden states, which paired measurements do not support.
        ModelError: The teacher has another vocabulary.
        DataError: The held-out data have no token to predict.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Corpus,
        held_out: Corpus,
        modules: Sequence[str],
        settings: RecoverSettings,
        *,
        teacher: Teacher | None = None,
        objective: Literal["loss", "divergence"] = "loss",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        seq_len = window_tokens(settings.seq_len, TRAINING_TOKENS, model.config, "seq_len")
        packing = settings.packing and bool(train.records) and is_blind_to_neighbours(model)
        _check_target(model, tokenizer, teacher, objective, settings)
        self.model = model
        self.view = ModelView(model)
        self.sites = _sites(modules, self.view)
        self.settings = settings.model_copy(update={"seq_len": seq_len, "packing": packing})
        self.device = model.device
        self.fingerprint = fingerprint(model)
        defaults = ADAPTERS.get(settings.adapter).defaults
        self.lr = settings.lr if settings.lr is not None else defaults.lr
        self.dropout = settings.dropout if settings.dropout is not None else defaults.dropout
        self.rows = PairedRows(tokenizer, train, held_out, self.settings)
        self._compute = compute_dtype(settings.precision, self.device)
        self._kept = KeptTensors(cache_bytes)
        self.prefix = Prefix(self.view, self.sites, self._kept)
        self._teacher, self._objective = teacher, objective
        self._first_loss: float | None = None

    def key(self, seed: int, *parts: object) -> str:
        """Returns a hash of all inputs that decide a training on this setup, as the key of its stored state."""
        values = {
            "parts": parts,
            "seed": seed,
            "model": self.fingerprint,
            "settings": self.settings.decisive(varied=("rank",)),
            "data": digest(self.rows.of(seed).examples),
            "held-out data": self.rows.held_out_digest,
            "teacher": self._teacher.fingerprint if self._teacher is not None else None,
            "objective": self._objective,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]

    def cost(self, steps: int, looks: int, passes: int = 1) -> float:
        """Returns the cost of steps and evaluations, in units of one full recovery: see :func:`cost_of`."""
        return cost_of(self.settings, self.rows.held_out_count, steps, looks, passes)

    def first_loss(self) -> float:
        """Returns the held-out loss of the model without adapters, in nats a token."""
        if self._first_loss is None:
            self._first_loss = float(self.held_out_loss(1))
        return self._first_loss

    def learning_rate(self, step: int, steps: int | None = None) -> float:
        """Returns the learning rate at a step as a share of the peak.

        Args:
            step: Index of the step, from 0.
            steps: Number of steps of the schedule; None for that of a full recovery.
        """
        steps = steps or self.settings.steps
        warm = round(self.settings.warmup * steps)
        return rate_shape(self.settings.schedule, warm, steps)(step)

    @contextmanager
    def ready(self, seed: int) -> Iterator[None]:
        """Freezes the model inside the block, in evaluation mode and in dtypes that adapters can train with, and isolates random draws.

        The model's own dropout is off, unlike in a recovery, because each adapter of a pass would get a different draw. The dropout of the
        adapters' inputs follows the settings.
        """
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        was_training = self.model.training
        try:
            self.model.eval().requires_grad_(False)
            with trainable_weights(self.model, self._compute), isolated(seed):
                yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            self.model.train(was_training)

    def train_step(self, seed: int, step: int, copies: int) -> Tensor:
        """Computes the gradients of K adapters for one optimizer step, and returns their mean losses in nats a token.

        Args:
            seed: Seed of the order of the rows.
            step: Index of the step, from 0.
            copies: Number of adapters, K.

        Returns:
            (K,) float64 on the CPU, in nats.
        """
        batches = self.rows.batches(seed, step)
        tokens = sum(predicted_tokens(batch["labels"]) for batch in batches)
        share = self.settings.distill if self._teacher is not None else 0.0
        total_K = torch.zeros(copies, dtype=torch.float64)
        for part, batch in enumerate(batches):
            key = ("train", seed, step, part)
            nats_K = self._summed(batch, key, copies, share, self.settings.temperature)
            (nats_K.sum() / tokens).backward()
            total_K += nats_K.detach().double().cpu()
        return total_K / tokens

    @torch.no_grad()
    def held_out_loss(self, copies: int) -> Tensor:
        """Returns the mean held-out loss of K adapters, or their divergence from the teacher, (K,) float64 on the CPU, in nats a token."""
        share = 1.0 if self._objective == "divergence" else 0.0
        total_K = torch.zeros(copies, dtype=torch.float64)
        for index, batch in enumerate(self.rows.held_out):
            total_K += self._summed(batch, ("held-out", index), copies, share, 1.0).double().cpu()
        return total_K / self.rows.held_out_tokens

    def _summed(self, batch: Batch, key: Hashable, copies: int, share: float, temperature: float) -> Tensor:
        """Returns the losses of K repetitions of a batch, summed over its tokens, (K,) float32: mixed from text loss and divergence."""
        logits = self._logits(batch, key, copies)
        total_K = torch.zeros(copies, device=self.device)
        if share < 1.0:
            total_K = total_K + (1.0 - share) * summed_nats(logits, batch["labels"], copies)
        if share > 0.0:
            counts_BT = predicting(batch["labels"]).to(self.device)
            expected_NV = self._kept.get(("teacher", key), lambda: self._teacher_logits(batch)[counts_BT].float())
            students = logits.reshape(copies, *counts_BT.shape, -1)
            found = [divergence(student[counts_BT].float(), expected_NV, temperature) for student in students]
            total_K = total_K + share * torch.stack(found)
        return total_K

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Tensor:
        assert self._teacher is not None
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._compute == torch.bfloat16):
            return self._teacher.present()(**inputs, use_cache=False).logits

    def _logits(self, batch: Batch, key: Hashable, copies: int) -> Tensor:
        """Returns the logits of K repetitions of a batch, (K * B, T, V)."""
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._compute == torch.bfloat16):
            return self.prefix.logits(self.model, inputs, key, copies)


def summed_nats(logits: Tensor, labels_BT: Tensor, copies: int) -> Tensor:
    """Returns the summed negative log-likelihood of the predicted tokens of each repetition of a batch, (K,) float32 in nats.

    Args:
        logits: (K * B, T, V).
        labels_BT: int64, -100 for tokens that are not predicted; the first token of a row is never predicted.
        copies: Number of repetitions, K.
    """
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).to(logits.device)
    targets = targets_BT.reshape(-1).repeat(copies)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="none")
    return nats.reshape(copies, -1).sum(1)


def cost_of(settings: RecoverSettings, held_out_rows: int, steps: int, looks: int, passes: int = 1) -> float:
    """Returns the cost of steps and evaluations, in units of one full recovery. A forward pass of a row costs 1, a backward pass 2.

    Args:
        settings: Settings of a full recovery. It evaluates every ``eval_every`` steps and at the end; the evaluation before the first step
            is common to all candidates and not counted.
        held_out_rows: Number of rows of one evaluation.
        steps: Number of optimizer steps.
        looks: Number of evaluations on the held-out rows.
        passes: Number of forward passes of every batch of a step.
    """
    row_passes = 3.0 * settings.batch * settings.accumulate
    full = settings.steps * row_passes + -(-settings.steps // settings.eval_every) * held_out_rows
    return (steps * passes * row_passes + looks * held_out_rows) / full


def _check_target(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher: Teacher | None, objective: str, settings: RecoverSettings
) -> None:
    if settings.load_in_4bit:
        raise InputError("`load_in_4bit` is not known while ranks are compared; leave it out there, the ranks serve both")
    if teacher is not None:
        check_vocabulary(teacher, model, tokenizer)
        if settings.distill_hidden > 0.0:
            raise InputError(f"`distill_hidden={settings.distill_hidden}` is not known while ranks are compared; leave it at 0")
    elif objective == "divergence":
        raise InputError("the divergence from a teacher is measured with a teacher; give one with `teacher`")


def _sites(modules: Iterable[str], view: ModelView) -> dict[str, nn.Module]:
    known = view.adapted_modules()
    for name in modules:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(f"the rank space names '{name}', which this model does not have{hint}; make the space for this model")
    return {name: known[name] for name in modules}
