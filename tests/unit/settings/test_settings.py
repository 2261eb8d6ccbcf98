from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import SchedulerType

from regraft.errors import ConfigError, InputError, RegraftError
from regraft.importance import CRITERIA
from regraft.registry import built_in
from regraft.settings import (
    AllocateSettings,
    EvaluateSettings,
    LoadSettings,
    PruneSettings,
    RecoverSettings,
    SampleSettings,
    Settings,
    checked,
    problems_of,
    sections,
)
from regraft.settings.base import BY_CONTENT, NO_EFFECT

ALL = [LoadSettings, PruneSettings, RecoverSettings, EvaluateSettings, SampleSettings]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_defaults_are_valid_described_and_survive_json(kind: type[Settings]) -> None:
    settings = kind()
    assert kind.model_validate_json(settings.model_dump_json()) == settings
    assert all(field.description for field in kind.model_fields.values())


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_settings_cannot_be_changed(kind: type[Settings]) -> None:
    name = next(iter(kind.model_fields))
    with pytest.raises(InputError, match=f"{kind.__name__} does not change"):
        setattr(kind(), name, "other")


@pytest.mark.parametrize(
    ("kind", "values", "line"),
    [
        (PruneSettings, {"ratio": 0}, "ratio: should be above 0.0 and below 1.0 (got 0)"),
        (PruneSettings, {"ratio": 1}, "ratio: should be above 0.0 and below 1.0 (got 1)"),
        (PruneSettings, {"ratio": -1.0}, "ratio: should be above 0.0 and below 1.0 (got -1.0)"),
        (PruneSettings, {"ratio": float("nan")}, "ratio: should be above 0.0 and below 1.0 (got nan)"),
        (PruneSettings, {"ratio": "lots"}, "ratio: should be a number (got 'lots')"),
        (PruneSettings, {"ration": 0.2}, "ration: unknown key; did you mean 'ratio'?"),
        (PruneSettings, {"shape": "unifrm"}, "shape: should be 'uniform' or 'per-layer' (got 'unifrm'); did you mean 'uniform'?"),
        (PruneSettings, {"align": 0}, "align: should be greater than 0 or 'auto' (got 0)"),
        (PruneSettings, {"samples": 1.5}, "samples: should be a whole number (got 1.5)"),
        (
            PruneSettings,
            {"targets": ["heads", "ears"]},
            "targets.1: should be 'heads', 'ffn', 'query_heads', 'mixer_heads', 'residual', 'layers', 'attention', 'mlp', 'vocabulary', "
            "'experts' or 'expert_ffn' (got 'ears')",
        ),
        (PruneSettings, {"targets": 3}, "targets: should be a list (got 3)"),
        (RecoverSettings, {"lr": 0}, "lr: should be above 0.0 (got 0)"),
        (RecoverSettings, {"lr": float("inf")}, "lr: should be above 0.0 (got inf)"),
        (RecoverSettings, {"steps": 0}, "steps: should be above 0 (got 0)"),
        (RecoverSettings, {"merge": "perhaps"}, "merge: should be true or false (got 'perhaps')"),
        (EvaluateSettings, {"bos": 7}, "bos: should be true or false or 'auto' (got 7)"),
        (EvaluateSettings, {"text": 3}, "text: should be a file name (got 3)"),
        (LoadSettings, {"dtype": "float31"}, "did you mean 'float32'?"),
    ],
)
def test_a_wrong_value_is_one_line_with_value_and_limit(kind: type[Settings], values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(kind, values, "command line")
    assert len(caught.value.problems) == 1
    assert line in str(caught.value)
    assert str(caught.value).startswith("command line: ")
    assert "\n" not in str(caught.value)


def test_words_of_transformers_for_schedules_and_lengths() -> None:
    assert RecoverSettings(lr_scheduler_type="constant_with_warmup") == RecoverSettings(schedule="constant")
    assert RecoverSettings(lr_scheduler_type=SchedulerType.LINEAR) == RecoverSettings(schedule="linear")
    assert SampleSettings(max_new_tokens=7).tokens == 7
    with pytest.raises(ConfigError, match="should be 'cosine', 'linear' or 'constant' \\(got 'polynomial'\\)"):
        RecoverSettings(lr_scheduler_type="polynomial")


def test_all_problems_are_found_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        checked(PruneSettings, {"ratio": 2, "shape": "x", "smaples": 3, "seq_len": -1}, "recipe.yaml")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["ratio", "shape", "seq_len", "smaples"]
    assert str(caught.value).startswith("recipe.yaml: 4 problems\n  - ratio: ")


@pytest.mark.parametrize("layers", [":", "1:", ":-1", "1:-1", "-3:", "0:8:2", "::-1", " 1 : 2 "])
def test_ranges_of_layers(layers: str) -> None:
    assert PruneSettings(layers=layers).layers == layers
    parts = [int(part) if part.strip() else None for part in layers.split(":")]
    assert len(range(10)[slice(*parts)]) > 0


@pytest.mark.parametrize("layers", ["", "1", "a", "1:b", "1:2:3:4", "--1:", "1:--1", "²:", "::0", ":: -00", "1.5:"])
def test_what_is_no_range_of_layers(layers: str) -> None:
    with pytest.raises(ConfigError, match="is not a range of layers; write it as START:STOP, such as 1:-1"):
        checked(PruneSettings, {"layers": layers}, "command line")


@given(st.text(max_size=8) | st.text(alphabet="0123-: ", max_size=8))
def test_a_range_that_is_accepted_can_be_used(layers: str) -> None:
    try:
        accepted = PruneSettings(layers=layers).layers
    except ConfigError:
        return
    range(10)[slice(*[int(part) if part.strip() else None for part in accepted.split(":")])]


def test_text_from_a_command_line_is_read_as_values() -> None:
    values = {"ratio": "0.3", "align": "8", "samples": "4", "calibration": "a.txt", "targets": ("ffn",)}
    assert checked(PruneSettings, values, "command line") == PruneSettings(
        ratio=0.3, align=8, samples=4, calibration=Path("a.txt"), targets=("ffn",)
    )
    assert checked(PruneSettings, {"align": "auto"}, "command line").align == "auto"
    assert checked(EvaluateSettings, {"bos": "false"}, "command line").bos is False


def test_nested_problems_name_the_section() -> None:
    class Recipe(Settings):
        model: str
        prune: PruneSettings | None = None

    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"prune": {"ratio": 3, "x": 1}, "prnue": {}})
    assert problems_of(caught.value, Recipe) == [
        "model: required, but not given",
        "prune.ratio: should be above 0.0 and below 1.0 (got 3)",
        f"prune.x: unknown key; known: {', '.join(PruneSettings.model_fields)}",
        "prnue: unknown key; did you mean 'prune'?",
    ]


