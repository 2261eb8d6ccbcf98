"""The training loop of seedling: AdamW, cosine, checkpoints that a killed run goes on from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from seedling.batches import PackedWindows
from seedling.tokenizer import SPECIAL_TOKENS

VALIDATION_WINDOWS = 32


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights, besides the corpus.

    The batch is small and the learning rate high, since the text is short: what counts is how much each token teaches. Until the
    decay the windows are short, which costs less for each token; the model learns to use its whole window during the decay.
    """

    hidden: int = 256
    ffn: int = 704
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    vocabulary_tokens: int = 4096
    window_tokens: int = 512
    short_window_tokens: int = 256
    batch_tokens: int = 2048
    steps: int = 3600
    warmup_steps: int = 150
    decay_steps: int = 1200
    peak_lr: float = 2e-3
    final_lr_share: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float = 1.0
    seed: int = 20
    bf16_autocast: bool = True


@dataclass(frozen=True)
class LogRow:
    """One line of the training log; losses in nats per token, time in seconds of training."""

    step: int
    tokens: int
    lr: float
    train_loss_nats: float
    held_out_loss_nats: float | None
    seconds: float


def model_config(settings: Settings) -> LlamaConfig:
    """Returns the configuration of the model."""
    bos, eos, pad = range(len(SPECIAL_TOKENS))
    return LlamaConfig(
        vocab_size=settings.vocabulary_tokens,
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.window_tokens,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def initial_model(settings: Settings) -> LlamaForCausalLM:
    """Returns the untrained model in fp32, drawn from the seed.

    Normal with 0.02, and 0.02 / sqrt(2 layers) where a residual is written, as in GPT-2 (Radford et al. 2019, section 2.3).
    """
    model = LlamaForCausalLM(model_config(settings))
    model.set_attn_implementation("eager")  # on a CPU and for heads this narrow, faster than the fused one
    generator = torch.Generator().manual_seed(settings.seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * settings.layers) if writes else 0.02
            with torch.no_grad():
                parameter.normal_(0.0, std, generator=generator)
    return model


def learning_rate(step: int, settings: Settings) -> float:
    """Returns the learning rate of a step (counted from 0): linear warm-up, level, and a cosine to its final share.

    The level part makes it possible to decide on the number of steps while the run is on its way.
    """
    if step < settings.warmup_steps:
        return settings.peak_lr * (step + 1) / settings.warmup_steps
    progress = max(0, step - decay_start(settings)) / settings.decay_steps
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.peak_lr * (settings.final_lr_share + (1.0 - settings.final_lr_share) * cosine)


def decay_start(settings: Settings) -> int:
    """Returns the step from which the learning rate falls and the windows are long."""
    return settings.steps - settings.decay_steps


class Batches:
    """The batch of each step: short windows up to the decay, whole ones from there.

    Args:
        documents: One array a document, (n_tokens,) uint16, with BOS and EOS.
        settings: Sizes, steps and seed.
    """

    def __init__(self, documents: Sequence[NDArray[np.uint16]], settings: Settings) -> None:
        self._from = decay_start(settings)
        self._short = PackedWindows(
            documents, settings.short_window_tokens, settings.batch_tokens // settings.short_window_tokens, settings.seed
        )
        self._long = PackedWindows(documents, settings.window_tokens, settings.batch_tokens // settings.window_tokens, settings.seed + 1)

    def batch(self, step: int) -> Tensor:
        """Returns the batch of a step (counted from 0): (B, T) int64 with B * T tokens in every step."""
        windows = self._short.batch(step) if step < self._from else self._long.batch(step - self._from)
        return torch.from_numpy(windows)


def next_token_loss(model: LlamaForCausalLM, ids_BT: Tensor, bf16_autocast: bool) -> Tensor:
    """Returns the mean loss of predicting each token of a window from those before it, in nats; a scalar, fp32."""
    # Each weight is cast once a pass anyway; the cache of casts would be shared between the worker threads.
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_autocast, cache_enabled=False):
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten())


