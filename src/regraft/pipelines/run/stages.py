"""The stages of a run: prune, compress, allocate ranks, recover, measure and sample every model by one harness.

Every stage reads its inputs from the folders of earlier stages, also in an uninterrupted run, so that a killed and resumed run computes the
same results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regraft.atomic import sha256_of, write_text
from regraft.errors import PlanError
from regraft.evaluation.sample import continue_text
from regraft.evaluation.speed import compare_speed
from regraft.models.load import Loaded, load, locate_by, require_tokenizer
from regraft.pipelines.compress import compress
from regraft.pipelines.evaluate import evaluate_model
from regraft.pipelines.evaluate_tasks import evaluate_tasks
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.ranks.allocate import allocate_ranks
from regraft.pipelines.ranks.files import RANKS, SEARCH
from regraft.pipelines.ranks.start import decisive
from regraft.pipelines.recover import recover_model
from regraft.pipelines.run.folder import TIMINGS, RunFolder, plain_json
from regraft.pipelines.run.recipe import Recipe, to_yaml
from regraft.plans import (
    FactorPlan,
    Measurement,
    PrunePlan,
    RankPlan,
    RankSearch,
    SpeedReport,
    TaskReport,
    from_json,
    to_dict,
    to_json,
)
from regraft.progress import Say
from regraft.reading import is_file, read_object
from regraft.settings import AllocateSettings, CompressSettings, PruneSettings, RecoverSettings, TaskSettings
from regraft.surgery.adapter_folder import is_adapter, load_adapted

PLAN, FACTORS, RECOVERY = "plan.json", "factors.json", "recovery.json"
MEASUREMENT, SAMPLE, TASKS = "measurement.json", "sample.txt", "tasks.json"
SCORES = "scores"  # folder of the score cache, which another ratio can use
MOMENTS = "moments"  # the same for the moments of compression


def files_of(recipe: Recipe) -> dict[str, Path]:
    """Returns the files that a recipe names, by key; data sets of the hub and in folders are known by their names alone."""
    named: dict[str, Any] = {"evaluate.text": recipe.evaluate.text}
    if recipe.prune is not None:
        named["prune.calibration"] = recipe.prune.calibration
    if recipe.compress is not None:
        named |= {"compress.calibration": recipe.compress.calibration, "compress.validation": recipe.compress.validation}
    if recipe.recover is not None:
        named |= {"recover.data": recipe.recover.data, "recover.ranks": recipe.recover.ranks}
    if recipe.tasks is not None:
        named |= {f"tasks.{path}": path for path in (*recipe.tasks.texts, *map(Path, recipe.tasks.tasks))}
    return {key: path for key, path in named.items() if isinstance(path, Path) and is_file(path)}


@dataclass(frozen=True)
class RunOrder:
    """Order of one run: all that every stage is made from, besides the folders of earlier stages.

    Attributes:
        folder: The run folder.
        recipe: The recipe of the run.
        fingerprint: Fingerprint of the dense model.
        command: The command of the run, without parts that differ between equal runs.
        name: Name of the run.
        progress: Called with the current action.
        say: Called with one line for each thing a user wants to know.
    """

    folder: RunFolder
    recipe: Recipe
    fingerprint: str
    command: str
    name: str
    progress: Say
    say: Say

    def inputs(self, source: str | Path, **settings: Any) -> dict[str, Any]:
        """Returns the inputs of a stage: the checksums of its model, of the files that the recipe names, and settings."""
        match source:
            case Path():
                model: dict[str, Any] = {"files": self.folder.checksums(source)}
            case _:
                model = {"model": self.recipe.model, "fingerprint": self.fingerprint}
        named = {key: sha256_of(path) for key, path in files_of(self.recipe).items()}
        return {"model": model, "files": named, "load": self.recipe.load.model_dump(mode="json"), **settings}

    def load(self, source: str | Path) -> Loaded:
        """Loads a model of the run, named by a relative path, because the full path would differ between two runs of one recipe."""
        name = f"../{source.name}" if isinstance(source, Path) else self.recipe.model
        return replace(load(source, self.recipe.load), source=name)


@dataclass(frozen=True)
class Made:
    """Models and decisions of a run, before they are measured.

    Attributes:
        models: Label to the folder of each model, in order; for the dense model what the recipe names.
        plan: The prune plan, or None.
        factors: The factors of the compressed model, or None.
        ranks: The search for ranks, or None.
    """

    models: Mapping[str, str | Path]
    plan: PrunePlan | None = None
    factors: FactorPlan | None = None
    ranks: RankSearch | None = None

    @property
    def label(self) -> str:
        """Label of the model that the last stage has made."""
        return list(self.models)[-1]

    @property
    def last(self) -> str | Path:
        """The model that the last stage has made."""
        return self.models[self.label]

    def folder(self, label: str) -> Path | None:
        """Returns the folder of a model that the run has made; None for the dense model, and where there is none."""
        found = self.models.get(label)
        return found if isinstance(found, Path) else None

    def with_model(self, label: str, folder: Path, **decided: Any) -> Made:
        """Returns the same with one model more, and what was decided for it."""
        return replace(self, models={**self.models, label: folder}, **decided)


@dataclass(frozen=True)
class Measured:
    """Measurements of all models of a run.

    Attributes:
        measurements: One for each model, in order.
        folders: Label to the folder with the model's sample.
        tasks: Scores on the tasks and texts of the recipe, one for each model, or none.
    """

    measurements: Sequence[Measurement]
    folders: Mapping[str, Path]
    tasks: Sequence[TaskReport]


def make_smaller(order: RunOrder, dense: Loaded) -> Made:
    """Makes what is cut or factorized from the dense model, which no later stage needs.

    Args:
        order: The run.
        dense: The model of the recipe.
    """
    recipe = order.recipe
    made = Made({"dense": recipe.model})
    order.folder.write("recipe.yaml", to_yaml(recipe))
    if recipe.prune is not None:
        folder = _prune(order, dense, recipe.prune, "pruned" if recipe.recover or recipe.compress else "model")
        plan = from_json(PrunePlan, (folder / PLAN).read_bytes())
        order.folder.write(PLAN, to_json(plan) + "\n")
        made = made.with_model("pruned", folder, plan=plan)
    if recipe.compress is not None:
        folder = _compress(order, made.folder("pruned"), dense, recipe.compress, "compressed" if recipe.recover else "model")
        order.folder.write(FACTORS, (folder / FACTORS).read_text(encoding="utf-8"))
        made = made.with_model("compressed", folder, factors=from_json(FactorPlan, (folder / FACTORS).read_bytes()))
    return made


def make_trained(order: RunOrder, made: Made) -> Made:
    """Makes the stages that train: ranks and recovery, each on the model that the one before left in its folder."""
    recipe, settings = order.recipe, order.recipe.recover
    if settings is None:
        return made
    if recipe.allocate is not None:
        folder = _allocate(order, made.last, recipe.allocate, settings)
        settings = settings.model_copy(update={"ranks": from_json(RankPlan, (folder / RANKS).read_bytes())})
        made = replace(made, ranks=from_json(RankSearch, (folder / SEARCH).read_bytes()))
    return made.with_model("recovered", _recover(order, made.last, settings))


def measure(order: RunOrder, made: Made) -> Measured:
    """Measures every model of a run by one harness, and scores it on the tasks of the recipe."""
    models, tasks = made.models, order.recipe.tasks
    folders = {label: _measure(order, label, source) for label, source in models.items()}
    measurements = [from_json(Measurement, (folder / MEASUREMENT).read_bytes()) for folder in folders.values()]
    if order.recipe.evaluate.speed:
        measurements = _with_speed(order, models, measurements)
    scored: list[TaskReport] = []
    if tasks is not None and (tasks.tasks or tasks.texts):
        scored = [_on_tasks(order, tasks, label, source) for label, source in models.items()]
    return Measured(measurements, folders, scored)


def _prune(order: RunOrder, dense: Loaded, settings: PruneSettings, name: str) -> Path:
    seed = order.recipe.seed

    def make(folder: Path) -> None:
        kept = settings if settings.cache is not None else settings.model_copy(update={"cache": order.folder.path / SCORES})
        result = prune(dense, None, kept, seed=seed, command=order.command, say=order.progress)
        for note in result.notes:
            order.say(note)
        result.save_pretrained(folder, replace=True)
        write_text(folder / PLAN, to_json(result.plan) + "\n")

    inputs = order.inputs(order.recipe.model, prune=settings.model_dump(mode="json"), seed=seed)
    return order.folder.stage("prune", inputs, make, folder=name)


def _compress(order: RunOrder, source: Path | None, dense: Loaded, settings: CompressSettings, name: str) -> Path:
    """Compresses what was pruned, or else the dense model."""
    seed = order.recipe.seed

    def make(folder: Path) -> None:
        kept = settings if settings.cache is not None else settings.model_copy(update={"cache": order.folder.path / MOMENTS})
        work = order.folder.work("compress")
        loaded = dense if source is None else order.load(source)
        result = compress(loaded, None, kept, seed=seed, resume=True, work=work, command=order.command, say=order.progress)
        for note in result.notes:
            order.say(note)
        result.save_pretrained(folder, replace=True)
        write_text(folder / FACTORS, to_json(result.plan) + "\n")

    before = order.recipe.model if source is None else source
    path = order.folder.stage("compress", order.inputs(before, compress=settings.model_dump(mode="json"), seed=seed), make, folder=name)
    order.folder.discard("compress")
    return path


def _allocate(order: RunOrder, source: str | Path, settings: AllocateSettings, training: RecoverSettings) -> Path:
    seed, read = order.recipe.seed, order.recipe.load

    def make(folder: Path) -> None:
        work = order.folder.work("allocate")
        result = allocate_ranks(load(source, read), None, settings, training, load=read, seed=seed, work=work, say=order.progress)
        for name, text in result.files().items():
            write_text(folder / name, text)

    inputs = order.inputs(source, allocate=decisive(settings), recover=training.model_dump(mode="json"), seed=seed)
    path = order.folder.stage("allocate", inputs, make, folder="ranks")
    order.folder.discard("allocate")
    return path


def _recover(order: RunOrder, source: str | Path, settings: RecoverSettings) -> Path:
    seed, read = order.recipe.seed, order.recipe.load

    def make(folder: Path) -> None:
        work = order.folder.work("recover")
        loaded = order.load(source)
        result = recover_model(
            loaded, None, settings, load=read, seed=seed, resume=True, work=work, command=order.command, say=order.progress
        )
        result.save_pretrained(folder, replace=True)
        done = result.recovered
        facts = {"best_step": done.best_step, "best_loss_nats": done.best_loss, "first_loss_nats": done.first_loss}
        write_text(folder / RECOVERY, plain_json(facts | {"trainable_parameters": done.trainable_parameters}))

    path = order.folder.stage("recover", order.inputs(source, recover=settings.model_dump(mode="json"), seed=seed), make, folder="model")
    order.folder.discard("recover")
    return path


def _measure(order: RunOrder, label: str, source: str | Path) -> Path:
    recipe = order.recipe

    def make(folder: Path) -> None:
        loaded = _with_adapter(order, source)
        settings = recipe.evaluate.model_copy(update={"speed": False})
        measurement = evaluate_model(loaded, settings, seed=recipe.seed, label=label, folder=locate_by(source, recipe.load))
        write_text(folder / MEASUREMENT, to_json(measurement) + "\n")
        if recipe.sample is not None:
            write_text(folder / SAMPLE, continue_text(loaded.model, require_tokenizer(loaded), recipe.sample))

    sample = recipe.sample.model_dump(mode="json") if recipe.sample is not None else None
    inputs = order.inputs(source, evaluate=recipe.evaluate.model_dump(mode="json", exclude={"speed"}), sample=sample)
    return order.folder.stage(f"measure {label}", inputs, make, folder=f"measured/{label}")


def _on_tasks(order: RunOrder, tasks: TaskSettings, label: str, source: str | Path) -> TaskReport:
    """Scores a model on the tasks and texts of the recipe."""
    recipe = order.recipe

    def make(folder: Path) -> None:
        report = evaluate_tasks(_with_adapter(order, source), tasks, evaluate=recipe.evaluate, seed=recipe.seed, label=label)
        write_text(folder / TASKS, to_json(report) + "\n")

    evaluate = recipe.evaluate.model_dump(mode="json", exclude={"speed"})
    inputs = order.inputs(source, tasks=tasks.model_dump(mode="json"), evaluate=evaluate)
    path = order.folder.stage(f"tasks {label}", inputs, make, folder=f"tasks/{label}")
    return from_json(TaskReport, (path / TASKS).read_bytes())


def _with_speed(order: RunOrder, models: Mapping[str, str | Path], measurements: Sequence[Measurement]) -> list[Measurement]:
    """Adds the speeds of all models, measured in turns."""

    def make(folder: Path) -> None:
        speeds = compare_speed({label: _with_adapter(order, source).model for label, source in models.items()}, seed=order.recipe.seed)
        write_text(folder / TIMINGS, plain_json({label: to_dict(speed) for label, speed in speeds.items()}))

    inputs = {label: order.inputs(source) for label, source in models.items()}
    path = order.folder.stage("speed", inputs, make, folder="measured/speed") / TIMINGS
    speeds = read_object(path, PlanError) if path.is_file() else {}
    known = {label: from_json(SpeedReport, json.dumps(speed)) for label, speed in speeds.items()}
    return [replace(entry, speed=known[entry.label]) if entry.label in known else entry for entry in measurements]


def _with_adapter(order: RunOrder, source: str | Path) -> Loaded:
    """Loads a model of the run, or an adapter on its base."""
    if isinstance(source, Path) and is_adapter(source):
        return load_adapted(source, order.recipe.load)
    return load(source, order.recipe.load)
