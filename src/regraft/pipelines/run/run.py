"""Run of a recipe: check it against the model, then make its stages in a run folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.adapters import ADAPTERS
from regraft.atomic import sha256_of
from regraft.data.tokens import window_tokens
from regraft.errors import ConfigError, RegraftError
from regraft.evaluation.loss import window_and_stride
from regraft.evaluation.size import measure_size
from regraft.groups.discover import USUAL, discover
from regraft.in_short import in_short
from regraft.models.load import Loaded, load, locate_by, require_tokenizer
from regraft.models.view import ModelView
from regraft.pipelines.compress.compress import compressor_of
from regraft.pipelines.compress.prepare import needs_judging, projections_of
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.prune.resolved import kinds_wanted, layers_in, resolve
from regraft.pipelines.prune.sources import check_text_sources
from regraft.pipelines.run.folder import RUN_FILE, open_run, refuse_begun
from regraft.pipelines.run.page import write_page
from regraft.pipelines.run.recipe import Recipe, find_recipe, read_recipe
from regraft.pipelines.run.stages import RunOrder, files_of, make_smaller, make_trained, measure
from regraft.pipelines.texts import text_for
from regraft.plans import Groups, Measurement, PrunePlan, SizeReport
from regraft.progress import Say, say_nothing
from regraft.reading import is_file, path_of
from regraft.report.summary import RunReport
from regraft.settings import CALIBRATION_TOKENS, TRAINING_TOKENS, CompressSettings
from regraft.surgery.cut import cut
from regraft.training.job import check_trackers, read_ranks


@dataclass(frozen=True, repr=False)
class RunResult:
    """Result of a run.

    Attributes:
        path: The run folder; None after a dry run.
        recipe: The recipe with every key.
        groups: All prunable groups of the dense model.
        plan: The prune plan; None when nothing was cut.
        sizes: Label to size in memory, of the dense model and, after a dry run, of the pruned model.
        report: Contents of the run's page; None after a dry run.
    """

    path: Path | None
    recipe: Recipe
    groups: Groups
    plan: PrunePlan | None
    sizes: Mapping[str, SizeReport]
    report: RunReport | None

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)

    @property
    def measurements(self) -> dict[str, Measurement]:
        """The measurements by label: dense, pruned, compressed, recovered; empty after a dry run."""
        return {entry.label: entry for entry in self.report.measurements} if self.report is not None else {}


def run(
    source: str | Path,
    output: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    dry_run: bool = False,
    say: Say = say_nothing,
    progress: Say = say_nothing,
) -> RunResult:
    """Runs a recipe.

    Args:
        source: A YAML file, or the name of a recipe that comes with regraft.
        output: The run folder; None for ``runs/`` and the recipe's name.
        overrides: ``key=value`` with dotted keys, such as ``prune.ratio=0.3``.
        resume: Whether to continue a stopped run. Finished stages are checked and kept.
        dry_run: Whether to check and plan only, without writing.
        say: Called with one line at each step of progress.
        progress: Called with the current action, for a status line.

    Raises:
        ConfigError: The recipe is wrong; all problems are listed.
        OutputError: The run folder exists and ``resume`` is False, or it cannot be written.
        RegraftError: Anything else that the user can mend, in one line.
    """
    source = str(path_of(source, "recipe"))
    recipe = read_recipe(source, overrides)
    file = find_recipe(source)
    name = file.stem
    path = Path(output) if output is not None else Path("runs") / name
    if not (resume or dry_run or is_file(path / RUN_FILE)):  # that a run lies there is said after what is wrong with the files
        refuse_begun(path)
    dense = load(recipe.model, recipe.load)
    check_fit(recipe, dense, file.name)
    groups = discover(dense.model, kinds_wanted(recipe.prune) if recipe.prune is not None else USUAL)
    if dry_run:
        return _dry_run(recipe, dense, groups, progress, say)
    asked = file.name if file.suffix and source != name else name
    command = shlex.join(["regraft", "run", asked, *overrides])
    with open_run(path, _identity(recipe, dense), resume=resume, say=say) as folder:
        order = RunOrder(folder, recipe, dense.fingerprint, command, name, progress, say)
        smaller = make_smaller(order, dense)
        del dense  # frees its memory: what follows loads its models from the folders of the run
        made = make_trained(order, smaller)
        report = write_page(order, groups, made, measure(order, made))
    sizes = {entry.label: entry.size for entry in report.measurements}
    return RunResult(path, recipe, groups, made.plan, sizes, report)


def check_fit(recipe: Recipe, dense: Loaded, source: str) -> None:
    """Checks a recipe against the model and the files that it names, before anything is computed.

    Raises:
        ConfigError: Something does not fit; everything is listed.
    """
    problems: list[str] = []
    for key, check in _checks(recipe, dense):
        try:
            check()
        except RegraftError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise ConfigError(source, problems)


def _checks(recipe: Recipe, dense: Loaded) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields what to check under which key; each raises a RegraftError when it is wrong."""
    config, prune, settings = dense.model.config, recipe.prune, recipe.recover
    yield "model", lambda: require_tokenizer(dense)
    if prune is not None:
        layers = len(ModelView(dense.model).layers)
        yield "prune.layers", lambda: layers_in(prune.layers, layers)
        yield "prune.seq_len", lambda: window_tokens(prune.seq_len, CALIBRATION_TOKENS, config, "seq_len")
        yield (
            "prune.calibration",
            lambda: check_text_sources(dense, prune) if resolve(prune).needs_text else None,
        )
    compressing = recipe.compress
    if compressing is not None:
        yield "compress.method", lambda: compressor_of(compressing.method, compressing)
        yield "compress.seq_len", lambda: window_tokens(compressing.seq_len, CALIBRATION_TOKENS, config, "`seq_len`")
        yield "compress.targets", lambda: projections_of(ModelView(dense.model), compressing.targets)
        yield (
            "compress.calibration",
            lambda: text_for(dense, compressing.calibration, "validation", "calibration") if _reads_calibration(compressing) else None,
        )
    if settings is not None:
        yield "recover.adapter", lambda: ADAPTERS.get(settings.adapter)
        yield "recover.report_to", lambda: check_trackers(settings.report_to)
        yield "recover.ranks", lambda: read_ranks(settings.ranks)
        yield "recover.seq_len", lambda: window_tokens(settings.seq_len, TRAINING_TOKENS, config, "seq_len")
        yield "recover.data", lambda: text_for(dense, settings.data, "train", "data")
    yield "evaluate.window", lambda: window_and_stride(dense.model, recipe.evaluate)
    yield "evaluate.text", lambda: text_for(dense, recipe.evaluate.text, "test", "text")


def _reads_calibration(compress: CompressSettings) -> bool:
    fits = compressor_of(compress.method, compress).looks_at != "weights"
    return fits or (needs_judging(compress) and compress.validation is None)


def _identity(recipe: Recipe, dense: Loaded) -> dict[str, Any]:
    """Returns what a run is of: its recipe, its model, and the contents of the files that it reads."""
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"description"}),
        "fingerprint of the model": dense.fingerprint,
        "contents of": {key: sha256_of(path) for key, path in files_of(recipe).items()},
    }


def _dry_run(recipe: Recipe, dense: Loaded, groups: Groups, progress: Say, say: Say) -> RunResult:
    context, _ = window_and_stride(dense.model, recipe.evaluate)
    sizes = {"dense": measure_size(dense.model, locate_by(recipe.model, recipe.load), context)}
    if recipe.prune is None:
        return RunResult(None, recipe, groups, None, sizes, None)
    result = prune(dense, None, recipe.prune, seed=recipe.seed, dry_run=True, say=progress)
    for note in result.notes:
        say(note)
    plan = result.plan
    sizes["pruned"] = measure_size(cut(dense.model, groups, plan), None, context)
    return RunResult(None, recipe, groups, plan, sizes, None)