@pytest.mark.parametrize("section", [PruneSettings, RecoverSettings, AllocateSettings])
def test_what_decides_a_result_is_every_field_but_those_declared_otherwise(section: type[Settings]) -> None:
    """Keys of caches and of resumed runs are made of these: a new field belongs to them until it says that it does not."""
    declared = {name for name, field in section.model_fields.items() if field.json_schema_extra in (NO_EFFECT, BY_CONTENT)}
    assert (
        declared
        == {
            PruneSettings: {"memory", "cache"},
            RecoverSettings: {"data", "ranks", "teacher", "held_out", "merge", "report_to", "quiet", "teacher_cache"},
            AllocateSettings: {"prior", "store", "workers", "storage", "ray"},
        }[section]
    )
    assert set(section().decisive()) == set(section.model_fields) - declared
    name = next(iter(set(section.model_fields) - declared))
    assert name not in section().decisive(varied=(name,))


def test_criteria_of_plug_ins_are_taken_and_listed_where_they_can_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "examples" / "plugin")
    spread = importlib.import_module("regraft_example_plugin").SPREAD
    deep = replace(spread, name="deep", scores=("layer", "attention", "mlp"))
    both = replace(spread, name="both", scores=("ffn", "layer", "attention", "mlp"))
    for criterion in (spread, deep, both):
        monkeypatch.setitem(CRITERIA._values, criterion.name, criterion)
    for field, fit, unfit in (("criterion", "spread", "deep"), ("depth", "deep", "spread")):
        assert {getattr(PruneSettings.model_validate({field: name}), field) for name in (fit, "both")} == {fit, "both"}
        for name in (unfit, "nonsense"):
            wrong: dict[str, Any] = {field: name}
            with pytest.raises(RegraftError) as caught:
                PruneSettings(**wrong)
            listed = str(caught.value).partition("use one of" if name == unfit else "known:")[2].replace(";", ",").split(", ")
            assert {fit, "both"} <= {word.strip() for word in listed}
            assert unfit not in {word.strip() for word in listed}


def test_settings_know_which_built_in_criteria_score_layers() -> None:
    parts = {name for name in built_in("criterion") if "layer" in CRITERIA.get(name).scores}
    assert parts == {name for name in built_in("criterion") if name in sections._NOT_OF_UNITS}
