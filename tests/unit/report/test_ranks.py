"""The report of a search for ranks: every number that decides is in it."""

from __future__ import annotations

import csv

from regraft.allocation import confirm, rank_plan
from regraft.plans import CrossValidation, RankSearch, RankTrial
from regraft.report.ranks import slots_table, summary, to_markdown, trials_csv
from regraft.testing.planted import space_of

FOUND, UNIFORM = (8, 4), (6, 6)


def search() -> RankSearch:
    space = space_of([10, 10])
    trials = (
        RankTrial(UNIFORM, 3.0, 1.0, 0.004, "elastic"),
        RankTrial(UNIFORM, 2.9, 0.25, 0.25),
        RankTrial(FOUND, 2.85, 0.25, 0.25),
        RankTrial((4, 8), None, 0.25, 0.1, note="the training loss became nan | at step 3"),
    )
    confirming = tuple(
        RankTrial(ranks, 2.9 - 0.05 * (ranks == FOUND) - 0.001 * seed, 1.0, 1.0, seed=seed)
        for seed in (7, 8, 9)
        for ranks in (UNIFORM, FOUND)
    )
    confirmation = confirm(space, [FOUND], confirming)
    error = CrossValidation(0.25, 0.0125, 0.5, 8, 5)
    origins = ("uniform", "uniform", "gradient", "random")
    return RankSearch(
        rank_plan(space, FOUND, "test"),
        space,
        trials,
        origins,
        FOUND,
        confirming,
        confirmation,
        error,
        (error,),
        0.75,
        confirmation.verdict,
    )


def test_the_page_says_what_was_chosen_how_it_was_measured_and_how_sure_it_is() -> None:
    page = to_markdown(search())
    assert "**The new ranks beat uniform by +0.05000 nats on 3 fresh seeds" in page
    assert "| gradient | 8 4 | 25.0% | 2.85000 | +0.05000 | 0.250 |" in page
    assert r"| random | 4 8 | 25.0% | the training loss became nan \| at step 3 |  | 0.100 |" in page
    assert "| 8 | +0.25 | 0.01250 | +0.50 |" in page
    assert "| 1 | 2.89300 | 2.84300 | +0.05000 |" in page


def test_the_figures_count_costs_and_failures() -> None:
    lines = "\n".join(summary(search()))
    assert "trainable parameters: 120 of 120 allowed (rank 6 everywhere: 120)" in lines
    assert "measured: 4 times, 1 of them failed; cost 0.60 full recoveries" in lines
    assert "R² 0.25, RMSE 0.0125 nats, rank correlation 0.50" in lines
    assert "correlation of +0.75" in lines
    assert "6 recoveries on fresh seeds; cost 6.00" in lines


def test_slots_stand_beside_what_was_found() -> None:
    heading, rows = slots_table(search())
    assert heading == ["", "rank", "found"]
    assert rows == [["layers.0", "8", "8"], ["layers.1", "4", "4"]]


def test_every_measurement_is_a_line() -> None:
    rows = list(csv.DictReader(trials_csv(search()).splitlines()))
    assert [row["phase"] for row in rows] == ["search"] * 4 + ["confirm"] * 6
    assert [row["origin"] for row in rows[4:6]] == ["uniform", "finalist"]
    assert float(rows[2]["loss_nats"]) == 2.85
    assert rows[3]["loss_nats"] == ""
    assert [row["layers.0"] for row in rows[:4]] == ["6", "6", "8", "4"]
