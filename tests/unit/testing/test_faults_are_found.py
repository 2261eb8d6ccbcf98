"""The suite for authors of methods finds each planted fault: checks that pass everything would prove nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from adapter_toys import FORMS
from regraft.allocation import ALLOCATORS
from regraft.allocation.contract import ClosedForm, Proposal, Ranks
from regraft.compression import COMPRESSORS
from regraft.export import EXPORTERS, AdapterFormat, Exportable
from regraft.importance import CRITERIA, Criterion, Evidence
from regraft.numerics.truncation import Truncation
from regraft.plans import Groups, RankSpace, RankTrial, Scores
from regraft.selection import SELECTORS, Budget, Selector
from regraft.testing import (
    NonconformingError,
    Watched,
    check_adapter,
    check_allocator,
    check_compressor,
    check_criterion,
    check_exporter,
    check_selector,
)

L2 = CRITERIA.get("l2")


def scores_like_l2(change: Callable[[Evidence, dict[str, Tensor]], Mapping[str, Tensor]]) -> Criterion:
    return replace(L2, name="planted", units=lambda evidence: change(evidence, dict(L2.units(evidence))))


def marred(evidence: Evidence, values: dict[str, Tensor]) -> Mapping[str, Tensor]:
    with torch.no_grad():
        next(iter(evidence.model.parameters())).add_(1.0)
    return values


BAD_CRITERIA: dict[str, tuple[Callable[[Evidence, dict[str, Tensor]], Mapping[str, Tensor]], str]] = {
    "missing": (lambda _, values: dict(list(values.items())[1:]), "not at all"),
    "shape": (lambda _, values: {name: score[:1] for name, score in values.items()}, "units of"),
    "float32": (lambda _, values: {name: score.float() for name, score in values.items()}, "float64 is wanted"),
    "nan": (lambda _, values: {name: score * float("nan") for name, score in values.items()}, "not finite"),
    "generator": (lambda _, values: {name: score + torch.rand(1).double() for name, score in values.items()}, "global random generator"),
    "changed": (marred, "changes the weight|other scores"),
    "position": (
        lambda _, values: {n: s + 100.0 * torch.arange(len(s), dtype=torch.float64) for n, s in values.items()},
        "order of channels",
    ),
    "upside down": (lambda _, values: {name: -score for name, score in values.items()}, "prefers a channel of zeros"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BAD_CRITERIA)
def test_a_faulty_criterion_is_found(fault: str) -> None:
    change, message = BAD_CRITERIA[fault]
    with pytest.raises(NonconformingError, match=message):
        check_criterion(scores_like_l2(change))


UNIFORM = SELECTORS.get("uniform")
BAD_SELECTORS: dict[str, tuple[Callable[[dict[str, int], Budget], Mapping[str, int]], str]] = {
    "nothing": (lambda kept, _: dict.fromkeys(kept, 0), "the fewest allowed"),
    "unaligned": (lambda kept, budget: {n: c - (budget.align == 8 and n.endswith("ffn")) for n, c in kept.items()}, "no multiple"),
    "too little": (lambda kept, _: {}, "the share is missed"),
    "outside": (lambda kept, budget: kept | {"layers.0.ffn": 48}, "may not be cut|widths|layers keep|missed"),
    "unknown": (lambda kept, _: kept | {"layers.9.ffn": 8}, "no group"),
}


@pytest.mark.parametrize("fault", BAD_SELECTORS)
def test_a_faulty_selector_is_found(fault: str) -> None:
    change, message = BAD_SELECTORS[fault]

    def choose(groups: Groups, scores: Scores, budget: Budget) -> Mapping[str, int]:
        return change(dict(UNIFORM.choose(groups, scores, budget)), budget)

    with pytest.raises(NonconformingError, match=message):
        check_selector(Selector("planted", needs_curves=False, choose=choose))


def lost_of_weights(layer: Watched, change: Tensor, bias: Tensor) -> float:
    """What `svd` minimises, and nothing else does."""
    return float(change.square().sum())


BAD_TRUNCATIONS: dict[str, tuple[Callable[[Truncation], Truncation], str]] = {
    "float32": (lambda found: replace(found, left_OK=found.left_OK.float()), "float64 is wanted"),
    "one rank": (lambda found: replace(found, left_OK=found.left_OK[:, :3], right_KI=found.right_KI[:3]), "for a full rank of"),
    "ascending": (
        lambda found: Truncation(found.left_OK.flip(1), found.right_KI.flip(0), found.price_K),
        "is predicted to lose",
    ),
    "cheap": (lambda found: replace(found, price_K=0.5 * found.price_K), "rank 0 is predicted to lose"),
    "negative": (lambda found: replace(found, price_K=-found.price_K), "negative"),
    "damped": (lambda found: replace(found, right_KI=0.999 * found.right_KI), "is predicted to lose"),
    "drawn": (lambda found: replace(found, left_OK=found.left_OK + torch.rand(1)), "global random generator"),
    "biased": (
        lambda found: replace(found, mean_I=torch.zeros(found.right_KI.shape[1]), mean_O=torch.zeros(found.left_OK.shape[0])),
        "adds_bias=False",
    ),
}


@pytest.mark.parametrize("fault", BAD_TRUNCATIONS)
def test_a_faulty_compression_method_is_found(fault: str) -> None:
    change, message = BAD_TRUNCATIONS[fault]
    good = COMPRESSORS.get("svd")
    with pytest.raises(NonconformingError, match=message):
        check_compressor(replace(good, truncate=lambda evidence: change(good.truncate(evidence))), lost_of_weights)


def test_a_method_judged_by_the_formula_of_another_is_found() -> None:
    with pytest.raises(NonconformingError, match="is predicted to lose"):
        check_compressor(COMPRESSORS.get("asvd"), lost_of_weights)


BAD_CLOSED_FORMS: dict[str, tuple[Callable[[RankSpace], Ranks], str]] = {
    "too much": (lambda space: (space.choices[-1],) * len(space.slots), "parameters"),
    "too little": (lambda space: (space.choices[0],) * len(space.slots), "spends"),
    "not allowed": (lambda space: (3,) * len(space.slots), "not allowed"),
    "short": (lambda space: space.uniform_ranks[1:], "ranks for"),
    "drawn": (lambda space: (int(np.random.choice(space.choices)), *space.uniform_ranks[1:]), "global random generator"),  # noqa: NPY002
}


@pytest.mark.parametrize("fault", BAD_CLOSED_FORMS)
def test_a_faulty_closed_form_is_found(fault: str) -> None:
    allocate, message = BAD_CLOSED_FORMS[fault]
    with pytest.raises(NonconformingError, match=message):
        check_allocator(ClosedForm("planted", allocate))


def test_a_learner_that_repeats_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = ALLOCATORS.get("rankadaptor")

    def propose(
        self: object, space: RankSpace, history: Sequence[RankTrial], count: int, generator: object, pending: Sequence[Ranks] = ()
    ) -> tuple[Proposal, ...]:
        return (Proposal(space.uniform_ranks, "uniform"),)

    monkeypatch.setattr(type(learner), "propose", propose)
    with pytest.raises(NonconformingError, match="was measured, or is pending"):
        check_allocator(learner)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"start": 0.0}, "starts with a change"), ({"exports": False}, "gives factors all the same"), ({"layers": ("linear",)}, "and can")],
)
def test_a_promise_that_an_adapter_does_not_keep_is_found(change: dict[str, object], message: str) -> None:
    with pytest.raises(NonconformingError, match=message):
        check_adapter(replace(FORMS["lora_xs" if "start" in change else "nola"], **change))


def test_a_faulty_format_is_found() -> None:
    good = EXPORTERS.get("peft-lora")
    assert isinstance(good, AdapterFormat)

    def pickled(adapter: Exportable, folder: Path) -> str:
        words = good.write(adapter, folder)
        (folder / "weights.bin").write_bytes(b"")
        return words

    def silent(adapter: Exportable, folder: Path) -> str:
        return good.write(adapter, folder) if adapter.factors else "nothing"

    with pytest.raises(NonconformingError, match="pickled"):
        check_exporter(replace(good, write=pickled))
    with pytest.raises(NonconformingError, match="changes nothing"):
        check_exporter(replace(good, write=silent))
    with pytest.raises(NonconformingError, match="writes nothing"):
        check_exporter(replace(good, write=lambda adapter, folder: "nothing"))
