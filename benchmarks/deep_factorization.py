"""Deep matrix completion: full, narrow and compressed factorizations, their iterations, seconds and growth.

    python benchmarks/deep_factorization.py [--section NAME ...] [--work runs/deep_factorization] [--threads 1]

Every section leaves a JSON file in the work folder and is not repeated while that file is there; the tables and pictures in
``benchmarks/results`` are drawn from those files. All times of one section come from one process on one machine, step after step
in turn, as medians. Needs matplotlib for the pictures.

The task of arXiv 2406.04112 (section 3): a d x d matrix of rank r with Gaussian factors, entries of variance one, a share of 20 %
seen, three layers at scale 1e-3, gradient descent without decay, float64, until ||P(f - M)||^2 <= 1e-12 ||P(M)||^2.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import table
from regraft.completion.descent import Descent, Stepper, automatic_step, descend
from regraft.completion.entries import EntryList, Observed, WholeMatrix
from regraft.completion.theory import bases, blocks, end_to_end_basis, rho_path
from regraft.numerics.chain import Chain, compressed_start, full_start, narrow_start
from regraft.numerics.frames import compact_frames

RESULTS = Path(__file__).parent / "results"
DEPTH, SCALE, GAMMA, SHARE, RANK = 3, 1e-3, 0.01, 0.2, 5


class Task:
    """A planted matrix, what is seen of it, and the step size that all solvers share."""

    def __init__(self, dimension: int, rank: int = RANK, count: int | None = None, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dimension, self.rank = dimension, rank
        self.left = torch.randn(dimension, rank, generator=self.generator, dtype=torch.float64) / rank**0.5
        self.right = torch.randn(dimension, rank, generator=self.generator, dtype=torch.float64)
        wanted = count if count is not None else round(SHARE * dimension**2)
        flat = torch.randint(dimension**2, (round(1.2 * wanted),), generator=self.generator).unique()
        if flat.numel() < wanted:  # dense masks: draw without replacement instead
            flat = torch.randperm(dimension**2, generator=self.generator)
        flat = flat[torch.randperm(flat.numel(), generator=self.generator)[:wanted]]
        rows, columns = flat // dimension, flat % dimension
        values = (self.left[rows] * self.right[columns]).sum(1)
        self.entries = EntryList(rows, columns, values, (dimension, dimension))
        self.triplets = self.entries.top_triplets(rank, self.generator)
        self.step = automatic_step(float(self.triplets.values[0]), self.entries.share, DEPTH, GAMMA, safety=1.0)

    def masked(self) -> WholeMatrix:
        """What is seen, as a dense mask."""
        mask = torch.zeros(self.dimension, self.dimension, dtype=torch.float64)
        mask[self.entries.rows, self.entries.columns] = 1.0
        return WholeMatrix(self.left @ self.right.T, mask)

    def full(self) -> Chain:
        """The full-width start."""
        return full_start((self.dimension, self.dimension), DEPTH, SCALE, self.generator)

    def narrow(self) -> Chain:
        """A random start of the compressed one's width, 2r."""
        return narrow_start((self.dimension, self.dimension), 2 * self.rank, DEPTH, SCALE, self.generator)

    def compressed(self, gamma: float = GAMMA) -> Chain:
        """The compressed start."""
        return compressed_start(compact_frames(self.triplets, self.generator), DEPTH, SCALE, gamma)

    def unseen_error(self, chain: Chain) -> float:
        """||(f - M) on unseen entries||^2 / ||M on unseen entries||^2."""
        error = chain.end_to_end() - self.left @ self.right.T
        truth = self.left @ self.right.T
        error[self.entries.rows, self.entries.columns] = 0.0
        truth[self.entries.rows, self.entries.columns] = 0.0
        return float(error.square().sum() / truth.square().sum())


def whole_run(task: Task, chain: Chain, observed: Observed, limit: int, every: int = 100) -> dict[str, Any]:
    """Runs to the tolerance; curves of both errors, the watching not counted in the seconds."""
    curve: list[tuple[int, float, float, float]] = []
    watching, started = 0.0, time.perf_counter()

    def watch(iteration: int, seen: Chain, loss: float) -> bool:
        nonlocal watching
        began = time.perf_counter()
        curve.append((iteration, began - started - watching, loss, task.unseen_error(seen)))
        watching += time.perf_counter() - began
        return False

    done = descend(chain, observed, Descent(task.step, max_iterations=limit, watch_every=every), watch)
    return {
        "iterations": done.iterations,
        "converged": done.converged,
        "seconds": time.perf_counter() - started - watching,
        "train_error": done.loss,
        "test_error": task.unseen_error(done.chain),
        "parameters": chain.parameters,
        "curve": curve,
    }


