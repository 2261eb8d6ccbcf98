"""The parameter target is met within one aligned unit, whatever the sizes; what cannot be met is refused with what can."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import InputError, PlanError
from regraft.plans import Curves, Group, Groups, Scores
from regraft.selection import Budget, select
from regraft.selection.budget import alignments_for, best_units


def groups_of(layers, heads, ffn, head_cost, ffn_cost, rest):
    made = []
    for layer in range(layers):
        made.append(Group(f"layers.{layer}.heads", "heads", layer, heads, (), head_cost))
        made.append(Group(f"layers.{layer}.ffn", "ffn", layer, ffn, (), ffn_cost))
    total = rest + layers * (heads * head_cost + ffn * ffn_cost)
    return Groups("f", "llama", layers, total, tuple(made))


def scores_of(groups, seed=0):
    draw = random.Random(seed)
    return Scores("f", "planted", {group.name: tuple(draw.random() for _ in range(group.units)) for group in groups.groups})


def budget(groups, ratio, **options):
    given = {"shape": "per-layer", "layers": tuple(range(groups.layers)), "targets": ("heads", "ffn"), "align": 16}
    return Budget(ratio=ratio, **(given | options))


@pytest.mark.parametrize("shape", ["per-layer", "uniform"])
def test_uniform_takes_heads_in_some_layers_where_channels_are_too_few(shape):
    """A head in every layer is twice too much and all channels half too little: only layers that differ can meet the target."""
    groups = groups_of(layers=4, heads=3, ffn=8, head_cost=1000, ffn_cost=10, rest=680)  # 13,000 in all
    plan = select("uniform", groups, scores_of(groups), budget(groups, 2000 / 13_000, align=1, shape=shape))
    kept = [len(next((cut.kept for cut in plan.cuts if cut.group == f"layers.{layer}.heads"), range(3))) for layer in range(4)]
    if shape == "uniform":
        assert len(set(kept)) == 1
        return
    assert sorted(kept) == [2, 2, 3, 3]
    assert abs(13_000 - 2000 - plan.parameters_after) <= 10 * 4 / 2
    first = {layer: min(scores_of(groups).values[f"layers.{layer}.heads"]) for layer in range(4)}
    assert {layer for layer in range(4) if kept[layer] == 2} == set(sorted(first, key=lambda layer: first[layer])[:2])


@pytest.mark.parametrize("selector", ["uniform", "global"])
def test_a_ratio_below_one_wide_step_takes_a_narrower_one(selector):
    groups = groups_of(layers=2, heads=4, ffn=64, head_cost=900, ffn_cost=30, rest=2000)
    wanted = budget(groups, 0.01, align=1)
    plan = select(selector, groups, scores_of(groups), wanted, auto_align=True)
    assert plan.align < 16
    assert abs(plan.achieved - 0.01) <= 30 * plan.align / groups.parameters
    with pytest.raises(InputError, match="ratio 1e-05 removes less than one unit"):
        select(selector, groups, scores_of(groups), replace(wanted, ratio=1e-5), auto_align=True)


SIZES = {
    "layers": st.integers(1, 8),
    "heads": st.integers(1, 8),
    "ffn": st.integers(17, 400),
    "ratio": st.floats(0.02, 0.6),
    "align": st.sampled_from([1, 8, 16]),
}


def planned(selector, groups, scores, wanted):
    """A plan, or None where the ratio is refused for a reason that the message gives."""
    try:
        return select(selector, groups, scores, wanted)
    except InputError as refusal:
        message = str(refusal)
    assert re.search("would leave a layer empty|less than one unit", message)
    return None


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(**SIZES, seed=st.integers(0, 1000))
def test_global_meets_the_target_within_one_aligned_unit(layers, heads, ffn, ratio, align, seed):
    groups = groups_of(layers, heads, ffn, head_cost=900, ffn_cost=30, rest=2000)
    plan = planned("global", groups, scores_of(groups, seed), budget(groups, ratio, align=align))
    if plan is None:
        return
    removed = plan.parameters_before - plan.parameters_after
    kept = {cut.group: len(cut.kept) for cut in plan.cuts}
    ffn_left = any(kept.get(f"layers.{layer}.ffn", ffn) > align for layer in range(layers))
    assert abs(removed - ratio * groups.parameters) <= (align * 30 if ffn_left else 900)
    assert all(count >= 1 for count in kept.values())
    assert all(count % align == 0 for name, count in kept.items() if name.endswith("ffn"))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(**SIZES)
def test_uniform_gives_every_layer_the_same_widths_and_meets_the_target(layers, heads, ffn, ratio, align):
    groups = groups_of(layers, heads, ffn, head_cost=900, ffn_cost=30, rest=2000)
    plan = planned("uniform", groups, scores_of(groups), budget(groups, ratio, align=align, shape="uniform"))
    if plan is None:
        return
    removed = plan.parameters_before - plan.parameters_after
    widths = {kind: {len(cut.kept) for cut in plan.cuts if cut.group.endswith(kind)} for kind in ("heads", "ffn")}
    assert all(len(found) <= 1 for found in widths.values())
    floor_reached = widths["ffn"] and min(widths["ffn"]) <= align
    heads_dominate = (ffn - align) * 30 < 900  # then no feed-forward width can make up for one head
    assert abs(removed - ratio * groups.parameters) <= layers * (900 if floor_reached or heads_dominate else align * 30)


def test_the_best_units_stay():
    groups = groups_of(1, 2, 64, 900, 30, 100)
    values = {"layers.0.heads": (2.0, 1.0), "layers.0.ffn": tuple(float((7 * unit) % 64) for unit in range(64))}
    plan = select("uniform", groups, Scores("f", "planted", values), budget(groups, 0.3))
    kept = {cut.group: cut.kept for cut in plan.cuts}
    ffn = kept["layers.0.ffn"]
    gone = set(range(64)) - set(ffn)
    assert min(values["layers.0.ffn"][unit] for unit in ffn) > max(values["layers.0.ffn"][unit] for unit in gone)


def test_global_takes_from_the_layer_that_matters_least():
    groups = groups_of(2, 1, 64, 900, 30, 0)
    values = {"layers.0.heads": (1e9,), "layers.1.heads": (1e9,)}
    values |= {"layers.0.ffn": tuple(range(100, 164)), "layers.1.ffn": tuple(range(64))}
    plan = select("global", groups, Scores("f", "planted", values), budget(groups, 0.2))
    assert [cut.group for cut in plan.cuts] == ["layers.1.ffn"]


# Layers, key-value heads, feed-forward channels, parameters of a head, of a channel and of the rest, as models have them.
SHAPES_OF_MODELS = {
    1536: (30, 3, 1536, 294_912, 1728, 49152 * 576),
    172: (5, 4, 172, 3072, 192, 512 * 64),
    768: (6, 6, 768, 55_296, 864, 32000 * 288),
    11008: (32, 32, 11008, 2_097_152, 12_288, 64000 * 4096),
}


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize(
    ("ffn", "ratio", "align"),
    [
        (1536, 0.2, 64),
        (1536, 0.3, 32),
        (172, 0.2, 2),
        (768, 0.2, 64),
        (768, 0.05, 16),
        (11008, 0.2, 256),
    ],
)
def test_auto_takes_the_widest_multiple_that_meets_the_target_within_its_stated_cost(ffn, ratio, align, shape):
    groups = groups_of(*SHAPES_OF_MODELS[ffn])
    plan = select("uniform", groups, scores_of(groups), budget(groups, ratio, shape=shape), auto_align=True)
    assert plan.align == align
    widths = {len(cut.kept) for cut in plan.cuts if cut.group.endswith("ffn")}
    assert widths, "no width was cut"
    assert all(width % align == 0 for width in widths)
    gone = sum((group.units - len(cut.kept)) * group.unit_parameters for cut in plan.cuts for group in [groups.named()[cut.group]])
    missed = abs(gone / groups.parameters - ratio)
    assert missed <= (min(0.01, 0.05 * ratio) if align >= 32 else 0.0025)
    for wider in (256, 64, 32, 16, 8, 4, 2):
        if align < wider <= ffn // 8 or align < wider <= 16:
            other = select("uniform", groups, scores_of(groups), budget(groups, ratio, shape=shape, align=wider))
            assert abs(other.achieved - ratio) > (min(0.01, 0.05 * ratio) if wider >= 32 else 0.0025), wider


def test_a_wide_multiple_needs_eight_steps_and_a_count_of_parameters():
    groups = groups_of(*SHAPES_OF_MODELS[1536])
    assert alignments_for(groups, budget(groups, 0.2))[0] == 64
    assert alignments_for(groups, budget(groups, 0.2, targets=("heads",)))[0] == 16
    milliseconds = Curves("f", "milliseconds", 1.0, {})
    assert alignments_for(groups, budget(groups, 0.2, curves=milliseconds))[0] == 16


def test_alignment_is_lowered_where_it_misses():
    tiny = groups_of(3, 2, 40, 900, 60, 500)
    plan = select("uniform", tiny, scores_of(tiny), budget(tiny, 0.2), auto_align=True)
    assert plan.align == 1
    assert plan.achieved == pytest.approx(0.2, abs=3 * 60 / tiny.parameters)


def test_equal_widths_that_remove_nothing_name_the_shape_that_does():
    groups = groups_of(layers=40, heads=1, ffn=20, head_cost=900, ffn_cost=30, rest=2000)
    wanted = budget(groups, 0.005, shape="uniform", align=1)
    with pytest.raises(InputError, match=r"less than one unit of every layer.*`shape=per-layer`"):
        select("uniform", groups, scores_of(groups), wanted)
    assert select("global", groups, scores_of(groups), replace(wanted, shape="per-layer")).cuts


@pytest.mark.parametrize("ratio", [0.95, 0.999])
def test_a_ratio_that_would_empty_a_layer_names_what_is_possible(ratio):
    groups = groups_of(2, 2, 64, 900, 30, 5000)
    with pytest.raises(InputError, match=r"would leave a layer empty: at most 0\.\d+"):
        select("global", groups, scores_of(groups), budget(groups, ratio))


def test_scores_of_another_model_are_refused():
    groups = groups_of(1, 2, 64, 900, 30, 0)
    with pytest.raises(PlanError, match="score this model again"):
        select("uniform", groups, Scores("other", "x", {}), budget(groups, 0.2))


def test_ties_keep_the_earlier_unit():
    assert best_units((1.0, 1.0, 1.0), 2) == (0, 1)
