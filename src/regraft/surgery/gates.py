"""Gates learned together under a hard budget: the units that the predictions miss least when all the others are gone too.

The knapsack adds up damage that was measured or predicted for each group alone, which is least true where much goes. Here every unit has a
gate, and the gates of all layers are trained together, with frozen weights, to keep the dense model's predictions (after DISP-LLM, arXiv
2410.11988, whose hypernetwork and soft budget this leaves out). With the parameter ``theta`` of a unit and ``p = sigmoid(theta)``, each
step runs the model with the inputs of its reading projections times::

    z = m + p - stopgrad(p),   m = 1 for the units that stay when those with the lowest p go until the budget is met

so that the model has exactly the wanted size in every step, and the gradient reaches the gates of units that are gone too. Training begins
at another selector's answer.

What survives best uncut need not be what survives best after the re-fit, which the steps do not see. Therefore three answers are cut and
re-fitted, and judged on windows that no step has seen: the beginning, the learned units, and the learned widths with the units of each
group in the order of their scores. The best is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from regraft.errors import InputError
from regraft.models.precision import float32_on_cpu
from regraft.models.trainable import only_these_train
from regraft.models.view import ModelView
from regraft.numerics.divergence import log_probabilities, mean_divergence, summed_divergence
from regraft.plans import Cut, Group, Groups, PrunePlan, Scores
from regraft.progress import Say, Step, say_nothing
from regraft.selection.budget import Budget, best_units
from regraft.selection.global_threshold import global_threshold
from regraft.surgery.apply_plan import apply_plan
from regraft.surgery.refit_layerwise import RefitMethod

KINDS = ("heads", "query_heads", "ffn")
STEPS, BATCH, RATE = 60, 8, 0.05
_LOOKS = 4  # how often the divergence is said
_JUDGED_SHARE, _MOST_JUDGED = 8, 16
_START = 0.5  # distance in theta, at the beginning, of units that stay and of units that go from p = 1/2

# Reading projection to the groups that it reads: name, input channels unit by unit, and channels of a unit.
_Readers = Mapping[str, Sequence[tuple[str, Tensor, int]]]


@dataclass(frozen=True)
class Gating:
    """A model whose gates are learned.

    Attributes:
        view: The dense model; it is left as it is.
        groups: Groups of the model.
        scores: Scores that order the units of each group at the beginning.
        budget: The amount to remove, with its alignment decided.
        start: The plan to begin with, of the same budget.
        windows_NT: Calibration tokens, int64 (windows, tokens); some are kept for judging.
        seed: Seed for the order of the windows.
        refit: Re-fit after the cut, by which answers are judged; None for none.
        say: Called with a line of progress.
    """

    view: ModelView
    groups: Groups
    scores: Scores
    budget: Budget
    start: PrunePlan
    windows_NT: Tensor
    refit: RefitMethod | None = None
    seed: int = 0
    say: Say = say_nothing


def learn_gates(given: Gating) -> Scores:
    """Returns scores by which one threshold for all layers keeps the units that were learned: gates times the parameters of a unit.

    Raises:
        InputError: Something else than heads and channels is to be removed, or there are fewer than two windows.
    """
    trained = given.budget.prunable(given.groups)
    others = sorted({group.kind for group in trained if group.kind not in KINDS})
    if others:
        raise InputError(f"`select=gates` learns which heads and channels go, and {others[0]} was asked for; use `select=knapsack`")
    if len(given.windows_NT) < 2:
        raise InputError("`select=gates` needs two calibration windows, one to learn on and one to judge by; raise `samples`")
    judges = max(1, min(_MOST_JUDGED, len(given.windows_NT) // _JUDGED_SHARE))
    windows_NT = given.windows_NT.to(given.view.model.device)
    fitted_NT, judged = windows_NT[:-judges], windows_NT[-judges:].split(BATCH)
    begun = {group.name: _begin(group, given) for group in trained}
    with float32_on_cpu(given.view.model), only_these_train(given.view.model, ()):
        aims = [_dense(given.view, ids) for ids in judged]
        learned = _trained(given, begun, fitted_NT, _readers(trained, windows_NT.device))
        answers = {
            "the knapsack's answer": begun,
            "the learned units": learned,
            "the learned widths": {name: _in_the_order_of(given.scores.values[name], theta) for name, theta in learned.items()},
        }
        found: dict[str, float] = {}
        for place, (what, thetas) in enumerate(answers.items()):
            with torch.no_grad():
                model = apply_plan(given.view, given.groups, _plan(given, thetas), fitted_NT, given.refit)
                found[what] = mean_divergence((model(input_ids=ids, use_cache=False).logits for ids in judged), aims)
            given.say(Step(f"judging gates, {what}: divergence {found[what]:.4f} nats", place + 1, len(answers)))
    best = answers[min(found, key=lambda what: found[what])]
    return replace(given.scores, criterion=f"gates from {given.scores.criterion}", values=_values(given, best))


def _trained(given: Gating, begun: Mapping[str, Tensor], fitted_NT: Tensor, readers: _Readers) -> dict[str, Tensor]:
    """Returns theta of every group after all steps."""
    thetas = {name: theta.clone().requires_grad_() for name, theta in begun.items()}
    optimizer = torch.optim.Adam(list(thetas.values()), lr=RATE)
    generator = torch.Generator().manual_seed(given.seed)
    for step in range(STEPS):
        ids = fitted_NT[torch.randint(len(fitted_NT), (min(BATCH, len(fitted_NT)),), generator=generator)]
        aim, masks = _dense(given.view, ids), _masks(given, thetas)
        with torch.enable_grad():
            chances = {name: theta.sigmoid() for name, theta in thetas.items()}
            gates = {name: masks[name] + chance - chance.detach() for name, chance in chances.items()}
            with _gated(given.view, readers, gates):
                now = log_probabilities(given.view.model(input_ids=ids, use_cache=False).logits)
            loss = summed_divergence(now, aim) / ids.numel()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if (step + 1) % (STEPS // _LOOKS) == 0:
            given.say(Step(f"learning gates, divergence of a step {float(loss.detach()):.4f} nats", step + 1, STEPS))
    return {name: theta.detach() for name, theta in thetas.items()}


def _in_the_order_of(scores: Sequence[float], theta: Tensor) -> Tensor:
    """Returns the same values, the largest for the unit with the largest score, and so on."""
    order = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
    sorted_theta = torch.empty_like(theta)
    sorted_theta[order] = theta.sort(descending=True).values
    return sorted_theta


def _values(given: Gating, thetas: Mapping[str, Tensor]) -> dict[str, tuple[float, ...]]:
    named = given.groups.named()
    return {**given.scores.values, **{name: _per_parameter(named[name], theta) for name, theta in thetas.items()}}


def _plan(given: Gating, thetas: Mapping[str, Tensor]) -> PrunePlan:
    """Returns the plan that one threshold makes of gates."""
    scores = replace(given.scores, values=_values(given, thetas))
    kept = global_threshold(given.groups, scores, given.budget)
    cuts = tuple(Cut(name, best_units(scores.values[name], kept[name])) for name, theta in thetas.items() if kept[name] < len(theta))
    return replace(given.start, cuts=cuts)


def _begin(group: Group, given: Gating) -> Tensor:
    """Returns theta of a group, float32 (units,): above 0 for the units that stay, and ordered by their scores within one unit of theta."""
    values = given.scores.values[group.name]
    kept = next((set(entry.kept) for entry in given.start.cuts if entry.group == group.name), set(range(group.units)))
    ranked = sorted(range(group.units), key=lambda unit: (values[unit], -unit))
    theta = torch.zeros(group.units)
    for side in (1.0, -1.0):
        members = [unit for unit in ranked if (unit in kept) == (side > 0)]
        for place, unit in enumerate(members):
            theta[unit] = _START * (side + (place + 0.5) / len(members) - 0.5)
    return theta.to(given.view.model.device)


def _masks(given: Gating, thetas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns ones for the units that stay under the budget when the lowest gates go, and zeros for the others."""
    masks = {name: torch.ones_like(theta, requires_grad=False) for name, theta in thetas.items()}
    for entry in _plan(given, thetas).cuts:
        masks[entry.group].zero_()[list(entry.kept)] = 1.0
    return masks


