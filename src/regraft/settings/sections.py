"""Sections of settings, with defaults and limits, defined once for recipes, the command line and the Python API.

Each class is one section of a recipe. Unknown keys are refused and every problem of a section is found at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from regraft.errors import ConfigError, InputError, shown
from regraft.in_short import named
from regraft.plans import RANK_CHOICES, RankPlan, Shape
from regraft.reading import is_whole, text_in
from regraft.registry import built_in, known_name, listed
from regraft.settings.problems import problems_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_OF_PARTS = ("block_influence", "angular", "removal")  # criteria that score layers and their parts, not units
_NOT_OF_UNITS: dict[str, str] = dict.fromkeys(
    _OF_PARTS, "does not score heads or channels, but layers and their parts: it is one for `depth`"
)
_NOT_OF_PARTS = {
    name: "does not score layers or their parts, but heads and channels: it is one for `criterion`"
    for name in built_in("criterion")
    if name not in _OF_PARTS
}
Reduction = Literal["sum", "mean", "max", "product", "last"]
Target = Literal[
    "heads", "ffn", "query_heads", "mixer_heads", "residual", "layers", "attention", "mlp", "vocabulary", "experts", "expert_ffn"
]


def _countable(value: int) -> int:
    """Refuses a number of things that nobody counts out: more is a slip of the keyboard."""
    if value > 10**6:
        raise ValueError(f"{value if value < 10**30 else 'a number of more than 30 digits'} is above the limit of 1000000")
    return value


Positive = Annotated[int, Field(gt=0), AfterValidator(_countable)]
Count = Annotated[int, Field(ge=0), AfterValidator(_countable)]
TwoOrMore = Annotated[int, Field(ge=2), AfterValidator(_countable)]

MOST_FACTORS = 1000  # of a completion; its memory and time are proportional to them

# Default lengths of windows in tokens; shorter if the model's context is shorter.
CALIBRATION_TOKENS = 128
TRAINING_TOKENS = 256

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def bytes_in(amount: Any) -> int:
    """Returns an amount of memory in bytes.

    Raises:
        ValueError: The text is not an amount of memory.

    >>> bytes_in("6GB"), bytes_in("1.5 GiB"), bytes_in(1000)
    (6000000000, 1610612736, 1000)
    """
    text = str(amount)[:100] if not is_whole(amount, 10**30, math.inf) else "that number"
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(|[KMGT]|[KMGT]I)B?\s*", text.upper())
    count = int(min(float(found[1]) * _UNITS[found[2]], 1e30)) if found else 0
    if not 1 <= count < 10**18:
        raise ValueError(f"'{text}' is not an amount of memory; write it as 6GB, 512MB or 4GiB")
    return count


def type_name(value: Any) -> Any:
    """Returns the name of a number type, as text or as torch has it: ``torch.bfloat16`` is ``bfloat16``."""
    return str(value).removeprefix("torch.")


def schedule_name(value: Any) -> Any:
    """Returns our name of a learning-rate schedule of transformers; all of ours begin with a warm-up."""
    name = value.value if isinstance(value, Enum) else value
    return "constant" if name == "constant_with_warmup" else name


EVERY_PROJECTION = "all-linear"  # PEFT's word for what is adapted by default


def in_a_list(value: Any) -> Any:
    """Returns a list of one for a single text; ``all-linear`` is an empty list."""
    if value in (EVERY_PROJECTION, (EVERY_PROJECTION,), [EVERY_PROJECTION]):
        return ()
    return value if text_in(value) is None else (value,)


def trackers_in(value: Any) -> Any:
    """Returns a list of one for a single text, as the Trainer takes it; ``none`` is an empty list."""
    if value in ("none", ("none",), ["none"]):
        return ()
    return value if text_in(value) is None else (value,)


Memory = Annotated[int, BeforeValidator(bytes_in)]
Ratio = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def options_in(given: Any) -> Any:
    """Returns a mapping, as in recipes, as ``NAME=VALUE`` texts; a list is returned unchanged.

    >>> options_in({"gamma": 0.01, "depth": 3})
    ('gamma=0.01', 'depth=3')
    """
    return tuple(f"{name}={value}" for name, value in given.items()) if isinstance(given, Mapping) else given


def option_values(options: Iterable[str]) -> dict[str, str]:
    """Returns ``NAME=VALUE`` texts as a mapping; the last value of a name counts.

    >>> option_values(("gamma=0.01", "depth=3"))
    {'gamma': '0.01', 'depth': '3'}
    """
    return {name.strip(): value.strip() for name, _, value in (option.partition("=") for option in options)}


Options = Annotated[tuple[str, ...], BeforeValidator(options_in)]


def _takes_bool(annotation: Any) -> bool:
    """Returns whether true and false are among the values of an annotation."""
    return annotation in (bool, Any) or any(_takes_bool(part) for part in get_args(annotation))


# Declarations on a field (``json_schema_extra``). The value of a field without a declaration affects the result.
NO_EFFECT: JsonDict = {"affects_result": False}
BY_CONTENT: JsonDict = {"affects_result": "by content"}  # keys of results use a digest of the contents that the field points to

# What the two searches for ranks, of adapters and of compression, say alike.
WORKERS = "number of measuring processes on this machine"
STORAGE = "database for several machines, such as postgresql://user@host/name; default: a file next to the output"
RAY = "Ray cluster for measuring: auto, local or host:port; default: only this machine"


class Settings(BaseModel):
    """Base class of all sections: frozen, and refusing unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True)
    # Words that PEFT and transformers have for a setting, each with the name that it has here; taken wherever settings are given.
    aliases: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:  # the signature that type checkers see is that of the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(type(self).__name__, problems_of(error, type(self))) from None

        # pydantic calls this as its own __init__ only when asked to make one section; nested sections are checked as data.
        __init__.__pydantic_base_init__ = True

        def __setattr__(self, name: str, value: Any) -> None:
            kind = type(self).__name__
            raise InputError(f"{kind} does not change; make another by {kind}({shown(name, 80)}=...), or give the setting as a keyword")

    def __repr__(self) -> str:
        """Returns the settings that were given and are not the defaults, in one short line."""
        shown = {name: field for name, field in type(self).model_fields.items() if field.repr and name in self.model_fields_set}
        given = {name: getattr(self, name) for name in shown}
        return named(type(self).__name__, {name: value for name, value in given.items() if value != shown[name].default})

    __str__ = __repr__

    @classmethod
    def words(cls) -> dict[str, str]:
        """Returns every word for a setting with the setting's name: the names themselves, and what other libraries call them."""
        return {name: name for name in cls.model_fields} | dict(cls.aliases)

    @model_validator(mode="before")
    @classmethod
    def _by_their_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        named: dict[str, Any] = {}
        words: dict[str, str] = {}
        for word, value in values.items():
            name = cls.aliases.get(word, word)
            if name in named:
                raise ValueError(f"{words[name]} and {word} are one setting; give one of the two")
            named[name], words[name] = value, word
        return named

    @field_validator("*", mode="before")
    @classmethod
    def _of_a_kind(cls, value: Any, about: ValidationInfo) -> Any:
        """Refuses what pydantic takes for something else: a name with a zero byte, and true for the number 1."""
        match value:
            case str() | PurePath() if "\0" in str(value):
                raise ValueError(f"'{shown(value, 80)}' has a zero byte, which no name has; choose another")
            case bool() if about.field_name is not None and not _takes_bool(cls.model_fields[about.field_name].annotation):
                raise ValueError(f"{str(value).lower()} is no number and no text")
            case _:
                return value

    def decisive(self, *, varied: Iterable[str] = ()) -> dict[str, Any]:
        """Returns the values that affect the result, as plain JSON types: all fields except those declared otherwise.

        Args:
            varied: Fields that the caller sets itself, independently of the settings.
        """
        declared = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        others = {name for name, extra in declared.items() if extra in (NO_EFFECT, BY_CONTENT)}
        return self.model_dump(mode="json", exclude=others | set(varied))


