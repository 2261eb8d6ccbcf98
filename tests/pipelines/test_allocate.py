"""``regraft allocate`` on a tiny pruned model: what it writes, that it goes on where it stopped, and what it refuses in one line."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import SIZES, random_model
from folders import tiny_tokenizer
from regraft.allocation.meta import read_store
from regraft.allocation.prior import load_prior
from regraft.cli.app import run
from regraft.errors import InputError, TrainingError
from regraft.pipelines.ranks import measuring
from regraft.pipelines.ranks.allocate import allocate_ranks
from regraft.pipelines.ranks.cost import schedule_of
from regraft.pipelines.ranks.measuring import Measuring
from regraft.plans import RankPlan, RankSearch, RankTrial, from_json
from regraft.search.contract import Job
from regraft.search.leases import Leases
from regraft.settings import AllocateSettings, RecoverSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TEXT = " ".join(f"The {n % 7} quick brown foxes jump over the {n % 11} lazy dogs." for n in range(300))
RECOVERY = ["--steps", "8", "--batch", "2", "--seq-len", "16", "--held-out", "0.2", "--held-out-windows", "4", "--lr", "0.01"]
SEARCH = ["--ranks", "1,2,3", "--budget", "r=2", "--trials", "4", "--cost", "8", "--samples", "4", "--confirm-seeds", "2"]
SMALL = [*SEARCH, "--confirm-share", "0.5", "--elastic", "0", *RECOVERY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, the same pruned unevenly, and a text."""
    path = tmp_path_factory.mktemp("allocate")
    random_model().save_pretrained(path / "dense")
    tiny_tokenizer().save_pretrained(path / "dense")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    ways = ["--criterion", "l2", "--select", "global", "--shape", "per-layer", "--reconstruct", "none", "--align", "1"]
    assert run(["prune", str(path / "dense"), "--ratio", "0.2", *ways, "--output", str(path / "pruned")]) == 0
    return path


def allocate(folder: Path, plan: Path, *more: str, model: str = "pruned") -> int:
    return run(["allocate", str(folder / model), "--data", str(folder / "text.txt"), "--output", str(plan), *SMALL, *more])


