"""What the shipped prior is worth to a search on models that it was not trained on.

    python benchmarks/rank_allocation_prior.py

The prior is trained on searches over the embedded model (``results/prior_searches``, made by ``scripts/make_prior.py``). Two kinds of search
are predicted with it: each of those by a prior trained on the others, and the searches of ``benchmarks/rank_allocation.py``
(``results/searches_elsewhere``) by the shipped one: over models that it has not seen, and over the embedded one, pruned otherwise. Measured is Spearman's correlation of expected and measured losses of real recoveries,
before the first trial and after the first four (uniform and the closed forms), beside a model that starts from the default prior, which
knows no feature. What the ranks are worth that the prior names before any trial is measured by ``rank_allocation.py --methods prior``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS, interval, machine, table, versions, write_rows
from regraft.allocation.meta import foresight, train
from regraft.allocation.prior import Prior, default_prior, shipped_prior
from regraft.atomic import write_text
from regraft.plans import PastSearch, from_json

STORE, ELSEWHERE = RESULTS / "prior_searches", RESULTS / "searches_elsewhere"
SEEN = (0, 4)
NOTES = {
    "left out": "over the embedded model, the prior trained on the others",
    "of models that the prior has not seen": "the shipped prior",
    "of the embedded model, pruned otherwise": "the shipped prior",
}


def cases() -> Iterator[tuple[str, Path, PastSearch, Prior]]:
    """Yields every search with a prior that has not seen it."""
    own, others = (
        {path: from_json(PastSearch, path.read_bytes()) for path in sorted(store.glob("*.json"))} for store in (STORE, ELSEWHERE)
    )
    for path, search in own.items():
        yield "left out", path, search, train([other for place, other in own.items() if place != path]).prior
    seen = {search.model for search in own.values()}
    for path, search in others.items():
        _, unseen, again = NOTES
        yield again if search.model in seen else unseen, path, search, shipped_prior()


def main() -> None:
    rows: list[dict[str, str | int | float]] = []
    for kind, path, search, prior in cases():
        for seen in SEEN:
            trained, untrained = (foresight(search, start, seen) for start in (prior, default_prior()))
            rows.append({
                "kind": kind, "search": path.stem, "seen": seen, "recoveries": trained.trials,
                "trained": round(trained.rank_correlation, 3), "untrained": round(untrained.rank_correlation, 3),
                "trained_rmse_nats": round(trained.rmse_nats, 5), "untrained_rmse_nats": round(untrained.rmse_nats, 5),
            })  # fmt: skip
    write_rows(RESULTS / "rank_allocation_prior.csv", rows)
    made = shipped_prior().made_from
    lines = ["# What a start from past searches is worth", ""]
    lines += [f"Shipped: trained on {made['searches']} searches, {made['trials']} trials." if made else "No prior is shipped.", ""]
    for kind, note in NOTES.items():
        own = [row for row in rows if row["kind"] == kind]
        lines += [f"## Searches {kind}: {note}", ""]
        lines += table(
            ["search", "trials seen", "recoveries predicted", "rank correlation", "untrained", "RMSE, 10⁻³ nats", "untrained"],
            [
                [str(row["search"]), str(row["seen"]), str(row["recoveries"]), f"{row['trained']:+.2f}", f"{row['untrained']:+.2f}",
                 f"{1e3 * float(row['trained_rmse_nats']):.1f}", f"{1e3 * float(row['untrained_rmse_nats']):.1f}"]
                for row in own
            ],
        )  # fmt: skip
        for seen in SEEN:
            here = [row for row in own if row["seen"] == seen]
            gains = [float(row["trained"]) - float(row["untrained"]) for row in here]
            means = [statistics.fmean(float(row[start]) for row in here) for start in ("trained", "untrained")]
            lines += [
                f"After {seen} trials, mean over {len(here)} searches: {means[0]:+.2f} against {means[1]:+.2f}; "
                "a gain of {:+.2f} ± {:.2f} (95 %).".format(*interval(gains)),
                "",
            ]
    lines += [f"{machine()}; {versions('numpy', 'scipy', 'regraft')}.", ""]
    write_text(RESULTS / "rank_allocation_prior.md", "\n".join(lines))


if __name__ == "__main__":
    main()
