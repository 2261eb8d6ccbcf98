"""A recipe: the model and the settings of all stages, checked completely before anything is computed.

A recipe is a YAML file whose sections are those of :mod:`regraft.settings`. An absent section means that its stage is left out
(``prune``, ``compress``, ``allocate``, ``recover``, ``tasks``, ``sample``) or uses its defaults (``load``, ``evaluate``); ``prune: {}``
requests the stage with its defaults. Relative paths, in the file and in overrides, are relative to the current directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, get_origin

from pydantic import Field, ValidationError

from regraft.data.hub import is_dataset
from regraft.errors import ConfigError, InputError, RegraftError, did_you_mean
from regraft.pipelines.prune.resolved import resolve
from regraft.pipelines.ranks.allocate import check_settings
from regraft.pipelines.run.strict_yaml import YamlText, read_value, read_yaml, write_yaml
from regraft.reading import is_file, is_folder, read_bytes
from regraft.settings import (
    EVERY_PROJECTION,
    AllocateSettings,
    CompressSettings,
    EvaluateSettings,
    LoadSettings,
    PruneSettings,
    RecoverSettings,
    SampleSettings,
    Settings,
    TaskSettings,
    problems_of,
)

SECTIONS: dict[str, type[Settings]] = {
    "load": LoadSettings,
    "prune": PruneSettings,
    "compress": CompressSettings,
    "allocate": AllocateSettings,
    "recover": RecoverSettings,
    "evaluate": EvaluateSettings,
    "tasks": TaskSettings,
    "sample": SampleSettings,
}
_SUFFIXES = (".yaml", ".yml")

LARGEST_RECIPE_BYTES = 1 << 20


class Recipe(Settings):
    """The model and the settings of all stages of a run."""

    description: str = Field(default="", description="one line for people")
    model: Annotated[str, Field(min_length=1)] = Field(description="a model folder, a hub id, or: seedling")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="seed of everything that is random")
    load: LoadSettings = Field(default=LoadSettings(), description="how the model is loaded")
    prune: PruneSettings | None = Field(default=None, description="what is cut; left out: nothing")
    compress: CompressSettings | None = Field(default=None, description="linear layers as two thin ones, after the cut; left out: none")
    allocate: AllocateSettings | None = Field(default=None, description="how a rank is found for every layer; left out: one for all")
    recover: RecoverSettings | None = Field(default=None, description="how quality is won back; left out: not at all")
    evaluate: EvaluateSettings = Field(default=EvaluateSettings(), description="what is measured, and on what")
    tasks: TaskSettings | None = Field(default=None, description="tasks and more texts for every model; left out: none")
    sample: SampleSettings | None = Field(default=None, description="a sample of text from each model; left out: none")


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema of recipes: keys, types, limits, defaults and descriptions, without the words of other libraries."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "regraft recipe"} | Recipe.model_json_schema()


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with regraft, by name."""
    folder = Path(str(files("regraft"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(source: str) -> Path:
    """Returns the file of a recipe: a path, or the name of one that comes with regraft.

    Raises:
        InputError: The path does not exist, and there is no recipe of this name.
    """
    path, shipped = Path(source), shipped_recipes()
    if is_file(path):
        return path
    if source in shipped:
        return shipped[source]
    known = ", ".join(shipped)
    if is_folder(path):
        raise InputError(f"recipe '{source}' is a folder; give a YAML file or one of: {known}")
    raise InputError(f"recipe '{source}' not found; give a YAML file or one of: {known}{did_you_mean(source, shipped)}")


def read_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        source: A YAML file, or the name of a recipe that comes with regraft.
        overrides: ``key=value`` with dotted keys, such as ``prune.ratio=0.3``; the value is YAML. ``recover=null`` removes a stage.

    Raises:
        InputError: The recipe does not exist.
        ConfigError: At least one key or value is wrong; all problems are listed, keys with their line numbers.
    """
    path = find_recipe(source)
    try:
        text = read_bytes(path, InputError, LARGEST_RECIPE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"recipe '{path}' cannot be read as UTF-8 text: {error}; give a YAML file") from None
    document = read_yaml(text, path.name)
    if not isinstance(document.values, dict):
        raise ConfigError(path.name, ["not a recipe: it holds no keys; start from one that comes with regraft: `regraft run --list`"])
    problems = [*document.problems, *_empty_sections(document)]
    values = {str(key): value for key, value in document.values.items()}
    problems += _override(values, document, overrides)
    recipe, wrong = check_recipe(values)
    problems += [_with_line(problem, document.lines) for problem in wrong]
    if problems or recipe is None:
        raise ConfigError(path.name, list(dict.fromkeys(problems)))
    return recipe


def check_recipe(values: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    """Checks the keys and values of a recipe, and their combinations.

    Args:
        values: Plain data from YAML.

    Returns:
        The recipe, or None if it is invalid, and one line for each problem.
    """
    values = {key: _listed(SECTIONS[key], value) if key in SECTIONS else value for key, value in values.items()}
    problems: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += problems_of(error, Recipe)
    problems += _contradictions(_sound_sections(values))
    return recipe, problems


def to_yaml(recipe: Recipe) -> str:
    """Returns a recipe as YAML with every key; :func:`read_recipe` reads it back to an equal one."""
    return write_yaml(recipe.model_dump(mode="json"))


def _empty_sections(document: YamlText) -> Iterator[str]:
    for name in SECTIONS:
        if name in document.empty:
            line = document.lines[name]
            yield f"{name} (line {line}): nothing follows; write {{}} for the defaults, or null to leave the stage out"
            document.values.pop(name)


def _override(values: dict[str, Any], document: YamlText, overrides: Sequence[str]) -> Iterator[str]:
    """Writes overrides into the values; yields their problems."""
    for text in overrides:
        key, equals, value = text.partition("=")
        *sections, name = key.strip().split(".")
        if not equals or not all([*sections, name]):
            yield f"override '{text}' is not key=value; write it as prune.ratio=0.3"
            continue
        target: Any = values
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                yield f"override '{text}': '{section}' holds no keys"
                break
        else:
            try:
                target[name] = _override_value(sections, name, value)
                document.lines.pop(key.strip(), None)
            except ConfigError as error:
                yield f"override '{text}': {error.problems[0]}"


def _override_value(sections: Sequence[str], name: str, text: str) -> Any:
    """Reads the value of an override as YAML; for a text key, a value that is not text in YAML is used literally."""
    section = SECTIONS.get(sections[0], Recipe) if sections else Recipe
    holds_text = name in section.model_fields and section.model_fields[name].annotation is str
    try:
        value = read_value(text)
    except ConfigError:
        if not holds_text:
            raise
        return text
    return text if holds_text and not isinstance(value, str) else value


def _listed(section: type[Settings], values: Any) -> Any:
    """Converts texts such as ``targets: heads,ffn`` to lists, as on the command line."""
    if not isinstance(values, Mapping):
        return values
    lists = {word for word, name in section.words().items() if get_origin(section.model_fields[name].annotation) is tuple}

    def listed(text: str) -> Any:
        return text if text == EVERY_PROJECTION else tuple(part.strip() for part in text.split(",") if part.strip())

    return {key: listed(value) if isinstance(value, str) and key in lists else value for key, value in values.items()}


def _sound_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sections without their invalid keys, so that the combinations of the others are checked in the same pass."""
    sound: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        section = values.get(name)
        if not isinstance(section, Mapping):
            continue
        try:
            sound[name] = kind.model_validate(section)
        except ValidationError as error:
            wrong = {problem["loc"][0] for problem in error.errors()}
            sound[name] = kind.model_validate({key: value for key, value in section.items() if key not in wrong})
    return sound


def _contradictions(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yields contradictions between values that are valid separately."""
    prune: PruneSettings | None = sections.get("prune")
    recover: RecoverSettings | None = sections.get("recover")
    evaluate: EvaluateSettings | None = sections.get("evaluate")
    if prune is not None:
        yield from _prune_contradictions(prune)
    if sections.get("compress") is not None:
        yield from _compress_contradictions(sections["compress"], allocating=sections.get("allocate") is not None)
    if recover is not None and recover.data is not None:
        yield from _no_file("recover.data", recover.data)
    if recover is not None and recover.task != "language":
        yield f"recover.task: {recover.task} has labels, which a run does not measure; use: regraft recover"
    if sections.get("allocate") is not None:
        yield from _allocate_contradictions(sections["allocate"], recover)
    if evaluate is not None:
        if evaluate.window is not None and evaluate.stride is not None and evaluate.stride > evaluate.window:
            yield (
                f"evaluate.stride: {evaluate.stride} exceeds evaluate.window {evaluate.window}, which would leave tokens out; "
                f"use at most {evaluate.window}"
            )
        if evaluate.text is not None:
            yield from _no_file("evaluate.text", evaluate.text)
    tasks: TaskSettings | None = sections.get("tasks")
    if tasks is not None:
        for path in [*tasks.texts, *(Path(name) for name in tasks.tasks if Path(name).suffix)]:
            yield from _no_file("tasks", path)


def _prune_contradictions(prune: PruneSettings) -> Iterator[str]:
    if prune.shape == "uniform" and "shape" in prune.model_fields_set and _spares_layers(prune.layers):
        yield (
            f"prune.layers: '{prune.layers}' spares layers, but prune.shape is uniform, the same width in every layer; "
            "drop layers or use shape: per-layer"
        )
    if prune.memory is not None:
        yield (
            "prune.memory: a run loads the whole model to measure it, so that no bound can hold; leave it out, or prune by itself with "
            "`regraft prune MODEL --memory 6GB`"
        )
    if prune.targets:
        yield from _unresolved(prune)
    else:
        yield "prune.targets: names nothing to prune; use heads, ffn or others"
    if prune.calibration is not None:
        yield from _no_file("prune.calibration", prune.calibration)


def _compress_contradictions(compress: CompressSettings, *, allocating: bool) -> Iterator[str]:
    if compress.memory is not None:
        yield (
            "compress.memory: a run loads the whole model to measure it, so that no bound can hold; leave it out, or compress by itself "
            "with `regraft compress MODEL --memory 4GB`"
        )
    if compress.test is not None:
        yield "compress.test: a run measures every model on evaluate.text; leave it out"
    if allocating:
        yield "allocate: ranks of adapters are not searched for factored layers; leave allocate or compress out"
    for key, path in (("compress.calibration", compress.calibration), ("compress.validation", compress.validation)):
        if path is not None:
            yield from _no_file(key, path)


def _allocate_contradictions(allocate: AllocateSettings, recover: RecoverSettings | None) -> Iterator[str]:
    if recover is None:
        yield "allocate: ranks are for recovery, and there is no section recover; add one, or leave allocate out"
        return
    if recover.ranks is not None:
        yield "recover.ranks: the ranks come from allocate; leave one of the two out"
    if recover.alpha is not None:
        yield "recover.alpha: a rank plan brings its own alpha; leave it out, or leave allocate out"
    if recover.targets:
        yield "recover.targets: ranks are allocated to every projection of every layer; leave it out, or leave allocate out"
    try:
        check_settings(allocate, recover)
    except RegraftError as error:
        yield f"allocate: {error}"


def _unresolved(prune: PruneSettings) -> Iterator[str]:
    try:
        resolve(prune)
    except RegraftError as error:
        yield f"prune.select: {error}"


def _spares_layers(layers: str) -> bool:
    """Returns whether a range leaves layers out for every number of layers."""
    start, stop, step = ([int(part) if part.strip() else None for part in layers.split(":")] + [None])[:3]
    return (start or 0) > 0 or (stop is not None and stop < 0) or abs(step or 1) > 1


def _no_file(key: str, path: Path) -> Iterator[str]:
    if not is_file(path) and not is_dataset(path):
        yield f"{key}: no file at '{path}'; paths are relative to the current directory"


def _with_line(problem: str, lines: Mapping[str, int]) -> str:
    """Adds the line number of the key at the start of a problem."""
    key, colon, rest = problem.partition(":")
    line = lines.get(key)
    return f"{key} (line {line}){colon}{rest}" if line is not None else problem
