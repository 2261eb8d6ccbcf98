"""Tasks of lm-evaluation-harness (``lm_eval``, extra ``eval``), on a model in memory, so that every kind of model is scored alike."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.tokens import context_limit
from regraft.errors import DataError, InputError, MissingDependencyError, did_you_mean, shown
from regraft.evaluation.inference import input_device
from regraft.evaluation.loss import most_tokens_on
from regraft.evaluation.questions import FROM_TEXT
from regraft.models.quiet import in_one_line, quiet
from regraft.models.trainable import evaluating
from regraft.plans import TaskScore

YAML = (".yaml", ".yml")
_PROMPT_TOKENS = 256  # of a usual question; decides the batch


def check_harness(names: Sequence[str]) -> Any:
    """Checks that the harness is installed and has the tasks, and returns its task manager.

    Args:
        names: Names of tasks or groups, or YAML files of the harness. Names are looked up in its catalogue, which takes about ten seconds.

    Raises:
        MissingDependencyError: ``lm_eval`` is not installed.
        InputError: There is no task of a name; the message has the nearest one.
    """
    named = [name for name in names if not name.lower().endswith(YAML)]
    try:
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError:
        for name in named:
            if hint := did_you_mean(name, FROM_TEXT):
                raise InputError(f"there is no task '{shown(name)}' without lm_eval{hint}") from None
        raise MissingDependencyError("lm_eval", "eval") from None
    manager = tasks.TaskManager(include_defaults=bool(named))
    known = set(manager.all_tasks)
    for name in named:
        if name not in known:
            made = "continuation, repetition, or a file with questions (.jsonl, .json, .csv, .tsv)"
            raise InputError(
                f"task '{shown(name)}' is none of the {len(known):,} of lm_eval, and not {made}{did_you_mean(name, (*FROM_TEXT, *known))}"
            )
    return manager


def score_by_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> list[TaskScore]:
    """Scores a model on tasks of the harness.

    Args:
        model: The model, whose mode is restored.
        tokenizer: Its tokenizer.
        names: Tasks, groups or YAML files.
        manager: What :func:`check_harness` returned.
        limit: Largest number of items of each task.
        shots: Number of solved examples; None for what each task has.
        seed: Seed of the choice of the examples.

    Raises:
        DataError: The data of a task cannot be had, as without a network.
    """
    harness = importlib.import_module("lm_eval")
    models = importlib.import_module("lm_eval.models.huggingface")
    with quiet(), evaluating(model):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        wrapped = models.HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=context_limit(model.config),
            batch_size=max(1, most_tokens_on(input_device(model), model) // _PROMPT_TOKENS),
        )
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
        try:
            results = harness.simple_evaluate(
                model=wrapped, tasks=list(names), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=1000, **seeds
            )
        except Exception as error:  # datasets, the hub's client, jinja and the harness each have kinds of their own
            raise DataError(
                f"the tasks {', '.join(map(shown, names))} cannot be run: {in_one_line(error)}; the harness fetches its data from the "
                "Hugging Face hub: fetch them once where there is a network, or give a file with questions"
            ) from None
    return [score for name in results["results"] for score in _scores(name, results)]


def harness_version() -> Mapping[str, str]:
    """Returns the version of the harness, for the record of a measurement."""
    return {"lm_eval": version("lm_eval")}


def _scores(name: str, results: Mapping[str, Any]) -> list[TaskScore]:
    """Returns the scores of a task, one for each of its metrics and filters."""
    found: list[TaskScore] = []
    values: Mapping[str, Any] = results["results"][name]
    count = results["n-samples"].get(name, {}).get("effective", 0)
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        better = results["higher_is_better"].get(name, {}).get(metric)
        found.append(
            TaskScore(
                task=name,
                metric=metric if chosen == "none" else f"{metric} ({chosen})",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                items=int(count),
                shots=int(results["n-shot"].get(name, 0)),
                version=str(results["versions"].get(name, "")),
                higher_is_better=better is not False,
                outcomes=_outcomes(results, name, metric, chosen),
            )
        )
    return found


def _outcomes(results: Mapping[str, Any], name: str, metric: str, chosen: str) -> tuple[float, ...]:
    """Returns a metric's value of each item, in the order of the items; empty where the harness has one value for all items only."""
    samples = [one for one in results.get("samples", {}).get(name, ()) if one.get("filter", "none") == chosen]
    samples.sort(key=lambda one: one["doc_id"])
    values = [one.get(metric) for one in samples]
    return tuple(float(value) for value in values) if values and all(isinstance(value, int | float) for value in values) else ()