def trials_of(plan: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((plan.with_suffix(".search") / "trials.csv").read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of one whole search."""
    plan = tmp_path_factory.mktemp("found") / "plan.json"
    assert allocate(folder, plan, "--json", str(plan.with_name("figures.json"))) == 0
    return plan


@pytest.mark.long
def test_the_plan_holds_the_budget_and_is_what_peft_trains(folder: Path, found: Path, tmp_path: Path) -> None:
    plan = from_json(RankPlan, found.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(folder / "pruned", trust_remote_code=True)
    shapes = {name: module.weight.shape for name, module in model.named_modules() if name in plan.ranks}
    assert len(shapes) == 7 * 3
    spent = sum(plan.ranks[name] * sum(shape) for name, shape in shapes.items())
    assert spent == plan.trainable_parameters <= 2 * sum(sum(shape) for shape in shapes.values())
    values = json.loads((found.with_suffix(".search") / "lora_config.json").read_text())
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **values))
    assert adapted.get_nb_trainable_parameters()[0] == spent
    ways = ["--ranks", str(found), "--teacher", str(folder / "dense"), "--data", str(folder / "text.txt"), "--no-merge", "--quiet"]
    assert run(["recover", str(folder / "pruned"), "--output", str(tmp_path / "out"), *ways, *RECOVERY]) == 0
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {name: saved["rank_pattern"].get(name, saved["r"]) for name in plan.ranks}
    assert ranks == dict(plan.ranks)
    assert {name: saved["alpha_pattern"].get(name, saved["lora_alpha"]) / rank for name, rank in ranks.items()} == dict.fromkeys(ranks, 2)


def test_the_folder_tells_the_whole_search(found: Path) -> None:
    beside = found.with_suffix(".search")
    search = from_json(RankSearch, (beside / "search.json").read_bytes())
    assert [row["origin"] for row in trials_of(found)][:1] == ["uniform"]
    assert len(trials_of(found)) == len(search.trials) + len(search.confirming)
    assert search.search_cost + search.confirming_cost <= 8
    figures = json.loads(found.with_name("figures.json").read_text(encoding="utf-8"))
    assert (figures["verdict"], figures["ranks"]) == (search.verdict, dict(search.plan.ranks))
    assert figures["search_cost"] == search.search_cost
    report = (beside / "report.md").read_text()
    assert search.verdict in report
    assert all(slot.name in report for slot in search.space.slots)
    assert search.space.slots[0].features.keys() >= {"share_pruned", "importance_removed", "gradient_energy@3", "eva@1"}
    (past,) = read_store_of(beside / "past_search.json")
    assert past.trials == search.trials
    assert past.ratio == pytest.approx(0.2, abs=0.02)


@pytest.mark.long
def test_past_searches_become_the_start_of_the_next(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, prior = tmp_path / "store", tmp_path / "prior"
    for seed in ("1", "2"):
        ways = ["--store", str(store), "--confirm-seeds", "0", "--seed", seed]
        assert allocate(folder, tmp_path / f"{seed}.json", *ways) == 0
    assert len(read_store(tmp_path)) == 2
    kept = [from_json(RankSearch, (tmp_path / f"{seed}.search" / "search.json").read_bytes()).trials for seed in "12"]
    assert sorted(past.trials[0].loss_nats for past in read_store(store)) == sorted(trials[0].loss_nats for trials in kept)
    assert {past.trials for past in read_store(tmp_path)} == {past.trials for past in read_store(store)}, (
        "the folders of searches are a store too, and no search counts twice"
    )
    assert run(["meta", "train", str(store), "--output", str(prior)]) == 0
    loud = tmp_path / "loud"
    learned = load_prior(prior)
    replace(learned, mean=learned.mean + 2.0).save(loud)
    proposed = {}
    for name, start in (("none", "none"), ("prior", str(prior)), ("loud", str(loud))):
        assert allocate(folder, tmp_path / f"{name}.json", "--prior", start, "--trials", "6", "--confirm-seeds", "0") == 0
        proposed[name] = (tmp_path / f"{name}.search" / "trials.csv").read_text()
    assert len(set(proposed.values())) > 1, "what a search starts from decides what it proposes"
    capsys.readouterr()
    assert allocate(folder, tmp_path / "prior.json", "--prior", "none", "--trials", "6", "--confirm-seeds", "0", "--resume") == 2
    assert "prior" in capsys.readouterr().err


def read_store_of(path: Path) -> Sequence[Any]:
    store = path.parent / "store"
    store.mkdir(exist_ok=True)
    shutil.copy(path, store)
    return read_store(store)


def test_share_pruned_is_counted_from_the_shapes(folder: Path, found: Path) -> None:
    search = from_json(RankSearch, (found.with_suffix(".search") / "search.json").read_bytes())
    before, after = (AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True) for name in ("dense", "pruned"))
    for slot in search.space.slots:
        sizes = [sum(dict(model.named_modules())[name].weight.numel() for name in slot.modules) for model in (before, after)]
        assert slot.features["share_pruned"] == pytest.approx(1 - sizes[1] / sizes[0])


@pytest.mark.long
def test_a_search_that_was_stopped_goes_on_to_the_same_answer(
    folder: Path, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, counted = measuring.OpenMeasure.__call__, list[Job]()

    def until_the_second_round(self: Any, jobs: Sequence[Job]) -> Sequence[RankTrial]:
        if len(counted) >= 4:
            raise KeyboardInterrupt
        counted.extend(jobs)
        return measure(self, jobs)

    plan = tmp_path / "plan.json"
    monkeypatch.setattr(measuring.OpenMeasure, "__call__", until_the_second_round)
    assert allocate(folder, plan) == 130
    assert not plan.exists()
    done = len(counted)

    def counting(self: Any, jobs: Sequence[Job]) -> Sequence[RankTrial]:
        counted.extend(jobs)
        return measure(self, jobs)

    monkeypatch.setattr(measuring.OpenMeasure, "__call__", counting)
    assert allocate(folder, plan) == 2, "an unfinished search is not gone on with by accident"
    assert len(counted) == done
    assert allocate(folder, plan, "--resume") == 0
    assert plan.read_bytes() == found.read_bytes()
    assert trials_of(plan) == trials_of(found)
    assert sorted(job.key for job in counted) == sorted({job.key for job in counted}), "nothing is measured twice"
    assert allocate(folder, plan, "--resume") == 0
    assert len(counted) == len(trials_of(found))


@pytest.mark.long
def test_trials_cost_the_same_however_often_a_search_was_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group of jobs is stopped twice: when it is measured and nothing recorded, and when the first of it is recorded."""
    ways = ("--elastic", "6")
    undisturbed = tmp_path / "undisturbed.json"
    assert allocate(folder, undisturbed, *ways) == 0
    measure, record = measuring.OpenMeasure.__call__, Leases.record
    stopped: set[tuple[str, int]] = set()

    def stop_once(name: str, job: Job) -> None:
        if (name, job.round) not in stopped:
            stopped.add((name, job.round))
            raise KeyboardInterrupt

    def measured(self: Any, jobs: Sequence[Job]) -> Sequence[RankTrial]:
        trials = measure(self, jobs)
        stop_once(f"{jobs[0].phase} measured", jobs[0])
        return trials

    def recorded(self: Any, job: Job, result: RankTrial) -> None:
        record(self, job, result)
        stop_once(f"{job.phase} recorded", job)

    monkeypatch.setattr(measuring.OpenMeasure, "__call__", measured)
    monkeypatch.setattr(Leases, "record", recorded)
    plan = tmp_path / "plan.json"
    codes = [130]
    while codes[-1] == 130 and len(codes) < 40:
        codes.append(allocate(folder, plan, *ways, "--resume"))
    assert codes[-1] == 0
    assert len(codes) - 2 == len(stopped) >= 6
    for name in ("trials.csv", "search.json", "report.md"):
        assert (plan.with_suffix(".search") / name).read_bytes() == (undisturbed.with_suffix(".search") / name).read_bytes()


@pytest.mark.parametrize("method", ["uniform", "proportional", "gradient", "eva", "adalora"])
def test_closed_forms_measure_nothing_and_hold_the_budget(folder: Path, tmp_path: Path, method: str) -> None:
    plan = tmp_path / "plan.json"
    assert allocate(folder, plan, "--method", method, "--granularity", "module") == 0
    search = from_json(RankSearch, (tmp_path / "plan.search" / "search.json").read_bytes())
    assert search.plan == from_json(RankPlan, plan.read_bytes())
    assert search.trials == ()
    assert len(search.space.slots) == 21
    assert search.plan.trainable_parameters <= search.space.budget
    assert (set(search.plan.ranks.values()) == {2}) == (method == "uniform")


class Planted:
    """Measures by formula: the first slot gains by rank, the others do not; with noise, of a size that one seed has in common or not."""

    def __init__(self, gain_nats: float, noise_nats: float) -> None:
        self.gain, self.noise = gain_nats, noise_nats

    def __call__(self, jobs: Sequence[Job]) -> list[RankTrial]:
        return [RankTrial(job.ranks, self._loss(job), job.fidelity, job.fidelity / 2, job.kind, job.seed) for job in jobs]

    def _loss(self, job: Job) -> float:
        key = [job.seed, round(64 * job.fidelity), *job.ranks]
        return 3.0 - self.gain * job.ranks[0] + self.noise * float(np.random.default_rng(key).standard_normal())


def planted_search(folder: Path, plan: Path, monkeypatch: pytest.MonkeyPatch, gain: float, noise: float) -> RankSearch:
    monkeypatch.setattr(Measuring, "open", lambda self, threads=None: Planted(gain, noise))
    recover = RecoverSettings(data=folder / "text.txt", held_out=0.2, seq_len=16)
    settings = AllocateSettings(ranks=(1, 2, 3), budget="r=2", trials=6, samples=4, elastic=0)
    return allocate_ranks(folder / "pruned", plan, settings, recover).search


@pytest.mark.long
def test_a_planted_gain_is_found_and_confirmed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = planted_search(folder, tmp_path / "plan.json", monkeypatch, gain=0.1, noise=0.002)
    assert search.found[0] == 3
    assert search.confirmation is not None
    assert search.confirmation.finalists[0].low_nats > 0
    assert search.plan.ranks["model.layers.0.mlp.up_proj"] == 3
    assert "beat uniform" in search.verdict


@pytest.mark.long
def test_noise_alone_leaves_uniform(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = planted_search(folder, tmp_path / "plan.json", monkeypatch, gain=0.0, noise=0.01)
    assert set(search.plan.ranks.values()) == {2}
    assert "uniform is kept" in search.verdict


@pytest.mark.long
def test_a_candidate_that_fails_is_written_down(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = measuring.OpenMeasure.__call__

    def fails(self: Any, jobs: Sequence[Job]) -> Sequence[RankTrial]:
        if any(job.origin == "gradient" for job in jobs):
            raise TrainingError("the training loss became nan at step 2")
        return measure(self, jobs)

    monkeypatch.setattr(measuring.OpenMeasure, "__call__", fails)
    assert allocate(folder, tmp_path / "plan.json", "--confirm-seeds", "0") == 0
    rows = trials_of(tmp_path / "plan.json")
    failed = [row for row in rows if not row["loss_nats"]]
    assert [(row["origin"], row["note"]) for row in failed] == [("gradient", "the training loss became nan at step 2")]
    assert max(float(row["fidelity"]) for row in rows) == 1.0


def spent_by(settings: AllocateSettings, recover: RecoverSettings) -> float:
    """What a search and its confirmation cost at most, counted anew: rows of forward passes, a backward pass as two."""
    schedule = schedule_of(settings, recover)
    rows = max(-(-recover.held_out_windows // 8), 2048 // 256)
    full = recover.steps * 3 * recover.batch

    def candidate(before: int, steps: int) -> float:
        return ((steps - before) * 3 * recover.batch + recover.held_out_windows) / (full + recover.held_out_windows)

    spent = 3 * settings.confirm_seeds * candidate(0, round(settings.confirm_share * recover.steps))
    if schedule.elastic:
        spent += (round(0.25 * recover.steps) * 2 * 3 * recover.batch + schedule.elastic * rows) / (full + rows)
    before = 0
    for rung in schedule.rungs:
        steps = round(rung.fidelity * recover.steps)
        spent, before = spent + rung.width * candidate(before, steps), steps
    return spent


@pytest.mark.parametrize("steps", [104, 200, 400])
@pytest.mark.parametrize("change", [{}, {"elastic": 0}, {"elastic": 10}, {"cost": 6.0}, {"trials": 6, "elastic": 0, "cost": 9.0}])
def test_search_and_confirmation_keep_the_cost(steps: int, change: dict[str, Any]) -> None:
    recover = RecoverSettings(steps=steps, batch=8, held_out_windows=48, eval_every=steps)
    settings = AllocateSettings(**change)
    spent, limit = spent_by(settings, recover), change.get("cost", 4.0)
    assert spent <= limit + 1e-9
    schedule = schedule_of(settings, recover)
    assert schedule.elastic == change.get("elastic", 256 if steps == 400 else schedule.elastic)
    last = schedule.rungs[-1]
    further = (last.fidelity * steps * 3 * 8 + 48) / (steps * 3 * 8 + 48)
    assert last.fidelity == 1.0 or spent + max(2, -(-last.width // 2)) * further > limit


def test_scores_are_for_those_who_learn_from_them() -> None:
    elastic = {name: schedule_of(AllocateSettings(method=name), RecoverSettings()).elastic for name in ("rankadaptor", "bayes")}
    assert elastic == {"rankadaptor": 256, "bayes": 0}


def test_trials_that_need_more_get_it_unless_a_cost_was_named() -> None:
    recover = RecoverSettings(steps=104, batch=8, held_out_windows=48, eval_every=104)
    schedule = schedule_of(AllocateSettings(trials=30), recover)
    assert [(rung.fidelity, rung.width) for rung in schedule.rungs] == [(0.125, 30)]
    assert schedule.elastic == 0
    assert spent_by(AllocateSettings(trials=30), recover) > 4.0
    with pytest.raises(
        InputError, match=r"`trials=30`, `confirm_seeds=5` cost [0-9.]+ full recoveries at least, more than `cost=4`; raise"
    ):
        schedule_of(AllocateSettings(trials=30, cost=4.0), recover)


def vocabulary(folder: Path, at: Path) -> list[str]:
    LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": 80}))).save_pretrained(at / "other")
    tiny_tokenizer(80).save_pretrained(at / "other")
    return ["--teacher", str(at / "other")]


def corrupt(folder: Path, at: Path) -> list[str]:
    (at / "trials.db").write_text("this is no database")
    return ["--storage", f"sqlite:///{at / 'trials.db'}"]


def short_text(folder: Path, at: Path) -> list[str]:
    (at / "short.txt").write_text("The quick brown fox jumps over it.")
    return ["--data", str(at / "short.txt")]


def there_already(folder: Path, at: Path) -> list[str]:
    (at / "plan.json").write_text("{}")
    return []


BAD: list[tuple[list[str] | Callable[[Path, Path], list[str]], str]] = [
    (["--budget", "100"], r"budget 100 is below the smallest plan, rank 1 everywhere, .*; raise --budget"),
    (["--budget", "99999999"], r"is not below the largest plan.*lower --budget"),
    (["--budget", "lots"], r"neither r=RANK nor a number"),
    (["--budget", "r=5"], r"5 is not among the ranks 1,2,3; add it to --ranks"),
    (["--ranks", "2,900"], r"rank 900 is above what any module can hold .*take it out of --ranks"),
    (["--method", "rankadapter"], r"rankadapter.*did you mean.*rankadaptor"),
    (["--adapter", "nola"], r"nola"),
    (["--trials", "500"], r"--trials 500, .* cost .* more than --cost 8; raise --cost"),
    (["--confirm-seeds", "1"], r"gives no interval"),
    (["--method", "bayes", "--elastic", "9"], r"--elastic 9 has no effect on method 'bayes'; leave it out"),
    (["--prior", "nowhere"], r"prior 'nowhere' cannot be read .*regraft meta train STORE"),
    (["--method", "bayes", "--prior", "none"], r"--prior has no effect on method 'bayes'; leave it out"),
    (["--method", "gradient", "--prior", "none"], r"--prior has no effect on method 'gradient'; leave it out"),
    (["--method", "uniform", "--store", "kept"], r"--store keeps searches, and method 'uniform' makes none"),
    (lambda folder, at: ["--store", str(folder / "text.txt")], r"text\.txt' is a file; name a folder"),
    (["--workers", "2", "--ray", "local"], r"leave one of them out"),
    (["--storage", "nonsense"], r"not the URL of a known database"),
    (["--output", "plan.yaml"], r"not the name of a JSON file"),
    (["--seq-len", "4000"], r"4000"),
    (there_already, r"plan\.json' exists; choose another --output"),
    (short_text, r"fewer|too (short|little)|tokens"),
    (vocabulary, r"vocabulary"),
    (corrupt, r"corrupt or not an SQLite file"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[said[:24] for _, said in BAD])
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    more = change(folder, tmp_path) if callable(change) else change
    there = {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert allocate(folder, tmp_path / "plan.json", *more) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert re.search(said, error), error
    # What pruning did to the layers is measured before the teacher is seen, and kept for --resume.
    assert {path.name for path in tmp_path.iterdir()} - ({"plan.search"} if change is vocabulary else set()) == there


def test_a_plan_for_other_shapes_is_refused(folder: Path, found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 2}))).save_pretrained(tmp_path / "two")
    tiny_tokenizer().save_pretrained(tmp_path / "two")
    given = ["--data", str(folder / "text.txt"), "--ranks", str(found), "--output", str(tmp_path / "out"), *RECOVERY]
    assert run(["recover", str(tmp_path / "two"), *given]) == 2
    assert "the rank plan is for the model with the fingerprint" in capsys.readouterr().err
    plan = json.loads(found.read_text(encoding="utf-8"))
    (tmp_path / "any.json").write_text(json.dumps(plan | {"fingerprint": ""}), encoding="utf-8")
    given[3] = str(tmp_path / "any.json")
    assert run(["recover", str(tmp_path / "two"), *given]) == 2
    assert "model.layers.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_that_breaks_every_candidate_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert allocate(folder, tmp_path / "plan.json", "--lr", "1e30") == 2
    assert "every trial failed, the first one since: " in capsys.readouterr().err


@pytest.mark.long
def test_the_elastic_adapter_scores_first_and_is_told_of(folder: Path, tmp_path: Path) -> None:
    assert allocate(folder, tmp_path / "plan.json", "--elastic", "6", "--confirm-seeds", "0") == 0
    search = from_json(RankSearch, (tmp_path / "plan.search" / "search.json").read_bytes())
    kinds = [trial.kind for trial in search.trials]
    assert kinds == ["elastic"] * 6 + ["recovery"] * (len(kinds) - 6)
    assert search.search_cost <= 8
    both = {trial.ranks for trial in search.trials[:6]} & {trial.ranks for trial in search.trials[6:]}
    assert (search.agreement is not None) == (len(both) >= 3)


@pytest.mark.long
def test_processes_beside_measure_the_same(folder: Path, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With relative paths, which the processes have to find from wherever they stand."""
    monkeypatch.chdir(folder)
    plan = tmp_path / "plan.json"
    assert run(["allocate", "pruned", "--data", "text.txt", "--output", str(plan), *SMALL, "--workers", "2"]) == 0
    ours, alone = trials_of(plan), trials_of(found)
    assert [row["fidelity"] for row in ours] == [row["fidelity"] for row in alone]
    for one, other in zip(ours, alone, strict=True):
        assert float(one["loss_nats"]) == pytest.approx(float(other["loss_nats"]), abs=1e-5)
        assert [one[name] for name in one if name.startswith("layers.")] == [other[name] for name in other if name.startswith("layers.")]
