"""PC-LoRA: the dense weights fade out while two thin matrices learn to stand for them (arXiv 2406.09117).

A layer gives ``lambda(t) W x + B A x + c``, and lambda falls from 1 to 0 over the first part of the training; then W is not needed any
more. The loss is ``a * task + (1 - a) * features``, the second the squared distance between the hidden states of every layer and those of
the original model, which is the same weights at lambda = 1 without factors: there is one copy of them in memory.

With a warm start ``B0 A0, c0`` from a decomposition what fades is the rest, ``lambda(t) (W x - B0 A0 x - c0)``, so that the training
begins at the original model and ends, where nothing is learnt, at the decomposition. A start of its own has ``B0 A0 = 0``, the paper's
form. Hidden states are compared relative to the mean square of the original's, layer by layer; the paper does not say how it weighs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, get_scheduler

from regraft.errors import TrainingError
from regraft.models.encoders import pooled
from regraft.models.precision import float32_on_cpu
from regraft.models.trainable import only_these_train
from regraft.numerics.truncation import Factors
from regraft.progress import Say, say_nothing

FadeCurve = Literal["linear", "sine", "cosine", "step"]
STEPS_OF_STEP = 5
_TINY = 1e-12


def fading(schedule: FadeCurve, done: float) -> float:
    """Returns lambda: 1 at the start, 0 from ``done = 1`` on, exactly.

    Args:
        schedule: Shape of the fall between these.
        done: Share of the fading that is over, from 0.

    >>> fading("linear", 0.25), fading("cosine", 0.5), fading("step", 0.5), fading("sine", 1.0)
    (0.75, 0.5, 0.6, 0.0)
    """
    if done <= 0.0:
        return 1.0
    if done >= 1.0:
        return 0.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "sine":
        return 1.0 - math.sin(0.5 * math.pi * done)
    if schedule == "cosine":
        return round(0.5 + 0.5 * math.cos(math.pi * done), 15)
    return round(1.0 - math.floor(done * STEPS_OF_STEP) / STEPS_OF_STEP, 15)


@dataclass(frozen=True)
class FadeSettings:
    """Settings of training with fading weights.

    Attributes:
        steps: Number of optimizer steps.
        lr: Peak learning rate; it falls to zero as a cosine.
        batch: Windows of a step.
        schedule: Shape of lambda's fall.
        fade: Share of the steps after which lambda is 0.
        task_weight: Weight of the language-modelling loss; the feature loss has 1 minus this weight.
    """

    steps: int = 200
    lr: float = 1e-3
    batch: int = 8
    schedule: FadeCurve = "cosine"
    fade: float = 0.7
    task_weight: float = 0.2


@dataclass
class Fade:
    """State that all fading layers of a model share.

    Attributes:
        value: lambda.
        teaching: Whether layers compute the original outputs.
    """

    value: float = 1.0
    teaching: bool = False


class FadingLinear(nn.Module):
    """A linear layer whose weight fades while its factors learn.

    Args:
        base: The layer, which is frozen.
        start: Factors to start from, with what they add to the layer's own bias.
        fade: State of the fading, shared by all layers.
        transposed: Whether the weight is stored (in, out).
        random: Start from ``B = 0`` and a random A instead.
        generator: Generator for the random values.
    """

    def __init__(self, base: nn.Module, start: Factors, fade: Fade, *, transposed: bool, random: bool, generator: torch.Generator) -> None:
        super().__init__()
        weight = base.get_parameter("weight")
        self.weight_OI = (weight.T if transposed else weight).detach()
        own = base._parameters.get("bias")
        outputs = self.weight_OI.shape[0]
        self.own_bias = torch.zeros(outputs) if own is None else own.detach().float()
        left, right = start.left_OR.float().clone(), start.right_RI.float().clone()
        added = torch.zeros(outputs) if start.bias_O is None else start.bias_O.float().clone()
        if random:
            left, added = torch.zeros_like(left), torch.zeros_like(added)
            right = torch.randn(right.shape, generator=generator) / math.sqrt(right.shape[1])
        self.first = (left.clone(), right.clone(), added.clone())
        self.expand, self.reduce, self.added = nn.Parameter(left), nn.Parameter(right), nn.Parameter(added)
        self.fade = fade

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., out) for inputs (..., in)."""
        wide = self.weight_OI.to(x.dtype)
        if self.fade.teaching:
            return functional.linear(x, wide, self.own_bias.to(x.dtype))
        y = functional.linear(functional.linear(x, self.reduce), self.expand, self.own_bias + self.added)
        if self.fade.value > 0.0:
            left, right, added = self.first
            rest = functional.linear(x, wide) - functional.linear(functional.linear(x, right), left, added)
            y = y + self.fade.value * rest
        return y

    def factors(self) -> Factors:
        """Returns what was learnt."""
        return Factors(self.expand.detach(), self.reduce.detach(), self.added.detach())


