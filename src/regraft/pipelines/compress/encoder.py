"""PC-LoRA for encoders: the dense weights of a sentence encoder fade while two thin matrices learn to stand for them.

Ranks come from a :class:`regraft.plans.RankPlan`, or from a choice of ranks over the prices of Bolaco's decomposition on the inputs of
every layer, which is also the warm start. No labels are read: see :func:`regraft.training.pc_lora.encoder_fading_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.compression import COMPRESSORS, RANK_CHOICES, Decomposed, decompose_one, factor_plan, factor_space
from regraft.compression.gather import GROUPS, Watcher
from regraft.data.text import Corpus
from regraft.data.tokens import context_limit
from regraft.errors import InputError
from regraft.models.encoders import encoder_linears, factored_encoder, save_encoder
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.precision import float32_on_cpu
from regraft.models.view import parameter_count
from regraft.numerics.truncation import Factors
from regraft.pipelines.compress.prepare import plan_from_ranks
from regraft.pipelines.compress.record import card_of, record_of, refuse_short_text
from regraft.plans import FactorPlan, FactorSpace, RankPlan
from regraft.progress import Say
from regraft.settings import CompressSettings
from regraft.surgery.factorize import factor_tensors
from regraft.training.pc_lora import Fade, FadeSettings, encoder_fading_loss, fade_by

LONGEST = 128  # tokens of a text, where the settings name none
_AT_ONCE = 32


@dataclass(frozen=True)
class EncoderOrder:
    """What is asked of the compression of an encoder.

    Attributes:
        settings: Ratio, ranks, layout, and the settings of the fading.
        corpus: Texts like those that the encoder is to work on.
        plan: Ranks of layers by full name; None to choose them.
        target: Folder to write; None to keep the encoder in memory.
        dry_run: Plan only.
        seed: Seed of the order of the texts and of random values.
        command: How this was called, for the folder's record.
        say: Called with a line of progress at intervals.
    """

    settings: CompressSettings
    corpus: Corpus
    plan: RankPlan | None
    target: Path | None
    dry_run: bool
    seed: int
    command: str
    say: Say


@dataclass(frozen=True)
class CompressedEncoder:
    """Result: the plan, the factored encoder (None after a dry run), the ranks that there were, and remarks."""

    plan: FactorPlan
    model: PreTrainedModel | None
    space: FactorSpace | None
    notes: tuple[str, ...]


def compress_encoder(loaded: Loaded, order: EncoderOrder) -> CompressedEncoder:
    """Compresses an encoder by PC-LoRA.

    Raises:
        InputError: The ratio cannot be met, or a setting has no meaning for encoders.
        PlanError: The rank plan names layers that the encoder does not have, or ranks above the full one.
        ModelError: The encoder is factored already.
        TrainingError: The loss is not finite.
    """
    settings, model = order.settings, loaded.model
    _refuse_unknown(settings)
    modules: Mapping[str, nn.Module] = encoder_linears(model)
    rows = _encoded(loaded, order.corpus, settings)
    order.say(f"reading {len(rows)} texts")
    found = _decomposed(model, modules, rows, settings)
    space, plan = _planned(loaded, found, order)
    refuse_short_text(plan, found)
    linear = sum(module.get_parameter("weight").numel() for module in modules.values())
    share = (plan.parameters_before - plan.parameters_after) / linear
    notes = (f"{share:.1%} of the {linear:,} parameters of the encoder's linear layers go",)
    if order.dry_run:
        return CompressedEncoder(plan, None, space, notes)
    by_name = {one.priced.name: one.truncation for one in found}
    starts = {entry.module: by_name[entry.module].at(entry.rank) for entry in plan.factorings}
    learnt = _faded(loaded, starts, rows, order)
    compressed = _built(model, plan, learnt)
    if order.target is not None:
        record = record_of(loaded, plan, settings, seed=order.seed, command=order.command)
        save_encoder(loaded, compressed, order.target, record, card_of(record, dense=False))
    return CompressedEncoder(plan, compressed, space, notes)


def _refuse_unknown(settings: CompressSettings) -> None:
    named: dict[str, bool] = {
        "mix": settings.mix,
        "dense": settings.dense,
        "ranks bayes": settings.ranks == "bayes",
        "prices measured": settings.prices == "measured",
        "memory": settings.memory is not None,
        "test": settings.test is not None,
        "targets": bool(settings.targets),
    }
    for name, given in named.items():
        if given:
            raise InputError(f"{name} is for causal language models, and this is an encoder; leave it out")


def _encoded(loaded: Loaded, corpus: Corpus, settings: CompressSettings) -> list[Tensor]:
    """Returns the tokens of the texts, int64 (tokens,) each, as many as the settings have samples, evenly spaced in the corpus."""
    tokenizer: Any = require_tokenizer(loaded)
    texts = [line.strip() for document in corpus.documents for line in document.splitlines() if line.strip()]
    if not texts:
        raise InputError(f"'{corpus.name}' holds no lines of text; an encoder reads one text from each line")
    step = max(1, len(texts) // settings.samples)
    limit = context_limit(loaded.model.config)
    most = min(settings.seq_len or LONGEST, limit or LONGEST)
    chosen = texts[::step][: settings.samples]
    return [torch.tensor(ids) for ids in tokenizer(chosen, truncation=True, max_length=most).input_ids]


def _decomposed(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], rows: Sequence[Tensor], settings: CompressSettings
) -> list[Decomposed]:
    """Decomposes every layer on the inputs that it has; texts of one length are read together, so that no padding is seen."""
    compressor = COMPRESSORS.get("bolaco")
    lengths: dict[int, list[Tensor]] = {}
    for ids in rows:
        lengths.setdefault(len(ids), []).append(ids)
    batches = [torch.stack(same[first : first + _AT_ONCE]) for same in lengths.values() for first in range(0, len(same), _AT_ONCE)]
    groups = min(GROUPS, len(batches))
    with Watcher(modules, groups, with_gradients=False) as watcher, float32_on_cpu(model), torch.no_grad():
        for number, ids in enumerate(batches):
            model(input_ids=ids.to(model.device))
            watcher.add_inputs(number % groups, number + 1)
    numbers = {name: number for number, name in enumerate(modules)}
    evidence = (watcher.evidence(name, module.get_parameter("weight").detach()) for name, module in modules.items())
    return [
        decompose_one(one, compressor, settings.layout, numbers[one.name], has_bias=modules[one.name]._parameters.get("bias") is not None)
        for one in evidence
    ]


def _planned(loaded: Loaded, found: Sequence[Decomposed], order: EncoderOrder) -> tuple[FactorSpace | None, FactorPlan]:
    settings, count = order.settings, parameter_count(loaded.model)
    if order.plan is not None:
        return None, plan_from_ranks(order.plan, found, loaded.fingerprint, count, settings)
    space = factor_space(
        [one.priced for one in found],
        fingerprint=loaded.fingerprint,
        method="pc_lora",
        unit="share",
        layout=settings.layout,
        parameters=count,
        ratio=settings.ratio,
        align=settings.align if isinstance(settings.align, int) else None,
    )
    choice = "uniform" if settings.ranks == "auto" else settings.ranks
    biases = dict.fromkeys((site.name for site in space.sites), True)
    plan = factor_plan(space, RANK_CHOICES.get(choice)(space), choice, settings.ratio, biases)
    return space, replace(plan, made_with={"settings": settings.decisive() | {"ranks": choice}, "seed": order.seed})


def _faded(loaded: Loaded, starts: Mapping[str, Factors], rows: Sequence[Tensor], order: EncoderOrder) -> dict[str, Factors]:
    """Trains the factors on batches of texts of like length."""
    settings, model = order.settings, loaded.model
    by_length = sorted(rows, key=len)
    tokenizer: Any = require_tokenizer(loaded)
    padding = int(tokenizer.pad_token_id or 0)

    def loss(fade: Fade, generator: torch.Generator) -> Tensor:
        size = min(settings.fade_batch, len(by_length))
        first = int(torch.randint(len(by_length) - size + 1, (1,), generator=generator))
        chosen = by_length[first : first + size]
        ids_BT = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=padding)
        lengths_B1 = torch.tensor([[len(ids)] for ids in chosen])
        batch = {"input_ids": ids_BT, "attention_mask": (torch.arange(ids_BT.shape[1]) < lengths_B1).long()}
        return encoder_fading_loss(model, fade, {name: value.to(model.device) for name, value in batch.items()}, settings.task_weight)

    fading = FadeSettings(
        steps=settings.fade_steps, lr=settings.fade_lr, schedule=settings.fade_schedule, fade=settings.fade_share, batch=settings.fade_batch
    )
    return fade_by(model, starts, loss, fading, random=settings.warm_start == "random", seed=order.seed, say=order.say)


def _built(model: PreTrainedModel, plan: FactorPlan, factors: Mapping[str, Factors]) -> PreTrainedModel:
    tensors: dict[str, Tensor] = {}
    for entry in plan.factorings:
        bias = model.get_submodule(entry.module)._parameters.get("bias")
        made = factor_tensors(factors[entry.module], None if bias is None else bias.detach(), plan.layout, model.dtype)
        tensors |= {f"{entry.module}.{name}": tensor for name, tensor in made.items()}
    return factored_encoder(model, {entry.module: (entry.rank, entry.bias) for entry in plan.factorings}, tensors, plan.layout)
