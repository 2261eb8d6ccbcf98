"""The stages of a run: prune, compress, allocate ranks, recover, measure and sample every model by one harness, report.

Every stage reads its inputs from the folders of earlier stages, also in an uninterrupted run, so that a killed and resumed run computes the
same results.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from regraft.atomic import sha256_of, write_text
from regraft.errors import PlanError, shown
from regraft.evaluation.harness import flat
from regraft.evaluation.sample import continue_text
from regraft.evaluation.speed import compare_speed
from regraft.models.load import Loaded, load, locate_by, require_tokenizer
from regraft.models.provenance import versions
from regraft.pipelines.compress import compress
from regraft.pipelines.evaluate import evaluate_model
from regraft.pipelines.evaluate_tasks import evaluate_tasks
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.prune.summary import plan_summary
from regraft.pipelines.ranks.allocate import allocate_ranks
from regraft.pipelines.ranks.files import RANKS, SEARCH
from regraft.pipelines.ranks.start import decisive
from regraft.pipelines.recover import LOSS_LOG, recover_model
from regraft.pipelines.run.folder import TIMINGS, RunFolder
from regraft.pipelines.run.recipe import Recipe, to_yaml
from regraft.plans import (
    FactorPlan,
    Groups,
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
from regraft.reading import is_file, read_bytes, read_object, whole_number
from regraft.report.page import to_html, to_markdown
from regraft.report.summary import CurvePoint, RunReport, Width, won_back
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


class Stages:
    """The stages of one run, in order.

    Args:
        folder: The run folder.
        recipe: The recipe of the run.
        dense: The model of the recipe; the prune stage frees it.
        groups: Groups of the dense model.
        command: The command of the run, without parts that differ between equal runs.
        name: Name of the run.
        progress: Called with the current action.
        say: Called with one line for each thing a user wants to know.
    """

    def __init__(
        self, folder: RunFolder, recipe: Recipe, dense: Loaded, groups: Groups, command: str, name: str, progress: Say, say: Say
    ) -> None:
        self._folder = folder
        self._recipe = recipe
        self._dense: Loaded | None = dense
        self._groups = groups
        self._command = command
        self._name = name
        self._progress = progress
        self._say = say
        self._source = {"model": recipe.model, "fingerprint": dense.fingerprint}
        self._load = {"load": recipe.load.model_dump(mode="json")}

    def make_all(self) -> tuple[PrunePlan | None, RunReport]:
        """Makes every missing stage, and the summaries of all stages."""
        recipe = self._recipe
        models: dict[str, str | Path] = {"dense": recipe.model}
        plan = None
        self._folder.write("recipe.yaml", to_yaml(recipe))
        if recipe.prune is not None:
            models["pruned"] = pruned = self._prune("pruned" if recipe.recover or recipe.compress else "model")
            plan = from_json(PrunePlan, (pruned / PLAN).read_bytes())
            self._folder.write(PLAN, to_json(plan) + "\n")
        if recipe.compress is not None:
            models["compressed"] = made = self._compress(models.get("pruned"), "compressed" if recipe.recover else "model")
            self._folder.write(FACTORS, (made / FACTORS).read_text(encoding="utf-8"))
        self._dense = None
        before = models.get("compressed", models.get("pruned"))
        ranks = self._allocate(before) if recipe.allocate is not None else None
        if recipe.recover is not None:
            models["recovered"] = self._recover(before, ranks)
        measured = {label: self._measure(label, source) for label, source in models.items()}
        measurements = self._with_speed(models, [_read_measurement(path) for path in measured.values()])
        tasks = [self._on_tasks(label, source) for label, source in models.items()] if self._has_tasks else []
        return plan, self._report(plan, ranks, measurements, measured, models, tasks)

    def _inputs(self, source: str | Path, **settings: Any) -> dict[str, Any]:
        """Returns the inputs of a stage: the checksums of its model, and settings."""
        model = self._source if isinstance(source, str) else {"files": self._folder.checksums(source)}
        named = {key: sha256_of(path) for key, path in files_of(self._recipe).items()}
        return {"model": model, "files": named, **self._load, **settings}

    def _prune(self, name: str) -> Path:
        settings, seed = self._recipe.prune, self._recipe.seed
        assert settings is not None

        def make(folder: Path) -> None:
            dense = self._dense
            assert dense is not None
            kept = settings if settings.cache is not None else settings.model_copy(update={"cache": self._folder.path / SCORES})
            result = prune(dense, None, kept, seed=seed, command=self._command, say=self._progress)
            for note in result.notes:
                self._say(note)
            result.save_pretrained(folder, replace=True)
            write_text(folder / PLAN, to_json(result.plan) + "\n")

        inputs = self._inputs(self._recipe.model, prune=settings.model_dump(mode="json"), seed=seed)
        return self._folder.stage("prune", inputs, make, folder=name)

    def _compress(self, pruned: str | Path | None, name: str) -> Path:
        settings, seed = self._recipe.compress, self._recipe.seed
        assert settings is not None
        source = pruned if pruned is not None else self._recipe.model

        def make(folder: Path) -> None:
            loaded = self._dense if pruned is None else replace(load(source, self._recipe.load), source=self._named(pruned))
            assert loaded is not None
            kept = settings if settings.cache is not None else settings.model_copy(update={"cache": self._folder.path / MOMENTS})
            work = self._folder.work("compress")
            result = compress(loaded, None, kept, seed=seed, resume=True, work=work, command=self._command, say=self._progress)
            for note in result.notes:
                self._say(note)
            result.save_pretrained(folder, replace=True)
            write_text(folder / FACTORS, to_json(result.plan) + "\n")

        path = self._folder.stage("compress", self._inputs(source, compress=settings.model_dump(mode="json"), seed=seed), make, folder=name)
        self._folder.discard("compress")
        return path

    def _named(self, made: str | Path | None) -> str:
        """Returns the name of a model in records: a relative path, because the full path would differ between two runs of one recipe."""
        return f"../{made.name}" if isinstance(made, Path) else self._recipe.model

    def _allocate(self, pruned: str | Path | None) -> Path:
        settings, recover_settings, seed = self._recipe.allocate, self._recipe.recover, self._recipe.seed
        assert settings is not None
        assert recover_settings is not None
        source = pruned if pruned is not None else self._recipe.model

        def make(folder: Path) -> None:
            loaded = load(source, self._recipe.load)
            work = self._folder.work("allocate")
            result = allocate_ranks(
                loaded, None, settings, recover_settings, load=self._recipe.load, seed=seed, work=work, say=self._progress
            )
            for name, text in result.files().items():
                write_text(folder / name, text)

        recovery = recover_settings.model_dump(mode="json")
        inputs = self._inputs(source, allocate=decisive(settings), recover=recovery, seed=seed)
        path = self._folder.stage("allocate", inputs, make, folder="ranks")
        self._folder.discard("allocate")
        return path

    def _recover(self, pruned: str | Path | None, ranks: Path | None) -> Path:
        settings, seed = self._recipe.recover, self._recipe.seed
        assert settings is not None
        if ranks is not None:
            settings = settings.model_copy(update={"ranks": from_json(RankPlan, (ranks / RANKS).read_bytes())})
        source = pruned if pruned is not None else self._recipe.model

        def make(folder: Path) -> None:
            loaded = replace(load(source, self._recipe.load), source=self._named(pruned))
            work = self._folder.work("recover")
            result = recover_model(loaded, None, settings, load=self._recipe.load, seed=seed, resume=True, work=work, command=self._command)
            result.save_pretrained(folder, replace=True)
            done = result.recovered
            facts = {"best_step": done.best_step, "best_loss_nats": done.best_loss, "first_loss_nats": done.first_loss}
            write_text(folder / RECOVERY, _json(facts | {"trainable_parameters": done.trainable_parameters}))

        inputs = self._inputs(source, recover=settings.model_dump(mode="json"), seed=seed)
        path = self._folder.stage("recover", inputs, make, folder="model")
        self._folder.discard("recover")
        return path

    def _measure(self, label: str, source: str | Path) -> Path:
        recipe = self._recipe

        def make(folder: Path) -> None:
            loaded, tokenizer = self._loaded(source)
            settings = recipe.evaluate.model_copy(update={"speed": False})
            measurement = evaluate_model(loaded, settings, seed=recipe.seed, label=label, folder=locate_by(source, recipe.load))
            write_text(folder / MEASUREMENT, to_json(measurement) + "\n")
            if recipe.sample is not None:
                write_text(folder / SAMPLE, continue_text(loaded.model, tokenizer, recipe.sample))

        sample = recipe.sample.model_dump(mode="json") if recipe.sample is not None else None
        settings = recipe.evaluate.model_dump(mode="json", exclude={"speed"})
        inputs = self._inputs(source, evaluate=settings, sample=sample)
        return self._folder.stage(f"measure {label}", inputs, make, folder=f"measured/{label}")

    @property
    def _has_tasks(self) -> bool:
        tasks = self._recipe.tasks
        return tasks is not None and bool(tasks.tasks or tasks.texts)

    def _on_tasks(self, label: str, source: str | Path) -> TaskReport:
        """Scores a model on the tasks and texts of the recipe."""
        recipe, tasks = self._recipe, self._recipe.tasks
        assert tasks is not None

        def make(folder: Path) -> None:
            loaded, _ = self._loaded(source)
            report = evaluate_tasks(loaded, tasks, evaluate=recipe.evaluate, seed=recipe.seed, label=label)
            write_text(folder / TASKS, to_json(report) + "\n")

        inputs = self._inputs(
            source, tasks=tasks.model_dump(mode="json"), evaluate=recipe.evaluate.model_dump(mode="json", exclude={"speed"})
        )
        path = self._folder.stage(f"tasks {label}", inputs, make, folder=f"tasks/{label}")
        return from_json(TaskReport, (path / TASKS).read_bytes())

    def _with_speed(self, models: Mapping[str, str | Path], measurements: Sequence[Measurement]) -> list[Measurement]:
        """Adds speeds, measured in turns, if the recipe requests them."""
        if not self._recipe.evaluate.speed:
            return list(measurements)

        def make(folder: Path) -> None:
            speeds = compare_speed({label: self._loaded(source)[0].model for label, source in models.items()}, seed=self._recipe.seed)
            write_text(folder / TIMINGS, _json({label: to_dict(speed) for label, speed in speeds.items()}))

        inputs = {label: self._inputs(source) for label, source in models.items()}
        path = self._folder.stage("speed", inputs, make, folder="measured/speed") / TIMINGS
        speeds = read_object(path, PlanError) if path.is_file() else {}
        known = {label: from_json(SpeedReport, json.dumps(speed)) for label, speed in speeds.items()}
        return [replace(entry, speed=known[entry.label]) if entry.label in known else entry for entry in measurements]

    def _loaded(self, source: str | Path) -> tuple[Loaded, PreTrainedTokenizerBase]:
        """Loads a model of the run, or an adapter on its base, with its tokenizer."""
        settings = self._recipe.load
        loaded = load_adapted(source, settings) if isinstance(source, Path) and is_adapter(source) else load(source, settings)
        return loaded, require_tokenizer(loaded)

    def _report(
        self,
        plan: PrunePlan | None,
        ranks: Path | None,
        measurements: Sequence[Measurement],
        measured: Mapping[str, Path],
        models: Mapping[str, str | Path],
        tasks: Sequence[TaskReport],
    ) -> RunReport:
        """Writes the summaries of the run: results, samples and the page."""
        recipe, final = self._recipe, list(models.values())[-1]
        recovered = models.get("recovered")
        report = RunReport(
            title=self._name,
            description=recipe.description,
            recipe=to_yaml(recipe),
            measurements=tuple(measurements),
            plan=plan,
            widths=_widths(self._groups, plan) if plan is not None else (),
            factors=self._factors(models.get("compressed")),
            ranks=from_json(RankSearch, (ranks / SEARCH).read_bytes()) if ranks is not None else None,
            curve=_read_curve(recovered) if isinstance(recovered, Path) else (),
            best_step=_read_best_step(recovered) if isinstance(recovered, Path) else None,
            prompt=recipe.sample.prompt if recipe.sample is not None else "",
            samples={label: (path / SAMPLE).read_text(encoding="utf-8") for label, path in measured.items()}
            if recipe.sample is not None
            else {},
            facts=self._facts(final),
            tasks=tuple(tasks),
        )
        self._folder.write("results.json", _json(_results(measurements)))
        if report.samples:
            self._folder.write("samples.json", _json({"prompt": report.prompt, **report.samples}))
        self._folder.write("report.md", to_markdown(report))
        self._folder.write("report.html", to_html(report))
        return report

    def _factors(self, compressed: str | Path | None) -> FactorPlan | None:
        return from_json(FactorPlan, (compressed / FACTORS).read_bytes()) if isinstance(compressed, Path) else None

    def _facts(self, final: str | Path | None) -> dict[str, Any]:
        """Returns the provenance of the run for its page."""
        facts: dict[str, Any] = {
            "command": self._command,
            "model": f"{self._source['model']} (fingerprint {self._source['fingerprint']})",
            "seed": self._recipe.seed,
            "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        }
        if isinstance(final, Path):
            weights = {name: checksum for name, checksum in self._folder.checksums(final).items() if name.endswith(".safetensors")}
            facts |= {f"SHA-256 of {final.name}/{name}": checksum for name, checksum in weights.items()}
        return facts


def _widths(groups: Groups, plan: PrunePlan) -> tuple[Width, ...]:
    return tuple(Width(row["group"], row["before"], row["after"]) for row in plan_summary(groups, plan))


def _read_measurement(folder: Path) -> Measurement:
    return from_json(Measurement, (folder / MEASUREMENT).read_bytes())


def _read_curve(folder: Path) -> tuple[CurvePoint, ...]:
    path = folder / LOSS_LOG
    try:
        rows = csv.DictReader(io.StringIO(read_bytes(path, PlanError).decode("utf-8")))
        numbers = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
        return tuple(CurvePoint(int(row["step"] or 0), row["train_loss_nats"], row["held_out_loss_nats"]) for row in numbers)
    except (ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"'{path}' is damaged ({shown(error, 100)}); remove '{folder}' and run again with `resume`") from None


def _read_best_step(folder: Path) -> int:
    path = folder / RECOVERY
    return whole_number(read_object(path, PlanError).get("best_step"), f"'{path}': best_step", 0, 10**9, PlanError)


def _results(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Returns label to flat measurement; the entry of the recovered model also has cost and gain."""
    results = {entry.label: flat(entry) for entry in measurements}
    won = won_back(measurements)
    if won is not None:
        results["recovered"] |= asdict(won) | {"won_back_share": won.share}
    return results


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
