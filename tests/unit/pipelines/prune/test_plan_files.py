"""Plans that are written and replayed: the same bytes as the run that they are of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from folders import provenance, tiny_tokenizer
from regraft.cli.app import run
from regraft.errors import InputError, OutputError, PlanError
from regraft.models.save import save
from regraft.pipelines.prune import resolved
from regraft.pipelines.prune.plan_files import plan_path, read_plan, write_plan
from regraft.pipelines.prune.prune import prune, replay
from regraft.plans import Cut, PrunePlan, from_json
from regraft.settings import PruneSettings
from slicing import files_of

PLAN = PrunePlan("f" * 16, "planted", "planted", "per-layer", 0.1, 1, 100, 90, (Cut("layers.0.ffn", (0, 1, 2)),))
TEXT = "\n\n".join(f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(40))


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Path:
    path = tmp_path / "model"
    make_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


def settings(folder: Path, **changes: Any) -> PruneSettings:
    return PruneSettings(
        **{"calibration": folder.parent / "text.txt", "samples": 10, "seq_len": 20, "align": 2, "shape": "per-layer", **changes}
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name.endswith(".safetensors") or name == "config.json"}


def arguments(folder: Path, *more: str) -> list[str]:
    return ["prune", str(folder), "--calibration", str(folder.parent / "text.txt"), "--samples", "10", "--seq-len", "20", *more]


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"criterion": "taylor", "select": "global", "order": "mixed"}, {"criterion": "l1", "rounds": 2}])
def test_a_replay_gives_the_bytes_of_the_run(folder, tmp_path, given):
    direct = prune(folder, tmp_path / "direct", settings(folder, **given), seed=3)
    planned = prune(folder, None, settings(folder, **given), seed=3, dry_run=True).plan
    assert planned == direct.plan
    path = write_plan(planned, tmp_path / "plan.json")
    replayed = replay(folder, read_plan(path), tmp_path / "replayed")
    assert replayed.plan == direct.plan
    assert weights(tmp_path / "replayed") == weights(tmp_path / "direct")
    record = json.loads((tmp_path / "replayed" / "regraft.json").read_text())
    assert record["seed"] == 3
    assert record["settings"] == json.loads((tmp_path / "direct" / "regraft.json").read_text())["settings"]


@pytest.mark.slow
def test_streamed_and_in_memory_replay_one_another(folder, tmp_path):
    asked = settings(folder, criterion="taylor", select="global")
    direct = prune(folder, tmp_path / "direct", asked.model_copy(update={"memory": 2_000_000_000}))
    replay(folder, direct.plan, tmp_path / "streamed", PruneSettings(memory="2GB"))
    assert weights(tmp_path / "streamed") == weights(tmp_path / "direct")
    in_memory = prune(folder, tmp_path / "memory", settings(folder, reconstruct="least_squares"))
    assert in_memory.plan.selection == "knapsack"
    streamed = replay(folder, in_memory.plan, tmp_path / "replayed", PruneSettings(memory="2GB"))
    assert streamed.plan == in_memory.plan
    assert streamed.notes == ()


@pytest.mark.slow
def test_a_fit_to_the_whole_model_is_not_replayed_layer_by_layer(folder, tmp_path):
    plan = prune(folder, None, settings(folder), dry_run=True).plan
    assert plan.made_with["settings"]["reconstruct"] == "divergence"
    with pytest.raises(InputError, match=r"`reconstruct=divergence` runs the whole model .* use `reconstruct=least_squares`"):
        replay(folder, plan, tmp_path / "out", PruneSettings(memory="2GB"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_line_writes_a_plan_and_replays_it(folder, tmp_path, capsys):
    assert run(arguments(folder, "--plan-only", "-o", str(tmp_path / "planned"), "--ratio", "0.3", "--seed", "4")) == 0
    assert [path.name for path in (tmp_path / "planned").iterdir()] == ["plan.json"]
    assert run(["prune", str(folder), "--plan", str(tmp_path / "planned" / "plan.json"), "-o", str(tmp_path / "replayed")]) == 0
    assert run(arguments(folder, "-o", str(tmp_path / "direct"), "--ratio", "0.3", "--seed", "4")) == 0
    assert weights(tmp_path / "replayed") == weights(tmp_path / "direct")
    assert "plan written to" in capsys.readouterr().out
    assert run(arguments(folder, "--plan-only", "-o", str(tmp_path / "mine.json"), "--ratio", "0.3", "--seed", "4")) == 0
    assert (tmp_path / "mine.json").read_bytes() == (tmp_path / "planned" / "plan.json").read_bytes()
    plan = from_json(PrunePlan, (tmp_path / "mine.json").read_bytes())
    assert plan == read_plan(tmp_path / "direct"), "the record of a pruned model holds its plan"
    assert plan == read_plan(tmp_path / "planned")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--plan", "{plan}", "--ratio", "0.5"], "--ratio 0.5 does nothing beside --plan, which was made with 0.2; leave it out"),
        (["--plan", "{plan}", "--criterion", "l1"], "--criterion l1 does nothing beside --plan, which was made with taylor"),
        (["--plan", "{plan}", "--seed", "5"], "--seed 5 does nothing beside --plan, which was made with 0"),
        (["--plan", "{plan}", "--plan-only"], "use one of the two"),
        (["--plan", "{plan}", "--calibration", "{other}"], "the calibration text gives other windows than those the plan was made with"),
        (["--plan", "{missing}"], "no plan can be read from"),
        (["--plan", "{text}"], "not a PrunePlan"),
    ],
)
@pytest.mark.parametrize("memory", [[], ["--memory", "2GB"]], ids=["whole", "streamed"])
def test_what_a_plan_cannot_do_is_refused(folder, tmp_path, capsys, more, words, memory):
    asked = ["--criterion", "taylor", "--select", "global", "--reconstruct", "least_squares"]
    assert run(arguments(folder, *asked, "--plan-only", "-o", str(tmp_path / "plan.json"))) == 0
    (tmp_path / "other.txt").write_text(TEXT[::-1], encoding="utf-8")
    names = {name: tmp_path / f"{name}.txt" for name in ("other", "missing", "text")} | {"plan": tmp_path / "plan.json"}
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert run(["prune", str(folder), "-o", str(tmp_path / "out"), *(part.format(**names) for part in more), *memory]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_another_text_does_where_nothing_is_re_fitted(folder, tmp_path):
    plan = prune(folder, None, settings(folder, reconstruct="none"), dry_run=True).plan
    (tmp_path / "text.txt").unlink()
    replay(folder, plan, tmp_path / "replayed")
    prune_again = read_plan(tmp_path / "replayed")
    assert prune_again == plan


@pytest.mark.slow
def test_a_plan_without_settings_takes_those_that_are_given(folder, tmp_path):
    plan = prune(folder, None, settings(folder), dry_run=True).plan
    bare = PrunePlan(**{name: getattr(plan, name) for name in PrunePlan.__dataclass_fields__ if name != "made_with"})
    prune(folder, tmp_path / "direct", settings(folder), seed=0)
    replay(folder, bare, tmp_path / "replayed", settings(folder))
    assert weights(tmp_path / "replayed") == weights(tmp_path / "direct")


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, "2GB"])
@pytest.mark.parametrize("changes", [{"parameters_after": 5}, {"parameters_before": 0}, {"cuts": ()}])
def test_a_plan_whose_numbers_are_not_those_of_its_cuts_is_refused(folder, tmp_path, changes, memory):
    plan = prune(folder, None, settings(folder, criterion="l2"), dry_run=True).plan
    with pytest.raises(PlanError, match=r"the plan says .* parameters before and .* after, its cuts take this model from [\d,]+ to [\d,]+"):
        replay(folder, replace(plan, **changes), tmp_path / "out", PruneSettings(memory=memory))
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model_is_refused(folder, tmp_path):
    with pytest.raises(PlanError, match=f"the plan is for model {'f' * 16}, this is model .*; plan this model again"):
        replay(folder, PLAN, tmp_path / "out", settings(folder))
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_read_are_named(folder):
    broken = PrunePlan(**{**PLAN.__dict__, "made_with": {"settings": {"ratio": 3}, "seed": 0}})
    with pytest.raises(PlanError, match=r"made_with cannot be read .*ratio: should be above"):
        replay(folder, broken, None)


def test_where_a_plan_goes(tmp_path):
    assert plan_path(tmp_path / "a.json") == tmp_path / "a.json"
    assert plan_path(tmp_path / "a") == tmp_path / "a" / "plan.json"
    assert from_json(PrunePlan, write_plan(PLAN, tmp_path / "a").read_bytes()) == PLAN
    with pytest.raises(OutputError, match="exists; choose another `output`"):
        write_plan(PLAN, tmp_path / "a")
    write_plan(PLAN, tmp_path / "a.json")
    with pytest.raises(OutputError, match="exists; choose another `output`"):
        write_plan(PLAN, tmp_path / "a.json")


def test_the_record_of_a_model_that_was_not_pruned_is_no_plan(folder, tmp_path, make_model):

    save(make_model("llama"), None, tmp_path / "saved", provenance(), "# card")
    with pytest.raises(InputError, match="was not pruned"):
        read_plan(tmp_path / "saved")


@pytest.mark.slow
def test_a_large_model_is_not_re_fitted_to_its_predictions_unless_it_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(resolved, "MOST_REFITTING_BYTES", 1000)
    large = prune(folder, None, settings(folder), dry_run=True)
    assert large.plan.made_with["settings"]["reconstruct"] == "least_squares"
    assert any("takes 0 GB more (`reconstruct=divergence`)" in note for note in large.notes)
    asked = prune(folder, None, settings(folder, reconstruct="divergence"), dry_run=True)
    assert asked.plan.made_with["settings"]["reconstruct"] == "divergence"
    assert not asked.notes
