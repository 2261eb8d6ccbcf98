from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from regraft.cli.options import ModelArgument, SeedOption, with_settings
from regraft.cli.words import as_options
from regraft.errors import ConfigError
from regraft.settings import EvaluateSettings, LabelSettings, LoadSettings, PruneSettings, RecoverSettings, SampleSettings, Settings


class Sauce(Settings):
    """A section with one field of every shape."""

    amount: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(default=0.5, description="how much")
    kind: Literal["red", "white"] = Field(default="red", description="which")
    made_of: tuple[Literal["tomato", "cream", "wine"], ...] = Field(default=("tomato",), description="what goes in")
    recipe_file: Path | None = Field(default=None, description="where it is written down")
    spoons: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(default="auto", description="how many")
    warm: bool = Field(default=True, description="heat it")
    spicy: bool = Field(default=False, description="add pepper")


class Plate(Settings):
    """A second section."""

    size_cm: int = Field(default=24, description="diameter")


def serve(*arguments: str) -> tuple[Sauce, Plate, str, int]:
    """Runs a command with both sections and returns what it was called with."""
    seen: list[tuple[Sauce, Plate, str, int]] = []

    @with_settings
    def dish(model: ModelArgument, sauce: Sauce, plate: Plate, seed: SeedOption = 3) -> None:
        """Serve a dish."""
        seen.append((sauce, plate, model, seed))

    app = typer.Typer()
    app.command()(dish)
    result = CliRunner().invoke(app, ["pasta", *arguments])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


def test_defaults_are_those_of_the_sections() -> None:
    assert serve() == (Sauce(), Plate(), "pasta", 3)


def test_every_shape_of_option() -> None:
    sauce, plate, _, seed = serve(
        *("--amount", "2e-1", "--kind", "white", "--made-of", "cream,wine", "--recipe-file", "a.txt", "--spoons", "2"),
        *("--no-warm", "--spicy", "--size-cm", "30", "--seed", "9"),
    )
    assert sauce == Sauce(amount=0.2, kind="white", made_of=("cream", "wine"), recipe_file=Path("a.txt"), spoons=2, warm=False, spicy=True)
    assert plate == Plate(size_cm=30)
    assert seed == 9


def test_tuples_are_repeatable_and_take_commas() -> None:
    assert serve("--made-of", "cream", "--made-of", "wine, tomato")[0].made_of == ("cream", "wine", "tomato")


def test_all_problems_of_all_sections_at_once_by_the_names_of_the_options() -> None:
    with pytest.raises(ConfigError) as caught:
        serve("--amount", "nan", "--kind", "rde", "--made-of", "cream,milk", "--spoons", "-1", "--size-cm", "x")
    assert caught.value.source == "command line"
    assert list(caught.value.problems) == [
        "--amount: should be above 0.0 and below 1.0 (got 'nan')",
        "--kind: should be 'red' or 'white' (got 'rde'); did you mean 'red'?",
        "--made-of: should be 'tomato', 'cream' or 'wine' (got 'milk')",
        "--spoons: should be greater than 0 or 'auto' (got '-1')",
        "--size-cm: should be a whole number (got 'x')",
    ]


def test_the_command_keeps_its_name_and_help() -> None:
    @with_settings
    def dish(sauce: Sauce) -> None:
        """Serve a dish."""

    assert dish.__name__ == "dish"
    assert dish.__doc__ == "Serve a dish."
    assert list(inspect.signature(dish).parameters)[1:] == list(Sauce.model_fields)


def test_sections_that_share_a_name_are_a_defect() -> None:
    def dish(first: Sauce, second: Sauce) -> None: ...

    with pytest.raises(AssertionError, match="collide"):
        with_settings(dish)


@pytest.mark.parametrize("kind", [LoadSettings, PruneSettings, RecoverSettings, EvaluateSettings, SampleSettings])
def test_every_field_of_every_section_is_an_option_with_its_default_and_help(kind: type[Settings]) -> None:
    seen: list[Settings] = []

    def command(section: Settings) -> None:
        seen.append(section)

    command.__annotations__["section"] = kind
    app = typer.Typer()
    app.command()(with_settings(command))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0, result.output
    assert seen == [kind()]
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "900", "TERMINAL_WIDTH": "900"}).output
    for name, field in kind.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description is not None
        assert as_options(field.description) in text


KINDS = (LoadSettings, PruneSettings, RecoverSettings, EvaluateSettings, LabelSettings)
ALIASED = [(kind, word, name) for kind in KINDS for word, name in kind.aliases.items()]
VALUES = {
    "dtype": "float32", "device": "cpu", "rank": "3", "alpha": "2.5", "dropout": "0.1", "targets": "q_proj,v_proj", "steps": "7",
    "epochs": "1", "batch": "3", "accumulate": "2", "lr": "0.01", "lr_ratio": "4", "schedule": "linear", "warmup": "0.1",
    "eval_every": "5", "patience": "2", "seq_len": "32", "window": "32",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "word", "name"), ALIASED, ids=lambda value: getattr(value, "__name__", value))
def test_words_of_other_libraries_are_options_too_and_not_in_the_help(kind: type[Settings], word: str, name: str) -> None:
    seen: list[Settings] = []

    def command(section: Settings) -> None:
        seen.append(section)

    command.__annotations__["section"] = kind
    app = typer.Typer()
    app.command()(with_settings(command))
    theirs, ours = (f"--{text.replace('_', '-')}" for text in (word, name))
    for option in (theirs, ours):
        result = CliRunner().invoke(app, [option, VALUES[name]])
        assert result.exit_code == 0, result.output
    assert seen[0] == seen[1] != kind()
    both = CliRunner().invoke(app, [ours, VALUES[name], theirs, VALUES[name]])
    assert isinstance(both.exception, ConfigError)
    assert list(both.exception.problems) == [f"{ours} and {theirs} are one setting; give one of the two"]
    assert f"{theirs} " not in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "500", "TERMINAL_WIDTH": "500"}).output


def test_only_typed_options_are_settings_that_were_asked_for() -> None:
    sauce, plate, _, _ = serve("--amount", "0.5", "--size-cm", "30")
    assert sauce.model_fields_set == {"amount"}
    assert plate.model_fields_set == {"size_cm"}
    assert serve()[0].model_fields_set == set()
