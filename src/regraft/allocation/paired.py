"""Measured gains over uniform, from the longest recovery that both the vector and uniform had on the same seed."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.allocation.contract import Ranks
from regraft.plans import RankSpace, RankTrial


def paired_gains(space: RankSpace, trials: Sequence[RankTrial]) -> dict[Ranks, float]:
    """Returns each vector's gain in nats (loss of uniform minus loss of the vector), in the order of measuring, without elastic scores.

    A vector that was measured on several seeds at its longest fidelity gets their mean.
    """
    uniform = space.uniform_ranks
    real = [trial for trial in trials if trial.kind == "recovery" and trial.loss_nats is not None]
    partner = {(trial.fidelity, trial.seed): trial.loss_nats for trial in real if trial.ranks == uniform}
    found: dict[Ranks, tuple[float, list[float]]] = {}
    for trial in real:
        base = partner.get((trial.fidelity, trial.seed))
        if base is None or trial.loss_nats is None:
            continue
        fidelity, gains = found.setdefault(trial.ranks, (trial.fidelity, []))
        if trial.fidelity > fidelity:
            found[trial.ranks] = (trial.fidelity, [base - trial.loss_nats])
        elif trial.fidelity == fidelity:
            gains.append(base - trial.loss_nats)
    return {ranks: sum(gains) / len(gains) for ranks, (_, gains) in found.items()}