class Trainer:
    """The state of a run and how it moves on.

    A batch is spread over worker threads part by part, each part computed on one thread. A worker takes the next part when it is
    done with its own, so that a core that is busy elsewhere slows a step down by no more than its share. The gradients are
    summed in the order of the parts, so that the bits do not depend on the number of workers.

    Args:
        settings: What decides the weights.
        batches: The training batches.
        workers: Threads that compute at once.
    """

    def __init__(self, settings: Settings, batches: Batches, workers: int = 2) -> None:
        self.settings = settings
        self.workers = workers
        self.model = initial_model(settings)
        self.step = 0
        self.seconds = 0.0
        self.log: list[LogRow] = []
        self._batches = batches
        self._parameters = list(self.model.parameters())
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self._parameters if p.ndim == 2], "weight_decay": settings.weight_decay},
                {"params": [p for p in self._parameters if p.ndim != 2], "weight_decay": 0.0},
            ],
            lr=settings.peak_lr,
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )

    def advance(self) -> float:
        """Takes one step and returns its training loss in nats per token.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        started = time.perf_counter()
        ids_BT = self._batches.batch(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        rows = max(1, self.settings.window_tokens // ids_BT.shape[1])  # about the same work for each part
        parts = list(self._pool.map(self._loss_and_gradients, ids_BT.split(rows)))
        loss = sum(part for part, _ in parts) / len(parts)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: lower peak_lr and start anew")
        for index, parameter in enumerate(self._parameters):
            gradient = parts[0][1][index]
            for _, gradients in parts[1:]:
                gradient += gradients[index]
            parameter.grad = gradient.div_(len(parts))
        torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - started
        return loss

    def held_out_loss(self, ids_BT: Tensor) -> float:
        """Returns the mean loss over windows that the run never trains on, in nats per token."""
        return sum(self._pool.map(self._loss_alone, ids_BT.split(1))) / len(ids_BT)

    def _loss_and_gradients(self, ids_BT: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = next_token_loss(self.model, ids_BT, self.settings.bf16_autocast)
        return loss.item(), torch.autograd.grad(loss, self._parameters)

    def _loss_alone(self, ids_BT: Tensor) -> float:
        with torch.no_grad():
            return next_token_loss(self.model, ids_BT, self.settings.bf16_autocast).item()

    def save(self, file: Path) -> None:
        """Writes the whole state to one safetensors file, aside first and then renamed."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self._optimizer.state:
                    tensors[f"{moment}.{name}"] = self._optimizer.state[parameter][moment]
        metadata = {
            "settings": json.dumps(asdict(self.settings)),
            "step": str(self.step),
            "seconds": repr(self.seconds),
            "log": json.dumps([asdict(row) for row in self.log]),
        }
        aside = file.with_suffix(".partial")
        save_file(tensors, aside, metadata=metadata)
        os.replace(aside, file)

    def load(self, file: Path) -> None:
        """Takes up the state that :meth:`save` wrote.

        Another number of steps is allowed as long as neither run has come to its decay: up to there they are the same run.

        Raises:
            ValueError: It was written under settings that would have led elsewhere.
        """
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
            written = Settings(**json.loads(metadata["settings"]))
            still_level = int(metadata["step"]) <= min(decay_start(written), decay_start(self.settings))
            comparable = replace(written, steps=self.settings.steps) if still_level else written
            if comparable != self.settings:
                raise ValueError(f"{file.name} was written under other settings: remove it to start anew")
            self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
            self.log = [LogRow(**row) for row in json.loads(metadata["log"])]
            for name, parameter in self.model.named_parameters():
                with torch.no_grad():
                    parameter.copy_(stored.get_tensor(f"model.{name}"))
                if self.step:
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.step)),
                        "exp_avg": stored.get_tensor(f"exp_avg.{name}"),
                        "exp_avg_sq": stored.get_tensor(f"exp_avg_sq.{name}"),
                    }