class LoadSettings(Settings):
    """Settings for loading a model."""

    aliases: ClassVar[Mapping[str, str]] = {"torch_dtype": "dtype", "device_map": "device"}

    dtype: Annotated[Dtype, BeforeValidator(type_name)] = Field(
        default="auto", description="dtype of the weights; auto: the dtype of the file"
    )
    device: Annotated[str, BeforeValidator(str)] = Field(
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
    criterion: Annotated[str, known_name("criterion", "auto", unfit=_NOT_OF_UNITS)] = Field(
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
    targets: tuple[Target, ...] = Field(
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
    depth: Annotated[str, known_name("criterion", "auto", unfit=_NOT_OF_PARTS)] = Field(
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
            raise ValueError(f"'{value}' is not a range of layers; write it as START:STOP, such as 1:-1")
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
                raise ValueError(f"'{option}' is not an option; write it as NAME=VALUE, such as gamma=0.01")
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


class EvaluateSettings(Settings):
    """Settings of a measurement of a language model."""

    aliases: ClassVar[Mapping[str, str]] = {"max_length": "window"}

    text: Path | None = Field(default=None, description="held-out text; built-in text is used only for seedling and models made from it")
    window: Positive | None = Field(default=None, description="length of the context in tokens; default: 512 or the model's limit")
    stride: Positive | None = Field(
        default=None, description="number of tokens between the starts of two windows; default: half the window"
    )
    max_tokens: Annotated[int, Field(gt=0, le=10**12)] | None = Field(
        default=None, description="largest number of tokens to measure; default: all of the text"
    )
    bos: bool | Literal["auto"] = Field(default="auto", description="BOS token at the start of documents; auto: as the tokenizer has it")
    speed: bool = Field(default=False, description="also measure the times of prefill and decode, and peak memory")


class TaskSettings(Settings):
    """Settings of tasks and of several texts, which are measured with one model or two."""

    tasks: tuple[str, ...] = Field(
        default=(),
        description="tasks: names of lm-evaluation-harness (boolq,piqa,...), files with questions, or continuation and repetition, which "
        "are made from the held-out text",
    )
    limit: Positive | None = Field(default=None, description="largest number of items of each task; default: 200 of those made from text")
    shots: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="solved examples before each question; default: none, or what the harness has for its task"
    )
    answer_tokens: Positive = Field(default=32, description="longest answer in tokens, of tasks that are answered in words")
    texts: tuple[Path, ...] = Field(default=(), description="held-out texts to measure the loss on, the worst of which is named")
    windows: tuple[Positive, ...] = Field(
        default=(), description="lengths of the context for the texts, such as 128,2048; default: that of the other measurement"
    )


class LabelSettings(Settings):
    """Settings of a measurement of a classification or regression model."""

    aliases: ClassVar[Mapping[str, str]] = {"max_length": "seq_len"}

    data: Path | None = Field(default=None, description="labelled rows (csv, tsv, json, jsonl), for a classification or regression model")
    text_columns: tuple[str, ...] = Field(
        default=(), description="one or two text columns of labelled data; default: usual names, such as sentence1,sentence2"
    )
    label_column: str | None = Field(default=None, description="label column of labelled data; default: label or score")
    seq_len: Positive | None = Field(default=None, description="length of the longest row in tokens; default: 256 or the model's limit")


class SampleSettings(Settings):
    """Settings of the greedy text sample of each model."""

    aliases: ClassVar[Mapping[str, str]] = {"max_new_tokens": "tokens"}

    prompt: str = Field(default="", description="prompt that the model continues; empty: the BOS token")
    tokens: Positive = Field(default=48, description="number of tokens to generate")


class CompletionSettings(Settings):
    """Settings of the completion of a table of ratings."""

    rank: Positive | Literal["auto"] = Field(default=10, description="rank of the completion; auto: by held-out error")
    depth: Annotated[TwoOrMore, Field(le=MOST_FACTORS)] = Field(
        default=3, description="number of inner factors of the compressed factorization"
    )
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.1, description="share of the ratings on which the error is measured"
    )
    threshold: Annotated[float, Field(ge=0.0, lt=1.0)] | Literal["auto"] = Field(
        default="auto", description="threshold for the singular values, as a share of the top one; 0: exact data"
    )
    gamma: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        default=0.01, description="learning rate of the outer factors relative to the inner ones, at threshold 0"
    )
    biases: bool = Field(default=True, description="remove the mean and the biases of users and items before the fit")
    duplicates: Literal["refuse", "mean", "last"] = Field(
        default="refuse", description="treatment of items that a user rated more than once"
    )
    recommend: Count = Field(default=10, description="number of unrated items to recommend to every user; 0: none")
    device: str = Field(default="cpu", description="device: cpu, cuda or cuda:N")
