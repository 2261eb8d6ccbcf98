"""Cost of a rank search in full recoveries, and its distribution over elastic scores, halving and confirmation."""

from __future__ import annotations

from regraft.allocation import ALLOCATORS, MOST_FINALISTS, Rung, Schedule
from regraft.errors import InputError
from regraft.pipelines.ranks.measuring import candidate_cost, elastic_cost
from regraft.settings import AllocateSettings, RecoverSettings

SHORTEST = 1 / 8
"""Length of the first recovery of every vector, as a share of a full recovery's steps."""

_COST = 4.0  # default cost in full recoveries
_LEAST_SCORES, _MOST_SCORES = 64, 256
_ROUNDING = 1e-9


def schedule_of(settings: AllocateSettings, recover: RecoverSettings) -> Schedule:
    """Returns a successive-halving schedule: all vectors for an eighth of the steps, half of them for a quarter, as far as the cost allows.

    The cost of the confirmation and of the elastic adapter is reserved first. Survivors continue their training, so that only the further
    steps cost.

    Raises:
        InputError: The cost is too small for the numbers of vectors, scores or seeds.
    """
    confirming = confirming_cost(settings, recover)
    elastic = 0 if settings.elastic == "auto" else settings.elastic
    least = confirming + elastic_cost(recover, elastic) + settings.trials * candidate_cost(recover, 0.0, SHORTEST)
    cost = max(_COST, least) if settings.cost == "auto" else settings.cost
    if least > cost + _ROUNDING:
        asked = f"`trials={settings.trials}`, `confirm_seeds={settings.confirm_seeds}`" + (f", `elastic={elastic}`" if elastic else "")
        raise InputError(
            f"{asked} cost {least:.2f} full recoveries at least, more than `cost={cost:g}`; raise `cost` to that, or lower one of them"
        )
    if settings.elastic == "auto" and learns_from_scores(settings.method):
        elastic = _scores_for(recover, cost - least)
    spent, width, before, fidelity = confirming + elastic_cost(recover, elastic), settings.trials, 0.0, SHORTEST
    rungs: list[Rung] = []
    while fidelity <= 1.0:
        spent += width * candidate_cost(recover, before, fidelity)
        if spent > cost + _ROUNDING:
            break
        rungs.append(Rung(fidelity, width))
        width, before, fidelity = max(2, -(-width // 2)), fidelity, 2.0 * fidelity
    return Schedule(tuple(rungs), elastic=elastic, cost_limit=cost - confirming)


def confirming_cost(settings: AllocateSettings, recover: RecoverSettings) -> float:
    """Returns the cost of uniform and the largest number of finalists on all fresh seeds, in full recoveries."""
    return settings.confirm_seeds * (1 + MOST_FINALISTS) * candidate_cost(recover, 0.0, settings.confirm_share)


def learns_from_scores(method: str) -> bool:
    """Returns whether a method uses the scores of an elastic adapter."""
    return ALLOCATORS.get(method).learns_from_scores


def _scores_for(recover: RecoverSettings, cost: float) -> int:
    """Returns the number of elastic scores for a cost; 0 if they would be too few to cover every slot."""
    one, two = (elastic_cost(recover, scores) for scores in (1, 2))
    affordable = 1 + int((cost - one + _ROUNDING) / (two - one)) if cost >= one else 0
    return min(affordable, _MOST_SCORES) if affordable >= _LEAST_SCORES else 0