def fade_out(
    model: PreTrainedModel,
    starts: Mapping[str, Factors],
    windows_NT: Tensor,
    settings: FadeSettings,
    *,
    transposed: bool = False,
    random: bool = False,
    seed: int = 0,
    say: Say = say_nothing,
) -> dict[str, Factors]:
    """Trains the factors of a causal language model's layers while their weights fade; the model itself is left as it is.

    Args:
        model: The model, in evaluation mode.
        starts: Factors to start from, by name of the layer; their ranks are those that are trained.
        windows_NT: Training tokens, int64 (windows, tokens).
        settings: Steps, schedule and weights of the losses.
        transposed: Whether weights are stored (in, out).
        random: Start from ``B = 0`` and a random A instead of the factors.
        seed: Seed for the order of the windows and for random values.
        say: Called with a line of progress at intervals.

    Returns:
        The trained factors by name of the layer; with them, layers compute what they did at lambda = 0.

    Raises:
        TrainingError: The loss is not finite.
    """

    def loss(fade: Fade, generator: torch.Generator) -> Tensor:
        ids_BT = windows_NT[torch.randint(len(windows_NT), (settings.batch,), generator=generator)].to(model.device)
        return fading_loss(model, fade, ids_BT, settings.task_weight)

    return fade_by(model, starts, loss, settings, transposed=transposed, random=random, seed=seed, say=say)


def fade_by(
    model: PreTrainedModel,
    starts: Mapping[str, Factors],
    loss_of: Callable[[Fade, torch.Generator], Tensor],
    settings: FadeSettings,
    *,
    transposed: bool = False,
    random: bool = False,
    seed: int = 0,
    say: Say = say_nothing,
) -> dict[str, Factors]:
    """Trains the factors of any model's layers by a loss; see :func:`fade_out`.

    Args:
        model: In evaluation mode.
        starts: Factors to start from, by name of the layer.
        loss_of: Returns the loss of one step, of a batch that it draws with the generator.
        settings: Steps and schedule.
        transposed: Whether weights are stored (in, out).
        random: Start from ``B = 0`` and a random A instead of the factors.
        seed: Seed of the generator and of random values.
        say: Called with a line of progress at intervals.

    Raises:
        TrainingError: The loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    fade = Fade()
    layers = {
        name: FadingLinear(model.get_submodule(name), start, fade, transposed=transposed, random=random, generator=generator)
        for name, start in starts.items()
    }
    trained = [parameter for layer in layers.values() for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=settings.steps)
    with float32_on_cpu(model), only_these_train(model, ()), _in_place(model, layers), torch.enable_grad():
        for step in range(settings.steps):
            fade.value = fading(settings.schedule, step / max(1.0, settings.fade * settings.steps))
            loss = loss_of(fade, generator)
            if not bool(torch.isfinite(loss)):
                raise TrainingError(f"the loss is not finite at step {step + 1} of {settings.steps}; lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            rates.step()
            if step % max(1, settings.steps // 20) == 0:
                say(f"fading, step {step + 1} of {settings.steps}: lambda {fade.value:.2f}, loss {float(loss.detach()):.4f}")
    return {name: layer.factors() for name, layer in layers.items()}


def fading_loss(model: PreTrainedModel, fade: Fade, ids_BT: Tensor, task_weight: float) -> Tensor:
    """Returns ``a * task + (1 - a) * features`` of a model with fading layers.

    Args:
        model: The model with fading layers in place.
        fade: State of these layers.
        ids_BT: Tokens, int64 (batch, tokens).
        task_weight: The weight ``a``.
    """
    fade.teaching = True
    try:
        with torch.no_grad():
            taught = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
    finally:
        fade.teaching = False
    found = model(input_ids=ids_BT, labels=ids_BT, use_cache=False, output_hidden_states=True)
    pairs = list(zip(found.hidden_states[1:], taught[1:], strict=True))  # the first is the embedding, which is the same
    distances = [(ours - theirs).float().square().mean() / theirs.float().square().mean().clamp_min(_TINY) for ours, theirs in pairs]
    return task_weight * found.loss + (1.0 - task_weight) * torch.stack(distances).mean()


def encoder_fading_loss(model: PreTrainedModel, fade: Fade, batch: Mapping[str, Tensor], task_weight: float) -> Tensor:
    """Returns ``a * task + (1 - a) * features`` of an encoder with fading layers; padding counts nothing.

    The task is what sentence vectors are for: the squared distance between the cosine similarities of all pairs of texts in the batch and
    the original's, which needs no labels.

    Args:
        model: The encoder with fading layers in place.
        fade: State of these layers.
        batch: ``input_ids`` and ``attention_mask``, (batch, tokens), and what else the encoder takes.
        task_weight: The weight ``a``.
    """
    fade.teaching = True
    try:
        with torch.no_grad():
            taught = model(**batch, output_hidden_states=True).hidden_states
    finally:
        fade.teaching = False
    found = model(**batch, output_hidden_states=True).hidden_states
    here_BT = batch["attention_mask"].bool()
    pairs = [(ours[here_BT].float(), theirs[here_BT].float()) for ours, theirs in zip(found[1:], taught[1:], strict=True)]
    distances = [(ours - theirs).square().mean() / theirs.square().mean().clamp_min(_TINY) for ours, theirs in pairs]
    ours_BD, theirs_BD = (pooled(hidden[-1].float(), batch["attention_mask"]) for hidden in (found, taught))
    task = (ours_BD @ ours_BD.T - theirs_BD @ theirs_BD.T).square().mean()
    return task_weight * task + (1.0 - task_weight) * torch.stack(distances).mean()


@contextmanager
def _in_place(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts layers into the place of others, and these back."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
        yield
    finally:
        for name, layer in before.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
