"""Measurement of a model on tasks and on several texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from regraft.data.text import Corpus
from regraft.data.tokens import context_limit
from regraft.errors import InputError, shown
from regraft.evaluation.answers import score_answers
from regraft.evaluation.choices import score_choices
from regraft.evaluation.lm_harness import check_harness, harness_version, score_by_harness
from regraft.evaluation.loss import evaluate_loss
from regraft.evaluation.questions import FROM_TEXT, QUESTION_SUFFIXES, Task, read_task, task_from_text
from regraft.models.classifier import is_classifier
from regraft.models.live import ModelLike
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.provenance import versions
from regraft.models.trainable import evaluating
from regraft.models.view import parameter_count
from regraft.pipelines.evaluate import not_for_labels, taken
from regraft.pipelines.texts import Texts, in_memory, path_in, read, text_for
from regraft.plans import LossReport, TaskReport, TaskScore
from regraft.progress import SayCount
from regraft.settings import EvaluateSettings, LoadSettings, TaskSettings, takes_settings, with_keywords


@takes_settings(TaskSettings, EvaluateSettings, LoadSettings)
def evaluate_tasks(
    model: ModelLike | PeftModel,
    settings: TaskSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: Texts | None = None,
    evaluate: EvaluateSettings | None = None,
    load: LoadSettings | None = None,
    seed: int = 0,
    label: str | None = None,
    progress: SayCount | None = None,
    **keywords: Any,
) -> TaskReport:
    """Measures a model on tasks and on several texts.

    Args:
        model: As for :func:`regraft.evaluate`.
        settings: The tasks, the texts and their windows.
        tokenizer: The tokenizer for a model in memory.
        text: Held-out text that ``continuation`` and ``repetition`` are made from: a file, texts, or a data set with a column ``text``.
        evaluate: Text, and how texts are read.
        load: How a folder or hub id is loaded.
        seed: Seed of the harness, which draws solved examples.
        label: Name of the measurement; None for the source.
        progress: Called with the numbers of finished and of all steps of each task.
        **keywords: Single settings by name, such as ``tasks=("continuation",)`` or ``limit=100``; they count before those in sections.

    Returns:
        Scores with standard errors, and losses; :func:`regraft.compare_tasks` compares two of them.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    chosen, reading, load = with_keywords(
        "regraft.evaluate_tasks", keywords, settings or TaskSettings(), evaluate or EvaluateSettings(), load or LoadSettings()
    )
    if not chosen.tasks and not chosen.texts:
        raise InputError("nothing is measured: name tasks with `tasks`, or texts with `texts`")
    held = in_memory(text)
    given = held if held is not None else (path_in(text) or reading.text)
    wanted = _wanted(chosen)
    source = read(given, "test", "text") if given is not None else None
    loaded, _ = taken(model, tokenizer, load)
    if is_classifier(loaded.model):
        raise not_for_labels(loaded.source)
    tasks = dict(wanted.files) | _made_tasks(loaded, chosen, source)
    with evaluating(loaded.model):
        scores: list[TaskScore] = []
        for name in chosen.tasks:
            if name in tasks:
                scores += _scored(loaded, tasks[name], chosen, progress)
            else:
                own = require_tokenizer(loaded)
                scores += score_by_harness(loaded.model, own, [name], wanted.manager, limit=chosen.limit, shots=chosen.shots, seed=seed)
        losses = _losses(loaded, wanted.corpora, chosen, reading, progress)
    name = label if label is not None else (str(model) if isinstance(model, str | Path) else loaded.source)
    known = versions() | (dict(harness_version()) if wanted.manager is not None else {})
    return TaskReport(name, tuple(scores), losses, parameter_count(loaded.model), known)


@dataclass(frozen=True)
class _Wanted:
    """What is read before a model is loaded, as whatever can be wrong with files and names is found by it.

    Attributes:
        files: Tasks from files of questions, by name.
        manager: The harness's index of tasks; None where no task is of the harness.
        corpora: Texts whose losses are measured.
    """

    files: Mapping[str, Task]
    manager: Any
    corpora: Sequence[Corpus]


def _wanted(chosen: TaskSettings) -> _Wanted:
    files = {name: read_task(Path(name), chosen.shots or 0, chosen.limit) for name in chosen.tasks if _is_file_of_questions(name)}
    of_harness = [name for name in chosen.tasks if name not in files and name not in FROM_TEXT]
    manager = check_harness(of_harness) if of_harness else None
    return _Wanted(files, manager, [read(path, "test", "texts") for path in chosen.texts])


def _is_file_of_questions(name: str) -> bool:
    """Returns whether a task is a file of questions: its suffix tells, so that a missing file is told as one."""
    suffix = Path(name).suffix.lower()
    if suffix == ".txt":
        raise InputError(
            f"task '{shown(name)}' is a text; give it with `text` and name the task continuation, or give a file with questions"
        )
    return suffix in QUESTION_SUFFIXES


def _made_tasks(loaded: Loaded, chosen: TaskSettings, source: Corpus | None) -> dict[str, Task]:
    """Returns the tasks that are made from text, by name."""
    wanted = [name for name in chosen.tasks if name in FROM_TEXT]
    if not wanted:
        return {}
    corpus = source if source is not None else text_for(loaded, None, "test", "text")
    return {name: task_from_text(name, corpus, chosen.limit) for name in wanted}


def _scored(loaded: Loaded, task: Task, chosen: TaskSettings, progress: SayCount | None) -> tuple[TaskScore, ...]:
    tokenizer = require_tokenizer(loaded)
    if task.has_choices:
        return score_choices(loaded.model, tokenizer, task, progress=progress)
    return score_answers(loaded.model, tokenizer, task, chosen.answer_tokens, progress=progress)


def _losses(
    loaded: Loaded, corpora: Sequence[Corpus], chosen: TaskSettings, reading: EvaluateSettings, progress: SayCount | None
) -> tuple[LossReport, ...]:
    """Measures each text at each window. Of several windows, those longer than the model's context are left out."""
    limit = context_limit(loaded.model.config)
    windows = [window for window in chosen.windows if limit is None or window <= limit] or list(chosen.windows[:1]) or [reading.window]
    return tuple(
        evaluate_loss(loaded.model, require_tokenizer(loaded), corpus, _at(reading, window), progress=progress)
        for corpus in corpora
        for window in windows
    )


def _at(reading: EvaluateSettings, window: int | None) -> EvaluateSettings:
    changed = reading.model_copy(update={"window": window})
    return changed if window == reading.window else changed.model_copy(update={"stride": None})
