"""Sections of settings for what measures a model, for sample texts, and for the completion of ratings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from regraft.settings.base import (
    MOST_FACTORS,
    Count,
    Positive,
    Settings,
    TwoOrMore,
    named_alone,
)


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

    tasks: Annotated[tuple[str, ...], BeforeValidator(named_alone)] = Field(
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
