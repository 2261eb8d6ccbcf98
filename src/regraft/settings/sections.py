"""Sections of settings for loading, pruning, recovery and the search of ranks: once for recipes, the command line and the API."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from regraft.errors import shown
from regraft.plans import RANK_CHOICES, RankPlan, Shape
from regraft.reading import is_whole
from regraft.registry import built_in, known_name, listed
from regraft.settings.base import (
    BY_CONTENT,
    NO_EFFECT,
    RAY,
    STORAGE,
    WORKERS,
    Count,
    Dtype,
    Memory,
    Options,
    Positive,
    Rate,
    Ratio,
    Settings,
    TwoOrMore,
    device_name,
    in_a_list,
    named_alone,
    schedule_name,
    trackers_in,
    type_name,
)

_OF_PARTS = ("block_influence", "angular", "removal")  # built-in criteria that score layers and their parts, not units
_FOR_DEPTH = "does not score heads or channels, but layers and their parts: it is one for `depth`"
_FOR_UNITS = "does not score layers or their parts, but heads and channels: it is one for `criterion`"
_NOT_OF_UNITS: dict[str, str] = dict.fromkeys(_OF_PARTS, _FOR_DEPTH)
_NOT_OF_PARTS = {name: _FOR_UNITS for name in built_in("criterion") if name not in _OF_PARTS}


class _Scoring(Protocol):
    """A criterion, as far as settings look at it."""

    @property
    def scores(self) -> tuple[str, ...]:
        """Kinds of groups that it can score."""
        ...


def _why_not_units(criterion: _Scoring) -> str:
    return _FOR_DEPTH if set(criterion.scores) <= {"layer", "attention", "mlp"} else ""


def _why_not_parts(criterion: _Scoring) -> str:
    return "" if {"layer", "attention", "mlp"} & set(criterion.scores) else _FOR_UNITS


Reduction = Literal["sum", "mean", "max", "product", "last"]
Target = Literal[
    "heads", "ffn", "query_heads", "mixer_heads", "residual", "layers", "attention", "mlp", "vocabulary", "experts", "expert_ffn"
]


class LoadSettings(Settings):
    """Settings for loading a model."""

    aliases: ClassVar[Mapping[str, str]] = {"torch_dtype": "dtype", "device_map": "device"}

    dtype: Annotated[Dtype, BeforeValidator(type_name)] = Field(
        default="auto", description="dtype of the weights; auto: the dtype of the file"
    )
    device: Annotated[str, BeforeValidator(device_name)] = Field(
        default="auto", description="device: cpu, cuda, cuda:N or mps; auto: the first available of cuda, mps and cpu"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code from the model's folder")
    revision: str | None = Field(default=None, description="branch, tag or commit of a model on the hub; default: its main branch")
    token: str | None = Field(
        default=None,
        description="access token of the hub, for gated and private models; default: the one of hf auth login",
        json_schema_extra=NO_EFFECT,
        exclude=True,
        repr=False,
    )
    attn_implementation: str | None = Field(
        default=None, description="attention kernel, as in transformers: eager, sdpa, ...; default: the best available one"
    )
    base: str | None = Field(
        default=None,
        description="where the base of an adapter lies, if not where its files say",
        json_schema_extra=NO_EFFECT,
        exclude=True,
    )


class PruneSettings(Settings):
    """Settings of pruning (LLM-Pruner, arXiv 2305.11627, and later methods)."""

    aliases: ClassVar[Mapping[str, str]] = {"max_length": "seq_len"}

    ratio: Ratio = Field(default=0.2, description="share of ALL parameters to remove, or of bytes or milliseconds (see `budget`)")
    effort: Literal["quick", "default", "thorough"] = Field(
        default="default",
        description="effort of planning; quick: 32 windows, no re-fit to the predictions; thorough: every group is measured at every size",
    )
    criterion: Annotated[str, known_name("criterion", "auto", unfit=_NOT_OF_UNITS, why_unfit=_why_not_units)] = Field(
        default="auto",
        validate_default=False,
        description=f"criterion for scores of units: {listed('criterion', without=_OF_PARTS)}; auto: "
        "surgeon_nats, or surgeon with `memory` and for large models",
    )
    order: Literal["first", "second", "mixed"] = Field(default="first", description="order of the Taylor criterion")
    granularity: Literal["element", "vector"] = Field(
        default="element", description="for criterion taylor, absolute value before (element) or after (vector) summing over a row"
    )
    reduce: Reduction = Field(default="sum", description="reduction that combines the scores of coupled weights")
    shape: Shape = Field(
        default="uniform",
        description="widths of layers; uniform: equal in all layers, loads in stock classes; per-layer: each layer its own, less loss",
    )
    select: Annotated[str, known_name("selector", "auto")] = Field(
        default="auto",
        validate_default=False,
        description=f"method of choosing widths: {listed('selector')}; auto: knapsack, or uniform without text or with `memory`",
    )
    reconstruct: Literal["auto", "divergence", "least_squares", "mean", "none"] = Field(
        default="auto",
        description="re-fit of layers that read pruned channels; divergence: least squares, then a fit to the dense predictions; "
        "auto: divergence, least_squares with `memory` and for large models, none for criteria without text",
    )
    bridge: bool = Field(
        default=False, description="with removed layers, let the layer below each gap take over what it can of them, by its own weights"
    )
    budget: Literal["parameters", "bytes", "milliseconds"] = Field(default="parameters", description="quantity that `ratio` is a share of")
    rounds: Positive = Field(default=1, description="number of pruning steps, with new scores for each")
    layers: str = Field(default=":", description="range of layers to prune, as a Python slice: 1:-1 spares the first and the last")
    targets: Annotated[tuple[Target, ...], BeforeValidator(named_alone)] = Field(
        default=("heads", "ffn"),
        description="parts to prune: heads (KV heads with their query heads), ffn (feed-forward channels), query_heads (equally many in "
        "each KV group), mixer_heads (of Gated DeltaNet and Mamba-2: a key head with its value heads), residual (width of the residual "
        "stream), layers, attention or mlp (in single layers), vocabulary (tokens: alone to a size, or beside others in one budget), "
        "experts (whole ones of mixtures) or expert_ffn (channels of each), by themselves",
    )
    tower: Literal["text"] | None = Field(
        default=None, description="the part of a multimodal checkpoint that is pruned, and saved as a model of its own; default: the model"
    )
    keep_rest: bool = Field(
        default=False, description="with `tower`, save the pruned tower inside the checkpoint, whose other tensors stay as they are"
    )
    experts: Positive | None = Field(
        default=None, description="with `targets=experts`, number of experts to keep in every layer; default: as `ratio` says"
    )
    vocabulary_size: Positive | None = Field(
        default=None, description="with `targets=vocabulary` alone, number of tokens to keep: those that the calibration text uses most"
    )
    keep_tokens: Path | None = Field(
        default=None,
        description="with `targets=vocabulary`, file of the tokens to keep: one a line, or a JSON list of tokens and ids; what they and "
        "every text need is kept too",
    )
    depth: Annotated[str, known_name("criterion", "auto", unfit=_NOT_OF_PARTS, why_unfit=_why_not_parts)] = Field(
        default="auto",
        validate_default=False,
        description="criterion for the removal of layers, attention and mlp: block_influence, angular or removal; auto: removal, the "
        "measured damage without the part",
    )
    align: Positive | Literal["auto"] = Field(
        default="auto",
        description="number of which all widths are multiples; auto: the largest of 256, 64, 32, 16, 8, 4, 2, 1 that comes near enough",
    )
    calibration: Path | None = Field(
        default=None,
        description="calibration text, similar to the model's later use: a file, or several as FILE=SHARE,FILE=SHARE, where self is text "
        "that the model writes; default: self, and the built-in text for seedling and models made from it",
    )
    own_text: Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)] = Field(
        default=0.0, description="share of the calibration windows that the model writes itself beside a single text"
    )
    samples: Positive = Field(default=128, description="number of calibration windows; default with effort quick: 32")
    seq_len: Positive | None = Field(
        default=None, description="length of a calibration window in tokens; default: 128 or the model's limit"
    )
    memory: Memory | None = Field(
        default=None,
        description="memory limit, such as 6GB: the model is read layer by layer; default: the full model is loaded",
        json_schema_extra=NO_EFFECT,
    )
    cache: Path | None = Field(
        default=None, description="folder that stores scores, so that another ratio needs no new calibration", json_schema_extra=NO_EFFECT
    )

    @field_validator("layers")
    @classmethod
    def _is_a_slice(cls, value: str) -> str:
        if not re.fullmatch(r"\s*(-?[0-9]+)?\s*:\s*(-?[0-9]+)?\s*(:\s*(-?0*[1-9][0-9]*)?\s*)?", value):
            raise ValueError(f"'{shown(value, 100)}' is not a range of layers; write it as START:STOP, such as 1:-1")
        return value


class RecoverSettings(Settings):
    """Settings of recovery: training of an adapter with the Hugging Face Trainer."""

    aliases: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "target_modules": "targets",
        "max_steps": "steps",
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch",
        "gradient_accumulation_steps": "accumulate",
        "learning_rate": "lr",
        "loraplus_lr_ratio": "lr_ratio",
        "lr_scheduler_type": "schedule",
        "warmup_ratio": "warmup",
        "eval_steps": "eval_every",
        "early_stopping_patience": "patience",
        "max_length": "seq_len",
    }

    data: Path | None = Field(
        default=None,
        description="training text or instruction records; built-in text is used only for seedling and models made from it",
        json_schema_extra=BY_CONTENT,
    )
    task: Literal["language", "classification", "regression"] = Field(
        default="language",
        description="kind of training: language modelling, or, for encoders too, classes or numbers in `data` (csv, tsv, json, jsonl)",
    )
    text_columns: tuple[str, ...] = Field(
        default=(), description="one or two text columns of labelled data; default: usual names, such as sentence1,sentence2"
    )
    label_column: str | None = Field(default=None, description="label column of labelled data; default: label or score")
    adapter: Annotated[str, known_name("adapter")] = Field(
        default="lora",
        validate_default=False,
        description=f"kind of adapter: {listed('adapter')}",
    )
    rank: Positive = Field(default=8, description="rank of the adapter")
    alpha: Rate | None = Field(default=None, description="LoRA's alpha; default: depends on the adapter (lora: twice the rank)")
    ranks: Path | RankPlan | None = Field(
        default=None, description="rank plan (JSON) with a rank for each module, instead of `rank`", json_schema_extra=BY_CONTENT
    )
    rank_pattern: Literal["auto", "uniform", "proportional"] = Field(
        default="auto",
        description="without `ranks`, how layers share the parameters of `rank`: uniform, or proportional to what pruning took from each; "
        "auto: proportional for lora where pruning took unequal shares",
    )
    targets: Annotated[tuple[str, ...], BeforeValidator(in_a_list)] = Field(
        default=(),
        description="modules to adapt: names such as q_proj, globs such as layers.0.*, or a regular expression of whole names, as in PEFT; "
        "default: every projection of every layer",
    )
    adapter_options: Options = Field(default=(), description="options of the adapter as NAME=VALUE; see docs/adapters.md")
    teacher: str | None = Field(
        default=None,
        description="teacher for distillation: a folder, a hub id, seedling, or dense (the model before pruning); default: none",
        json_schema_extra=BY_CONTENT,
    )
    distill: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.5, description="with `teacher`, share of the divergence from it in the loss: 0 none, 1 all"
    )
    temperature: Rate = Field(default=1.0, description="temperature of distillation; above 1 the teacher's less likely tokens count more")
    distill_hidden: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        default=0.0, description="weight of the distance between the hidden states of teacher and student in the loss"
    )
    teacher_cache: Path | None = Field(
        default=None,
        description="folder that stores the teacher's likeliest tokens, for several runs; default: the teacher runs in every step",
        json_schema_extra=NO_EFFECT,
    )
    teacher_top_k: Positive = Field(
        default=64, description="with `teacher_cache`, number of the teacher's likeliest tokens to store for each position"
    )
    dropout: float | None = Field(
        default=None, ge=0.0, lt=1.0, description="dropout of the adapter's inputs; default: depends on the adapter (lora: 0.05)"
    )
    lr: float | None = Field(
        default=None,
        gt=0.0,
        allow_inf_nan=False,
        description="peak learning rate; default: the best of a short sweep around the adapter's own rate (lora: 1e-3)",
    )
    lr_sweep: bool = Field(
        default=True,
        description="without a learning rate, train an eighth of the steps at two to four rates first; needs 64 steps or more",
    )
    lr_ratio: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = Field(
        default=1.0, description="ratio of the learning rates of LoRA's B and A (LoRA+); 1: equal rates"
    )
    steps: Positive = Field(default=200, description="number of optimizer steps")
    epochs: Rate | None = Field(
        default=None, description="number of passes over the data, instead of `steps`; default: as many as `steps` makes"
    )
    batch: Positive = Field(default=8, description="number of windows in one forward pass")
    accumulate: Positive = Field(default=1, description="number of forward passes in one optimizer step")
    seq_len: Positive | None = Field(default=None, description="length of a training window in tokens; default: 256 or the model's limit")
    packing: bool = Field(
        default=False, description="put several records into one window, without attention between them; text is always packed"
    )
    prompt: Literal["auto", "chat", "alpaca"] = Field(
        default="auto", description="prompt format of instruction records; auto: the model's chat template, or Alpaca's prompt without one"
    )
    truncation: Literal["right", "left", "drop"] = Field(
        default="right", description="treatment of records longer than a window: cut their end, cut their beginning, or drop them"
    )
    skip_bad: bool = Field(default=False, description="leave out rows of data that cannot be read, and count them")
    schedule: Annotated[Literal["cosine", "linear", "constant"], BeforeValidator(schedule_name)] = Field(
        default="cosine", description="schedule of the learning rate after warm-up"
    )
    warmup: Annotated[float, Field(ge=0.0, le=1.0)] = Field(default=0.05, description="share of the steps for warm-up of the learning rate")
    max_grad_norm: Rate = Field(default=1.0, description="largest norm of the gradients, which are clipped to it")
    eval_every: Positive = Field(default=50, description="number of steps between two measurements of the held-out loss")
    patience: Positive | None = Field(
        default=None, description="stop after this many measurements in a row without a lower held-out loss; default: never"
    )
    held_out: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        default=0.05, description="share of the data held out from training, for choosing the best checkpoint", json_schema_extra=BY_CONTENT
    )
    held_out_windows: Positive = Field(
        default=64, description="number of windows for the held-out loss, evenly spaced in the held-out data"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="dtype of the matrix products; auto: bfloat16 on a GPU that supports it, else float32"
    )
    load_in_4bit: bool = Field(default=False, description="hold the frozen weights in 4 bits (NF4) during training; needs bitsandbytes")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass: less memory, but slower")
    merge: bool = Field(
        default=True, description="merge the adapter into the weights; otherwise save the adapter alone", json_schema_extra=NO_EFFECT
    )
    report_to: Annotated[tuple[str, ...], BeforeValidator(trackers_in)] = Field(
        default=(), description="experiment trackers, with their names in the Hugging Face Trainer", json_schema_extra=NO_EFFECT
    )
    quiet: bool = Field(default=False, description="show no progress", json_schema_extra=NO_EFFECT)

    @field_validator("adapter_options")
    @classmethod
    def _options_have_values(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.partition("=")[0].strip() or "=" not in option:
                raise ValueError(f"'{shown(option, 100)}' is not an option; write it as NAME=VALUE, such as gamma=0.01")
        return options

    @field_validator("epochs")
    @classmethod
    def _steps_or_epochs(cls, value: float | None, info: ValidationInfo) -> float | None:
        steps, usual = info.data.get("steps"), cls.model_fields["steps"].default
        if value is not None and steps not in (None, usual):
            raise ValueError(f"epochs and steps both say how long to train (epochs {value:g}, steps {steps}); give one of the two")
        return value

    @field_validator("ranks")
    @classmethod
    def _ranks_bring_alpha(cls, value: Path | RankPlan | None, info: ValidationInfo) -> Path | RankPlan | None:
        if value is not None and info.data.get("alpha") is not None:
            raise ValueError("a rank plan brings its own alpha; give either ranks or alpha")
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _one_says_the_ranks(cls, value: str, info: ValidationInfo) -> str:
        if value != "auto" and info.data.get("ranks") is not None:
            raise ValueError(f"a rank plan says the rank of every module, and so does '{value}'; give either ranks or rank_pattern")
        return value


class AllocateSettings(Settings):
    """Settings of the rank search (RankAdaptor, arXiv 2406.15734, with a hard budget and a confirmation)."""

    method: Annotated[str, known_name("allocator")] = Field(
        default="rankadaptor",
        validate_default=False,
        description=f"method: {listed('allocator')}",
    )
    budget: str = Field(
        default="r=8", description="largest number of trainable parameters: a number, or r=RANK for that rank in every layer"
    )
    granularity: Literal["layer", "module"] = Field(default="layer", description="unit that gets its own rank")
    ranks: tuple[Positive, ...] = Field(default=RANK_CHOICES, description="ranks to choose from")
    trials: TwoOrMore = Field(default=8, description="number of rank vectors in the first, shortest recoveries")
    cost: Rate | Literal["auto"] = Field(
        default="auto",
        description="largest cost of search and confirmation, in full recoveries; auto: 4, or more if `trials` needs it",
    )
    elastic: Count | Literal["auto"] = Field(
        default="auto", description="number of rank vectors to score by one elastic adapter first; auto: as many as `cost` allows"
    )
    confirm_seeds: Count = Field(
        default=5, description="number of fresh seeds for confirming the found ranks against uniform ranks; 0: no confirmation"
    )
    confirm_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.125, description="length of the confirming recoveries, as a share of a full recovery's steps"
    )
    prior: Literal["shipped", "none"] | Path = Field(
        default="shipped",
        description="start learned from past searches: shipped, none, or a folder written by regraft meta train",
        json_schema_extra=BY_CONTENT,
    )
    store: Path | None = Field(
        default=None,
        description="folder of past searches that this search is added to, for regraft meta train",
        json_schema_extra=NO_EFFECT,
    )
    samples: Positive = Field(default=16, description="number of text windows for measuring gradients and inputs of the layers")
    adalora_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.25, description="training length of method adalora, as a share of a full recovery's steps"
    )
    workers: Positive = Field(default=1, description=WORKERS, json_schema_extra=NO_EFFECT)
    storage: str | None = Field(default=None, description=STORAGE, json_schema_extra=NO_EFFECT)
    ray: str | None = Field(default=None, description=RAY, json_schema_extra=NO_EFFECT)

    @field_validator("budget", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if is_whole(value, -math.inf, math.inf) else value
