"""Makes the prior that the package ships: searches over the embedded model, pruned in many ways, and training on them.

    python scripts/make_prior.py [--cases 9] [--train]

Every search is written into ``benchmarks/results/prior_searches`` when it is over and is not repeated. ``--train`` trains on all that
are there and writes ``src/regraft/allocation/shipped``, unless searches over other models (``benchmarks/results/searches_elsewhere``, from
``benchmarks/rank_allocation.py``) are predicted no better than without training. Criterion, share, depth and budget change from one case
to the next, so that any number of them from the first on is a fair store. Searches are Optuna's, which begin with vectors at random: what
closed forms propose lies close together, and tells little of what a rank is worth where.
Recoveries are small: what the prior learns is which features go with large gains, where gains saturate and what a short recovery shows,
not how large gains are in nats.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from regraft.allocation.meta import PAST, foresight, read_store, train
from regraft.allocation.prior import SHIPPED, default_prior
from regraft.atomic import write_text
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.ranks.allocate import allocate_ranks
from regraft.plans import PastSearch, from_json, to_json
from regraft.settings import AllocateSettings, LoadSettings, PruneSettings, RecoverSettings

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
STORE, ELSEWHERE = RESULTS / "prior_searches", RESULTS / "searches_elsewhere"
MODEL = "seedling"
SMALL = RecoverSettings(steps=160, batch=4, seq_len=64, lr=2e-3, dropout=0.0, eval_every=160, held_out_windows=48)
CHOICES = {"r=8": (2, 4, 6, 8, 10, 12), "r=3": (1, 2, 3, 4, 6, 8)}


@dataclass(frozen=True)
class Case:
    """One pruned model under one budget."""

    criterion: str
    ratio: float
    budget: str
    layers: str = "all"

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{MODEL}-{self.criterion}-{self.ratio:g}-{self.budget.replace('=', '')}-{self.layers}"


CASES = (
    Case("taylor", 0.4, "r=8"),
    Case("l2", 0.3, "r=3"),
    Case("taylor", 0.5, "r=3", "fewer"),
    Case("l1", 0.4, "r=8"),
    Case("taylor", 0.3, "r=3"),
    Case("l2", 0.5, "r=8", "fewer"),
    Case("random", 0.4, "r=3"),
    Case("taylor", 0.6, "r=8"),
    Case("l2", 0.4, "r=8"),
    Case("taylor", 0.4, "r=3", "fewer"),
    Case("random", 0.3, "r=8", "fewer"),
    Case("l1", 0.5, "r=3"),
)


def search(case: Case, seed: int) -> None:
    """Prunes, searches, and puts the search into the store."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source, dtype = MODEL, LoadSettings(dtype="float32")
        if case.layers == "fewer":
            shallow = PruneSettings(ratio=0.2, targets=("layers",), depth="block_influence", samples=32)
            prune(MODEL, folder / "shallow", shallow, load=dtype, seed=seed)
            source = str(folder / "shallow")
        ways = {"select": "global", "reconstruct": "none", "shape": "per-layer", "samples": 32}
        settings = PruneSettings.model_validate({"ratio": case.ratio, "criterion": case.criterion, **ways})
        prune(source, folder / "pruned", settings, load=dtype, seed=seed)
        asked = AllocateSettings(
            method="bayes", budget=case.budget, ranks=CHOICES[case.budget], trials=16, elastic=0, cost=4.0, confirm_seeds=0
        )
        found = allocate_ranks(folder / "pruned", folder / "plan.json", asked, SMALL, load=dtype, seed=seed).search
        past = from_json(PastSearch, (folder / "plan.search" / PAST).read_bytes())
        write_text(STORE / f"{case.name}.json", to_json(replace(past, model=MODEL)) + "\n")
        print(case.name, f"cost {found.search_cost:.2f}", found.found, flush=True)


def main() -> None:
    """Makes the searches that are missing; trains if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(CASES))
    parser.add_argument("--train", action="store_true")
    given = parser.parse_args()
    STORE.mkdir(parents=True, exist_ok=True)
    for seed, case in enumerate(CASES[: given.cases]):
        if not (STORE / f"{case.name}.json").exists():
            search(case, seed)
    if given.train:
        training = train(read_store(STORE))
        print(training.searches, "searches; left out:", training.left_out, "untrained:", training.untrained)
        elsewhere = read_store(ELSEWHERE)
        trained, untrained = (
            fmean(foresight(search, prior).rank_correlation for search in elsewhere) for prior in (training.prior, default_prior())
        )
        print(f"{len(elsewhere)} searches elsewhere: rank correlation {trained:+.3f}, untrained {untrained:+.3f}")
        if trained <= max(0.0, untrained):
            raise SystemExit("searches elsewhere are predicted no better than without training: nothing is shipped; make more searches")
        shutil.rmtree(SHIPPED, ignore_errors=True)
        training.prior.save(SHIPPED)


if __name__ == "__main__":
    main()