def _per_parameter(group: Group, theta: Tensor) -> tuple[float, ...]:
    """Returns gates times the parameters of a unit: the threshold counts scores per parameter, and gates rank as they are."""
    return tuple((theta.detach().double().sigmoid() * group.unit_parameters).tolist())


def _readers(groups: Sequence[Group], device: torch.device) -> _Readers:
    """Returns for each reading projection the groups that it reads: name, input channels unit by unit, channels of a unit."""
    found: dict[str, list[tuple[str, Tensor, int]]] = {}
    for group in groups:
        channels = [index for unit in range(group.units) for index in group.reader.indices(unit)]
        module = group.reader.parameter.rpartition(".")[0]
        found.setdefault(module, []).append((group.name, torch.tensor(channels, device=device), group.reader.width))
    return found


@contextmanager
def _gated(view: ModelView, readers: _Readers, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiplies the inputs of reading projections by the gates of their units inside the block."""

    def gate(here: Sequence[tuple[str, Tensor, int]]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows = inputs[0]
            for name, channels, width in here:
                ones = torch.ones(rows.shape[-1], dtype=rows.dtype, device=rows.device)
                rows = rows * ones.index_copy(0, channels, gates[name].to(rows.dtype).repeat_interleave(width))
            return (rows, *inputs[1:])

        return hook

    handles = [view.model.get_submodule(name).register_forward_pre_hook(gate(here)) for name, here in readers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _dense(view: ModelView, ids_BT: Tensor) -> Tensor:
    """Returns the dense model's log-probabilities (windows, tokens, vocabulary)."""
    return log_probabilities(view.model(input_ids=ids_BT, use_cache=False).logits)