def median_step(steppers: dict[str, Stepper], repeats: dict[str, int], rounds: int) -> dict[str, float]:
    """Times single steps in turn, so that what else the machine does strikes all alike; medians in seconds."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for stepper in steppers.values():
        stepper.loss()
        stepper.step()
    for _ in range(rounds):
        for name, stepper in steppers.items():
            for _ in range(repeats[name]):
                began = time.perf_counter()
                stepper.loss()
                stepper.step()
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def section_completion(seed: int = 0) -> dict[str, Any]:
    """D = 300: every solver run whole."""
    task = Task(300, seed=seed)
    masked = task.masked()
    dense = Stepper(task.full(), masked, Descent(task.step))
    listed = Stepper(task.full(), task.entries, Descent(task.step))
    full_steps = median_step({"mask": dense, "list": listed}, {"mask": 5, "list": 5}, 6)
    quickest = masked if full_steps["mask"] <= full_steps["list"] else task.entries  # the full network at its best
    runs = {}
    runs["compressed"] = whole_run(task, task.compressed(), task.entries, 200_000)
    runs["full"] = whole_run(task, task.full(), quickest, 200_000)
    limit = 6 * runs["full"]["iterations"]
    runs["narrow"] = whole_run(task, task.narrow(), task.entries, limit)
    runs["gamma = 0"] = whole_run(task, task.compressed(0.0), task.entries, 2 * runs["full"]["iterations"])
    return {"dimension": 300, "step_size": task.step, "full_step_seconds": full_steps, "runs": runs}


def section_thousand() -> dict[str, Any]:
    """D = 1000: compressed whole, full by its median step."""
    task = Task(1000)
    steppers = {
        "full, dense mask": Stepper(task.full(), task.masked(), Descent(task.step)),
        "full, entry list": Stepper(task.full(), task.entries, Descent(task.step)),
        "narrow": Stepper(task.narrow(), task.entries, Descent(task.step)),
        "compressed": Stepper(task.compressed(), task.entries, Descent(task.step)),
    }
    repeats = {"full, dense mask": 1, "full, entry list": 1, "narrow": 10, "compressed": 10}
    before = median_step(steppers, repeats, 12)
    run = whole_run(task, task.compressed(), task.entries, 200_000, every=1000)
    return {"dimension": 1000, "step_size": task.step, "step_seconds": before, "compressed": run}


def section_scaling() -> dict[str, Any]:
    """Seconds per step against the size and against the number of entries."""
    rows: list[dict[str, Any]] = []
    for dimension in (250, 500, 1000, 2000, 4000):
        task = Task(dimension)
        sparse = Task(dimension, count=50 * dimension)
        steppers = {
            "compressed, 20 % seen": Stepper(task.compressed(), task.entries, Descent(task.step)),
            "compressed, 50 entries a row": Stepper(sparse.compressed(), sparse.entries, Descent(sparse.step)),
            "full, 20 % seen": Stepper(task.full(), task.masked(), Descent(task.step)),
        }
        rounds = 9 if dimension <= 1000 else 3 if dimension == 2000 else 1
        repeats = {name: 3 if name.startswith("full") and dimension >= 2000 else 9 for name in steppers}
        for name, seconds in median_step(steppers, repeats, rounds).items():
            count = sparse.entries.count if "row" in name else task.entries.count
            rows.append({"series": name, "dimension": dimension, "entries": count, "seconds": seconds})
            print(rows[-1], flush=True)
    for count in (25_000, 50_000, 100_000, 200_000, 400_000, 800_000, 1_600_000):
        task = Task(4000, count=count)
        steppers = {"by entries": Stepper(task.compressed(), task.entries, Descent(task.step))}
        seconds = median_step(steppers, {"by entries": 9}, 3)["by entries"]
        rows.append({"series": "compressed, d = 4000", "dimension": 4000, "entries": count, "seconds": seconds})
        print(rows[-1], flush=True)
    return {"rows": rows}


def section_subspace() -> dict[str, Any]:
    """The singular values of the first factor and the theorem's blocks over time, all entries seen (d = 100, r = 3)."""
    dimension, rank, scale = 100, 3, 0.1
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(dimension, rank, generator=generator, dtype=torch.float64)
    target = target @ torch.randn(rank, dimension, generator=generator, dtype=torch.float64) / rank**0.5
    start = full_start((dimension, dimension), DEPTH, scale, generator)
    basis = end_to_end_basis(start.factors, start.end_to_end() - target, rank)
    carried = bases(start, basis, scale)
    step = automatic_step(float(torch.linalg.matrix_norm(target, ord=2)), 1.0, DEPTH)
    decay = 0.3
    history: list[dict[str, Any]] = []

    def watch(iteration: int, chain: Chain, loss: float) -> bool:
        seen = blocks(chain, carried, 2 * rank)
        rho = rho_path(scale, DEPTH, step, decay, iteration)[-1]
        eye = torch.eye(dimension - 2 * rank, dtype=torch.float64)
        history.append(
            {
                "iteration": iteration,
                "loss": loss,
                "values": torch.linalg.svdvals(chain.factors[0]).tolist(),
                "off_diagonal": max(float(part.abs().max()) for block in seen for part in (block.upper, block.lower)),
                "rho_error": max(float((block.tail - rho * eye).abs().max()) for block in seen),
                "rho": rho,
            }
        )
        return False

    descent = Descent(step, weight_decay=decay, max_iterations=2_000, tolerance=0.0, watch_every=10)
    descend(start, WholeMatrix(target), descent, watch)
    return {"dimension": dimension, "rank": rank, "step_size": step, "weight_decay": decay, "history": history}


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "subspace": section_subspace,
    "thousand": section_thousand,
    "completion": section_completion,
    "scaling": section_scaling,
}


