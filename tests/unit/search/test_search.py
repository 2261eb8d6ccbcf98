"""The search itself, on a planted loss: what is asked for, by whom it is measured, what is written down."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import optuna
import pytest

from regraft.allocation.schedule import next_request
from regraft.errors import DataError, StorageError
from regraft.plans import RankTrial
from regraft.search.contract import Job
from regraft.search.pools import Inline, Pool, Processes
from regraft.search.run import OpenSearch, measure_all, open_search, search
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import open_storage
from search_fakes import SCHEDULE, SPACE, PlantedLearner, PlantedMeasure, measured, planted_loss

UNIFORM = (6, 6, 6, 6)


def sampler() -> AllocatorSampler:
    return AllocatorSampler(SPACE, PlantedLearner(), SCHEDULE, seed=0)


def opened_in(folder: Path, url: str | None = None) -> OpenSearch:
    return open_search(open_storage(url, folder), "planted", SPACE, sampler(), "", resume=True)


def run(folder: Path, pool: Pool, at_once: int = 1) -> list[tuple[Job, RankTrial]]:
    with pool:
        return search(opened_in(folder), sampler(), pool, lambda job, trial: None, at_once)


def by_hand() -> list[RankTrial]:
    """Returns the trials of the same search without any book: request, measure, repeat."""
    history: list[RankTrial] = []
    while request := next_request(SPACE, history, PlantedLearner(), SCHEDULE, 0):
        for proposal in request.proposals:
            loss = planted_loss(proposal.ranks, request.fidelity)
            history.append(RankTrial(proposal.ranks, loss, request.fidelity, 0.25, request.kind, 0))
    return history


@pytest.mark.slow
def test_the_book_holds_what_the_schedule_asks_for(tmp_path: Path) -> None:
    found = run(tmp_path, Inline(PlantedMeasure(tmp_path / "log")))
    assert [trial for _, trial in found] == by_hand()
    assert found[0][1].ranks == UNIFORM
    study = optuna.load_study(study_name="planted", storage=f"sqlite:///{tmp_path / 'search.db'}")
    first = study.trials[0]
    assert first.params == {slot.name: 6 for slot in SPACE.slots}
    assert first.value == planted_loss(UNIFORM, 0.25)
    assert {"fidelity": 0.25, "cost": 0.25, "note": "", "origin": "uniform", "kind": "recovery", "phase": "search"}.items() <= (
        first.user_attrs.items()
    )
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)


@pytest.mark.slow
def test_groups_of_candidates_give_the_same(tmp_path: Path) -> None:
    assert [trial for _, trial in run(tmp_path, Inline(PlantedMeasure(tmp_path / "log")), at_once=2)] == by_hand()


@pytest.mark.slow
def test_a_finished_search_measures_nothing_again(tmp_path: Path) -> None:
    spec = PlantedMeasure(tmp_path / "log")
    first = run(tmp_path, Inline(spec))
    lines = measured(tmp_path / "log")
    assert run(tmp_path, Inline(spec)) == first
    assert measured(tmp_path / "log") == lines


@pytest.mark.slow
def test_a_candidate_that_diverges_is_written_down_and_the_search_goes_on(tmp_path: Path) -> None:
    bad = by_hand()[1].ranks
    found = run(tmp_path, Inline(PlantedMeasure(tmp_path / "log", diverges_on=(bad,))), at_once=3)
    failed = [trial for _, trial in found if trial.loss_nats is None]
    assert [trial.ranks for trial in failed] == [bad]
    assert "nan at step 3" in failed[0].note
    assert max(trial.fidelity for _, trial in found) == 1.0
    states = Counter(trial.state.name for trial in opened_in(tmp_path).postings.study.trials)
    assert states == {"COMPLETE": len(found) - 1, "FAIL": 1}


@pytest.mark.slow
def test_what_is_wrong_with_all_candidates_stops_the_search_and_gives_its_jobs_back(tmp_path: Path) -> None:
    class NoData(PlantedMeasure):
        def __call__(self, jobs: object) -> list[RankTrial]:
            raise DataError("'text.txt' has 3 tokens, fewer than one batch")

    with pytest.raises(DataError, match="fewer than one batch"):
        run(tmp_path, Inline(NoData(tmp_path / "log")))
    assert [trial for _, trial in run(tmp_path, Inline(PlantedMeasure(tmp_path / "log")))] == by_hand()


@pytest.mark.long
def test_processes_measure_the_same_and_survive_the_death_of_one(tmp_path: Path) -> None:
    fatal = by_hand()[2].ranks
    spec = PlantedMeasure(tmp_path / "log", seconds=0.1, dies_on=(fatal,), unless=tmp_path / "died")
    said: list[str] = []
    found = run(tmp_path, Processes(spec, 2, said.append))
    assert [trial for _, trial in found] == by_hand()
    (line,) = said
    assert line.startswith("a measuring process died (")
    assert line.endswith("at attempt 1 of 3; what it measured is measured again by another")
    counts = Counter(measured(tmp_path / "log"))
    assert [line for line, count in counts.items() if count > 1] == [f"{','.join(map(str, fatal))} 0.25 search/0"]
    assert len({line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}) == 3


@pytest.mark.long
def test_a_candidate_that_kills_every_process_is_written_down_as_failed(tmp_path: Path) -> None:
    fatal = by_hand()[1].ranks
    found = run(tmp_path, Processes(PlantedMeasure(tmp_path / "log", dies_on=(fatal,)), 1))
    failed = [trial for _, trial in found if trial.loss_nats is None]
    assert [trial.ranks for trial in failed] == [fatal]
    assert "died 3 times" in failed[0].note


@pytest.mark.slow
def test_jobs_that_confirm_stand_in_the_same_book_and_do_not_disturb_the_search(tmp_path: Path) -> None:
    spec = PlantedMeasure(tmp_path / "log")
    jobs = [Job("confirm", 0, index, UNIFORM, 1.0, seed=100 + index) for index in range(3)]
    with Inline(spec) as pool:
        before = measure_all(opened_in(tmp_path), jobs, pool, lambda job, trial: None)
        again = measure_all(opened_in(tmp_path), jobs, pool, lambda job, trial: None)
    assert before == again
    assert [trial.seed for trial in before] == [100, 101, 102]
    assert len(measured(tmp_path / "log")) == 3
    assert [trial for _, trial in run(tmp_path, Inline(spec))] == by_hand()


@pytest.mark.slow
def test_two_that_post_the_same_jobs_have_each_measured_once(tmp_path: Path) -> None:
    one, other = (opened_in(tmp_path, f"sqlite:///{tmp_path / 'shared.db'}") for _ in range(2))
    jobs = sampler().plan(one.postings.study)
    assert jobs is not None
    assert sampler().plan(other.postings.study) == jobs
    stale = other.postings.valid()
    one.postings.post(jobs, give_up=True)
    other.postings.valid = lambda: stale  # pyright: ignore[reportAttributeAccessIssue]  # as if both had looked before either wrote
    other.postings.post(jobs, give_up=True)
    del other.postings.valid
    assert len(one.postings.study.trials) == 2 * len(jobs)
    assert one.leases.take(jobs, 2) == list(jobs[:2])
    assert other.leases.take(jobs, 9) == list(jobs[2:])
    other.leases.retire()
    assert Counter(trial.user_attrs.get("dropped") for trial in one.postings.study.trials if trial.number >= len(jobs)) == {
        "asked for twice": len(jobs)
    }


def test_the_sampler_serves_an_ordinary_study(tmp_path: Path) -> None:
    own = sampler()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=own)
    measure = PlantedMeasure(tmp_path / "log", diverges_on=(by_hand()[1].ranks,))

    study.optimize(own.objective(lambda jobs: [_or_failed(measure, job) for job in jobs]), n_trials=50, callbacks=[own.stop_when_through])
    kept = [tuple(trial.params.values()) for trial in study.trials]
    assert kept[:6] == [trial.ranks for trial in by_hand()][:6]
    assert study.trials[1].state == optuna.trial.TrialState.PRUNED
    assert study.trials[-1].user_attrs["fidelity"] == 1.0
    assert own.plan(study) is None


def _or_failed(measure: PlantedMeasure, job: Job) -> RankTrial:
    return job.failed("it diverged") if job.ranks in measure.diverges_on else measure([job])[0]


@pytest.mark.slow
def test_rounds_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    study = opened_in(tmp_path).postings.study
    study.set_user_attr("round:0", "[{}]")
    with pytest.raises(StorageError, match="not of regraft"):
        sampler().plan(study)
