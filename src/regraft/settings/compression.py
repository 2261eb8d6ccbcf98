"""Settings of low-rank compression."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from regraft.registry import known_name, listed
from regraft.settings.base import NO_EFFECT, RAY, STORAGE, WORKERS, Memory, Positive, Rate, Ratio, Settings, in_a_list


class CompressSettings(Settings):
    """Settings of low-rank compression: how linear layers become two thin ones, and at which ranks."""

    aliases: ClassVar[Mapping[str, str]] = {
        "max_length": "seq_len",
        "target_modules": "targets",
        "max_steps": "fade_steps",
        "learning_rate": "fade_lr",
        "per_device_train_batch_size": "fade_batch",
    }

    ratio: Ratio = Field(default=0.2, description="share of ALL stored parameters to remove, embeddings counted")
    method: Annotated[str, known_name("compression method", "pc_lora")] = Field(
        default="fisher",
        validate_default=False,
        description=f"method of decomposition: {listed('compression method', also=('pc_lora',))}, which trains",
    )
    ranks: Annotated[str, known_name("choice of ranks", "auto", "bayes")] = Field(
        default="auto",
        validate_default=False,
        description=f"method of choosing ranks: {listed('choice of ranks', also=('bayes',))}; auto: knapsack for fisher, whose prices "
        "compare between layers, else uniform",
    )
    prices: Literal["predicted", "measured"] = Field(
        default="predicted",
        description="prices for `ranks` type, closed and knapsack: predicted by the method, or corrected by the divergence measured "
        "with one layer factored at a time",
    )
    layout: Literal["plain", "pifa"] = Field(
        default="plain", description="form of the stored factors; pifa: by pivot rows, in fewer numbers"
    )
    align: Positive | Literal["auto"] = Field(
        default="auto", description="number of which all ranks are multiples; auto: 8, less in small layers"
    )
    targets: Annotated[tuple[str, ...], BeforeValidator(in_a_list)] = Field(
        default=(), description="names of projections that may be factored, such as q_proj, globs or regular expressions; default: all"
    )
    mix: bool = Field(
        default=False, description="remove heads and feed-forward channels instead, where that costs fewer nats than lower ranks"
    )
    dense: bool = Field(default=False, description="write the product of the factors as a dense matrix, for runtimes that know no factors")
    calibration: Path | None = Field(
        default=None, description="text to calibrate on; built-in text is used only for seedling and models made from it"
    )
    samples: Positive = Field(default=128, description="number of calibration windows")
    seq_len: Positive | None = Field(
        default=None, description="length of a calibration window in tokens; default: 128 or the model's limit"
    )
    validation: Path | None = Field(
        default=None, description="text for judging the vectors of a search for ranks; default: part of the calibration text"
    )
    test: Path | None = Field(
        default=None,
        description="text for the loss before and after, which nothing was chosen by",
        json_schema_extra=NO_EFFECT,
    )
    memory: Memory | None = Field(
        default=None,
        description="memory limit, such as 4GB: the model is read and written layer by layer; default: the full model is loaded",
        json_schema_extra=NO_EFFECT,
    )
    cache: Path | None = Field(
        default=None,
        description="folder that stores moments of the layers, so that another ratio or method needs no new calibration",
        json_schema_extra=NO_EFFECT,
    )
    trials: Positive = Field(default=50, description="number of rank vectors that `ranks=bayes` measures")
    layer_groups: Positive = Field(
        default=1, description="number of groups of layers with ranks of their own in `ranks=bayes`: 1 or 4 in the paper"
    )
    kl_weight: float = Field(
        default=1e-3, ge=0.0, allow_inf_nan=False, description="weight of the divergence, added to the perplexity that `ranks=bayes` lowers"
    )
    workers: Positive = Field(default=1, description=WORKERS, json_schema_extra=NO_EFFECT)
    storage: str | None = Field(default=None, description=STORAGE, json_schema_extra=NO_EFFECT)
    ray: str | None = Field(default=None, description=RAY, json_schema_extra=NO_EFFECT)
    warm_start: Annotated[str, known_name("compression method", "random")] = Field(
        default="fisher",
        validate_default=False,
        description="factors that pc_lora starts from: those of a method, or random; ranks are chosen by the prices of fisher where it is "
        "random",
    )
    fade_steps: Positive = Field(
        default=200, description="number of optimizer steps of pc_lora, on the calibration windows; raise `samples` with it"
    )
    fade_batch: Positive = Field(default=8, description="number of windows in one step of pc_lora")
    fade_lr: Rate = Field(default=1e-3, description="peak learning rate of pc_lora")
    fade_schedule: Literal["linear", "sine", "cosine", "step"] = Field(
        default="cosine", description="curve by which dense weights fade in pc_lora"
    )
    fade_share: float = Field(default=0.7, gt=0.0, le=1.0, description="share of pc_lora's steps until dense weights are gone")
    task_weight: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="weight of the language-modelling loss in pc_lora; the rest weighs the hidden states' distance to the original's",
    )
