from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft import plans
from regraft.errors import PlanError
from regraft.plans import (
    Confirmation,
    CrossValidation,
    Curve,
    Curves,
    Cut,
    Factoring,
    FactorPlan,
    FactorSite,
    FactorSpace,
    Finalist,
    Group,
    GroupKind,
    Groups,
    LossReport,
    Measurement,
    Member,
    PairedScore,
    PastSearch,
    Provenance,
    PrunePlan,
    RankPlan,
    RankSearch,
    RankSlot,
    RankSpace,
    RankTrial,
    Removed,
    Scores,
    SizeReport,
    SpeedReport,
    TaskReport,
    TaskScore,
    from_json,
    to_dict,
    to_json,
)

NAMES = st.text(min_size=1, max_size=20)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 10**12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)

MEMBERS = st.builds(Member, NAMES, st.integers(0, 1), st.sampled_from(["in", "out"]), COUNTS, COUNTS, COUNTS, COUNTS)
GROUPS = st.builds(
    Group,
    NAMES,
    st.sampled_from(get_args(GroupKind)),
    st.none() | COUNTS,
    COUNTS,
    st.lists(MEMBERS, max_size=2).map(tuple),
    COUNTS,
)
CUTS = st.builds(Cut, NAMES, st.lists(COUNTS, max_size=5).map(tuple))
REMOVED = st.builds(Removed, COUNTS, NUMBERS)
PRUNE_PLANS = st.builds(
    PrunePlan,
    NAMES,
    NAMES,
    NAMES,
    st.sampled_from(["uniform", "per-layer"]),
    NUMBERS,
    COUNTS,
    COUNTS,
    COUNTS,
    st.lists(CUTS, max_size=3).map(tuple),
    st.dictionaries(NAMES, JSON, max_size=2),
    st.dictionaries(NAMES, REMOVED, max_size=2),
)
FACTORINGS = st.builds(Factoring, NAMES, COUNTS, st.booleans())
LAYOUTS = st.sampled_from(["plain", "pifa"])
FACTOR_PLANS = st.builds(
    FactorPlan,
    NAMES,
    NAMES,
    NAMES,
    LAYOUTS,
    NUMBERS,
    COUNTS,
    COUNTS,
    st.lists(FACTORINGS, max_size=3).map(tuple),
    st.none() | NUMBERS,
    st.dictionaries(NAMES, JSON, max_size=2),
)
FACTOR_SITES = st.builds(
    FactorSite,
    NAMES,
    COUNTS,
    NAMES,
    COUNTS,
    COUNTS,
    COUNTS,
    st.lists(COUNTS, max_size=4).map(tuple),
    st.lists(NUMBERS, max_size=4).map(tuple),
)
RANK_PLANS = st.builds(RankPlan, NAMES, NAMES, st.dictionaries(NAMES, COUNTS, max_size=3), NUMBERS, COUNTS)
LOSSES = st.builds(LossReport, NUMBERS, NUMBERS, NUMBERS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, st.booleans(), NAMES, NAMES)
SIZES = st.builds(SizeReport, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
SPEEDS = st.builds(SpeedReport, NUMBERS, NUMBERS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, NAMES)
OUTCOMES = st.lists(NUMBERS, max_size=3).map(tuple)
SCORES = st.builds(TaskScore, NAMES, NAMES, NUMBERS, st.none() | NUMBERS, COUNTS, COUNTS, NAMES, st.booleans(), OUTCOMES)
CURVES = st.builds(
    Curve, st.lists(COUNTS, max_size=4).map(tuple), st.lists(NUMBERS, max_size=4).map(tuple), st.lists(NUMBERS, max_size=4).map(tuple)
)
RANKS = st.lists(COUNTS, max_size=4).map(tuple)
SLOTS = st.builds(
    RankSlot, NAMES, st.lists(NAMES, max_size=2).map(tuple), COUNTS, COUNTS, COUNTS, st.dictionaries(NAMES, NUMBERS, max_size=2)
)
SPACES = st.builds(RankSpace, NAMES, st.sampled_from(["layer", "module"]), st.lists(SLOTS, max_size=2).map(tuple), RANKS, COUNTS, COUNTS)
TRIALS = st.builds(
    RankTrial, RANKS, st.none() | NUMBERS, NUMBERS, NUMBERS, st.sampled_from(["recovery", "elastic"]), COUNTS, st.text(max_size=9)
)
TRIED = st.lists(TRIALS, max_size=2).map(tuple)
FINALISTS = st.builds(Finalist, RANKS, st.lists(NUMBERS, max_size=3).map(tuple), NUMBERS, NUMBERS, NUMBERS)
CONFIRMATIONS = st.builds(Confirmation, st.lists(FINALISTS, max_size=2).map(tuple), RANKS, NUMBERS, NAMES)
VALIDATIONS = st.builds(CrossValidation, NUMBERS, NUMBERS, NUMBERS, COUNTS, COUNTS)
ANY_PLAN = st.one_of(
    SLOTS,
    SPACES,
    TRIALS,
    st.builds(
        PastSearch, SPACES, st.lists(TRIALS, max_size=2).map(tuple), NAMES, COUNTS, NUMBERS, st.dictionaries(NAMES, JSON, max_size=2)
    ),
    REMOVED,
    CONFIRMATIONS,
    VALIDATIONS,
    st.builds(
        RankSearch,
        RANK_PLANS,
        SPACES,
        TRIED,
        st.lists(NAMES, max_size=2).map(tuple),
        RANKS,
        TRIED,
        st.none() | CONFIRMATIONS,
        st.none() | VALIDATIONS,
        st.lists(VALIDATIONS, max_size=2).map(tuple),
        st.none() | NUMBERS,
        NAMES,
    ),
    CURVES,
    st.builds(Curves, NAMES, st.sampled_from(["parameters", "bytes", "milliseconds"]), NUMBERS, st.dictionaries(NAMES, CURVES, max_size=2)),
    FACTORINGS,
    FACTOR_PLANS,
    FACTOR_SITES,
    st.builds(
        FactorSpace,
        NAMES,
        NAMES,
        st.sampled_from(["nats", "share"]),
        LAYOUTS,
        COUNTS,
        COUNTS,
        st.lists(FACTOR_SITES, max_size=2).map(tuple),
    ),
    MEMBERS,
    GROUPS,
    CUTS,
    PRUNE_PLANS,
    RANK_PLANS,
    LOSSES,
    SIZES,
    SPEEDS,
    st.builds(
        Groups,
        NAMES,
        NAMES,
        COUNTS,
        COUNTS,
        st.lists(GROUPS, max_size=2).map(tuple),
        st.dictionaries(NAMES, st.lists(COUNTS, max_size=3).map(tuple), max_size=2),
    ),
    st.builds(Scores, NAMES, NAMES, st.dictionaries(NAMES, st.lists(NUMBERS, max_size=4).map(tuple), max_size=3)),
    st.builds(PairedScore, NAMES, NAMES, NUMBERS, NUMBERS, NUMBERS, COUNTS, COUNTS, NUMBERS),
    st.builds(
        TaskReport,
        NAMES,
        st.lists(SCORES, max_size=2).map(tuple),
        st.lists(LOSSES, max_size=2).map(tuple),
        COUNTS,
        st.dictionaries(NAMES, NAMES, max_size=2),
    ),
    st.builds(Measurement, NAMES, LOSSES, SIZES, st.none() | SPEEDS),
    st.builds(
        Provenance,
        NAMES,
        NAMES,
        NAMES,
        COUNTS,
        st.dictionaries(NAMES, NAMES, max_size=2),
        st.none() | PRUNE_PLANS,
        st.none() | RANK_PLANS,
        st.dictionaries(NAMES, JSON, max_size=2),
        st.dictionaries(NAMES, NAMES, max_size=2),
        st.lists(st.dictionaries(NAMES, JSON, max_size=2), max_size=2).map(tuple),
        st.none() | FACTOR_PLANS,
    ),
)

COVERED = (
    *(Member, Group, Groups, Scores, Curve, Curves, Cut, Removed, PrunePlan, RankPlan),
    *(RankSlot, RankSpace, RankTrial, PastSearch, CrossValidation, Finalist, Confirmation, RankSearch),
    *(Factoring, FactorPlan, FactorSite, FactorSpace),
    *(LossReport, SizeReport, SpeedReport, Measurement, Provenance, TaskScore, TaskReport, PairedScore),
)


@pytest.mark.slow
@given(ANY_PLAN)
def test_json_gives_an_equal_value_back(value: Any) -> None:
    again = from_json(type(value), to_json(value))
    assert again == value
    assert to_json(again) == to_json(value)
    assert to_dict(value) == json.loads(to_json(value, indent=None))


def test_every_plan_is_covered_and_frozen() -> None:
    kinds = {name for name, kind in vars(plans).items() if is_dataclass(kind)}
    assert kinds == {kind.__name__ for kind in COVERED}
    for name in kinds:
        kind = getattr(plans, name)
        assert kind.__dataclass_params__.frozen, f"{name} can be changed"
        assert {field.name for field in fields(kind)} == get_type_hints(kind).keys() - {"__dataclass_fields__"}


def test_a_plan_of_another_kind_is_refused_by_its_first_field() -> None:
    with pytest.raises(PlanError, match=r"^not a PrunePlan: \w+: .*; write it again with regraft$"):
        from_json(PrunePlan, to_json(Cut("layers.0.ffn", (1, 2))))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00"])
def test_text_that_is_no_plan_is_one_line(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        from_json(Cut, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_must_be_finite(bad: float) -> None:
    with pytest.raises(PlanError, match=r"scores of layers\.1\.ffn are not finite"):
        Scores("f", "taylor", {"layers.0.ffn": (1.0, 2.0), "layers.1.ffn": (1.0, bad)})


@given(offset=st.integers(0, 5), size=st.integers(1, 4), repeats=st.integers(1, 3), units=st.integers(1, 5))
def test_units_of_a_member_own_every_index_once(offset: int, size: int, repeats: int, units: int) -> None:
    member = Member("w", 0, "out", offset=offset, size=size, repeats=repeats, stride=units * size)
    owned = [index for unit in range(units) for index in member.indices(unit)]
    assert sorted(owned) == list(range(offset, offset + units * size * repeats))
    assert all(len(list(member.indices(unit))) == member.width for unit in range(units))


def test_achieved_is_the_share_that_is_gone() -> None:
    plan = PrunePlan("f", "l1", "global", "per-layer", 0.2, 16, 1000, 750, ())
    assert plan.achieved == 0.25
