"""Importance of AdaLoRA's singular triplets (arXiv 2303.10512) after a short training: the input of the allocator ``adalora``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import AdaLoraConfig, TaskType, get_peft_model
from peft.tuners.adalora import RankAllocator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.adapters.seeding import isolated
from regraft.compat import triplet_score
from regraft.data.text import Corpus
from regraft.data.tokens import window_tokens
from regraft.errors import TrainingError
from regraft.plans import ALPHA_PER_RANK
from regraft.settings import TRAINING_TOKENS, RecoverSettings
from regraft.training.batches import Ordered, collate, make_examples, padding_token

_LR = 1e-3


def triplet_importance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Corpus,
    modules: Sequence[str],
    ranks: Sequence[int],
    settings: RecoverSettings,
    *,
    steps: int,
    seed: int,
) -> dict[str, tuple[float, ...]]:
    """Trains an AdaLoRA adapter of the largest rank for some steps and sums the importance of its triplets, largest first.

    The importance is computed by PEFT (equations 8 to 10 of the paper): smoothed sensitivity times uncertainty, of the singular value plus
    the averages over its two vectors. No triplet is pruned during the training.

    Args:
        model: The model; it is restored at the end.
        tokenizer: Tokenizer of the model.
        train: Training data of the recovery.
        modules: Full names of the adapted modules.
        ranks: Rank choices, ascending.
        settings: Settings of the recovery: batch, window, learning rate.
        steps: Number of training steps.
        seed: Seed of initial values, batches and dropout; the global generators are not changed.

    Returns:
        Module name to one sum for each rank; if a matrix has fewer triplets than the rank, the sum is over all of them.

    Raises:
        DataError: The text is shorter than one batch.
        TrainingError: The loss is not finite.
    """
    seq_len = window_tokens(settings.seq_len, TRAINING_TOKENS, model.config, "seq_len")
    short = settings.model_copy(update={"steps": steps, "seq_len": seq_len, "accumulate": 1})
    examples = make_examples(train, tokenizer, seq_len, wanted=steps * settings.batch, seed=seed)
    rows = Ordered(examples, short, seed, train.name)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = AdaLoraConfig(
        init_r=max(ranks),
        target_r=min(ranks),
        lora_alpha=int(ALPHA_PER_RANK * max(ranks)),
        tinit=steps,
        tfinal=0,
        total_step=steps + 2,
        target_modules=list(modules),
        task_type=TaskType.CAUSAL_LM,
    )
    with isolated(seed):
        adapted = get_peft_model(model, config)
        try:
            _train(adapted, rows, settings, steps, padding_token(tokenizer))
            allocator = cast(RankAllocator, cast(Any, adapted.base_model).rankallocator)
            scores = {name: _scores(adapted, allocator, name) for name in modules}
        finally:
            cast(Any, adapted.base_model).unload()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)
    return {name: tuple(float(score[:rank].sum()) for rank in ranks) for name, score in scores.items()}


def _train(adapted: Any, rows: Ordered, settings: RecoverSettings, steps: int, padding: int) -> None:
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr if settings.lr is not None else _LR, weight_decay=0.0)
    adapted.train()
    for step in range(steps):
        batch = collate([rows[step * settings.batch + row] for row in range(settings.batch)], padding)
        loss: Tensor = adapted(**{name: tensor.to(adapted.device) for name, tensor in batch.items()}, use_cache=False).loss
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss of AdaLoRA became {float(loss)} at step {step + 1}; lower `lr`, or choose another `method`")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        adapted.base_model.update_and_allocate(step)
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()


def _scores(adapted: Any, allocator: RankAllocator, module: str) -> Tensor:
    """Returns the importances of one module's triplets, largest first, float64 (R,)."""
    parts: Mapping[str, Tensor] = {part: triplet_score(allocator, f"{module}.lora_{part}.default").double() for part in ("A", "B", "E")}
    importance = parts["E"].flatten() + parts["A"].mean(dim=1) + parts["B"].mean(dim=0)
    return importance.sort(descending=True).values.cpu()