def exponent(rows: list[dict[str, Any]], series: str, against: str, least: int = 0) -> float:
    """The slope of log seconds against log size, by least squares over sizes of at least ``least``."""
    pairs = [(math.log(row[against]), math.log(row["seconds"])) for row in rows if row["series"] == series and row[against] >= least]
    return statistics.linear_regression(*zip(*pairs, strict=True)).slope


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def completion_table(found: dict[str, Any]) -> list[str]:
    runs = found["runs"]
    full = runs["full"]
    lines = [
        f"## d = {found['dimension']}, r = {RANK}, 20 % seen: every solver run whole",
        "",
        f"Step size {found['step_size']:.3g} (sum form). A full step takes {1e3 * found['full_step_seconds']['mask']:.1f} ms with a "
        f"dense mask and {1e3 * found['full_step_seconds']['list']:.1f} ms with entry lists; the full network ran with the quicker.",
        "",
    ]
    body: list[list[str]] = []
    rows = []
    for name, run in runs.items():
        ended = "" if run["converged"] else " (stopped)"
        against = f"{run['iterations'] / full['iterations']:.3f}"
        body.append([name, f"{run['parameters']:,}", f"{run['iterations']:,}{ended}", against, f"{run['seconds']:.1f}"])
        body[-1] += [f"{run['train_error']:.2e}", f"{run['test_error']:.2e}"]
        rows.append({"solver": name, **{key: value for key, value in run.items() if key != "curve"}})
    write_csv(RESULTS / "deep_factorization_completion.csv", rows)
    curves = [
        {"solver": name, "iteration": point[0], "seconds": f"{point[1]:.3f}", "train": f"{point[2]:.4e}", "test": f"{point[3]:.4e}"}
        for name, run in runs.items()
        for point in run["curve"][:: max(1, len(run["curve"]) // 60)]
    ]
    write_csv(RESULTS / "deep_factorization_curves.csv", curves)
    head = ["solver", "parameters", "iterations", "against full", "seconds", "train error", "test error"]
    return [*lines, *table(head, body)]


def thousand_table(found: dict[str, Any]) -> list[str]:
    steps, run = found["step_seconds"], found["compressed"]
    full = min(steps["full, dense mask"], steps["full, entry list"])
    lines = [
        "## d = 1000, r = 5, 20 % seen: seconds",
        "",
        *table(
            ["solver", "seconds per step (median)", "against compressed"],
            ([name, f"{seconds:.4g}", f"{seconds / steps['compressed']:.1f}"] for name, seconds in steps.items()),
        ),
        f"The compressed factorization ran whole: {run['iterations']:,} iterations, {run['seconds']:.1f} s, train error "
        f"{run['train_error']:.2e}, test error {run['test_error']:.2e}. The full network at its quicker step needs "
        f"{full * run['iterations'] / 1.15:,.0f} s even if it converged in 1/1.15 of these iterations: "
        f"**{full * run['iterations'] / 1.15 / run['seconds']:.0f} times as long**.",
    ]
    rows = [{"solver": name, "seconds_per_step": seconds} for name, seconds in steps.items()]
    write_csv(RESULTS / "deep_factorization_thousand.csv", rows)
    return lines


def scaling_table(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    write_csv(RESULTS / "deep_factorization_scaling.csv", rows)
    fits = [
        ("full, 20 % seen", "dimension", 500),
        ("compressed, 20 % seen", "dimension", 500),
        ("compressed, 50 entries a row", "dimension", 500),
        ("compressed, d = 4000", "entries", 200_000),
    ]
    fitted = ([series, against, f"{least:,} up", f"{exponent(rows, series, against, least):.2f}"] for series, against, least in fits)
    measured = ([row["series"], f"{row['dimension']:,}", f"{row['entries']:,}", f"{1e3 * row['seconds']:.3g}"] for row in rows)
    lines = ["## Growth of the seconds per step", "", *table(["series", "against", "fitted from", "exponent"], fitted)]
    return [*lines, *table(["series", "d", "entries", "ms per step"], measured)]


def subspace_table(found: dict[str, Any]) -> list[str]:
    history = found["history"]
    return [
        f"## The invariant subspace: d = {found['dimension']}, r = {found['rank']}, all entries seen",
        "",
        f"Scale 0.1, weight decay {found['weight_decay']}, {history[-1]['iteration']:,} steps of {found['step_size']:.3g}. Largest entry "
        f"outside the diagonal blocks at any time {max(point['off_diagonal'] for point in history):.1e}; largest distance of the tail "
        f"blocks from rho I {max(point['rho_error'] for point in history):.1e}.",
    ]


def draw(found: dict[str, dict[str, Any]]) -> None:
    """Draws the pictures of the sections that are there."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    if "subspace" in found:
        section = found["subspace"]
        figure, axes = plt.subplots(figsize=(6.4, 4.0))
        values = torch.tensor([point["values"] for point in section["history"]])
        times = [point["iteration"] for point in section["history"]]
        width = 2 * section["rank"]
        axes.plot(times, values[:, width:], color="0.6", linewidth=0.8)
        axes.plot(times, values[:, : section["rank"]], color="tab:blue", linewidth=1.4)
        axes.plot(times, values[:, section["rank"] : width], color="tab:orange", linewidth=1.4)
        axes.plot(times, [point["rho"] for point in section["history"]], "k--", linewidth=1.0)
        axes.set(xlabel="iteration", ylabel="singular values of the first factor", yscale="log")
        axes.set_title(f"{width} directions move; the other {section['dimension'] - width} follow rho (dashed)")
        figure.tight_layout()
        figure.savefig(RESULTS / "deep_factorization_subspace.png", dpi=110)
    if "completion" in found:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.0, 4.0), sharey=True)
        for name, run in found["completion"]["runs"].items():
            iterations, seconds, train, test = (list(part) for part in zip(*run["curve"], strict=True))
            (line,) = left.plot(iterations, train, label=name)
            left.plot(iterations, test, color=line.get_color(), linestyle=":")
            right.plot(seconds[1:], train[1:], label=name)
        left.set(xlabel="iteration", ylabel="relative squared error (dotted: unseen entries)", yscale="log")
        right.set(xlabel="seconds", xscale="log")
        left.legend()
        figure.suptitle("Completing a 300 x 300 matrix of rank 5 from 20 % of its entries")
        figure.tight_layout()
        figure.savefig(RESULTS / "deep_factorization_completion.png", dpi=110)
    if "scaling" in found:
        figure, axes = plt.subplots(figsize=(6.4, 4.0))
        rows = found["scaling"]["rows"]
        for series in ("full, 20 % seen", "compressed, 20 % seen", "compressed, 50 entries a row"):
            points = [(row["dimension"], row["seconds"]) for row in rows if row["series"] == series]
            axes.plot(*zip(*points, strict=True), marker="o", label=series)
        axes.set(xlabel="d", ylabel="seconds per step", xscale="log", yscale="log")
        axes.legend()
        figure.tight_layout()
        figure.savefig(RESULTS / "deep_factorization_scaling.png", dpi=110)


def render(work: Path) -> None:
    found = {name: json.loads(path.read_text()) for name in SECTIONS if (path := work / f"{name}.json").is_file()}
    tables = {
        "completion": completion_table,
        "thousand": thousand_table,
        "scaling": scaling_table,
        "subspace": subspace_table,
    }
    lines = [
        "# Deep matrix completion",
        "",
        "Written by `python benchmarks/deep_factorization.py`. Errors are squared and relative: the squared norm of the error over the "
        "squared norm of the truth, on seen (train) or unseen (test) entries. Gradient descent in float64, depth 3, scale 1e-3, "
        "gamma 0.01, entries of variance one.",
        "",
    ]
    for name, drawn in tables.items():
        if name in found:
            machine = found[name]["machine"]
            lines += [
                *drawn(found[name]),
                "",
                f"Measured with {machine['threads']} thread(s), torch {machine['torch']}, "
                f"{machine['processor']}; the machine had other work beside it.",
                "",
            ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "deep_factorization.md").write_text("\n".join(lines), encoding="utf-8")
    draw(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=sorted(SECTIONS), help="only this one; repeatable")
    parser.add_argument("--work", type=Path, default=Path("runs/deep_factorization"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.section or SECTIONS:
        path = options.work / f"{name}.json"
        if path.is_file():
            continue
        print(f"section {name}", flush=True)
        found = SECTIONS[name]()
        found["machine"] = {"threads": options.threads, "torch": torch.__version__, "processor": platform.machine()}
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    render(options.work)


if __name__ == "__main__":
    main()
