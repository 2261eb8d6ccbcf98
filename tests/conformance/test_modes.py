"""Every mode and several together: the share is met, the count is exact, removing is zeroing, and what matters least goes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_model
from folders import text_file, tiny_tokenizer
from regraft.cli.app import run
from regraft.errors import InputError
from regraft.groups.discover import discover
from regraft.groups.parameter_count import Ledger
from regraft.importance import Evidence, score
from regraft.models.load import load
from regraft.models.view import parameter_count
from regraft.pipelines.prune.prune import prune
from regraft.plans import Curve, Curves, Cut, Groups, Scores
from regraft.selection import Budget, select
from regraft.settings import PruneSettings
from regraft.surgery.cut import cut_state, parameters_after
from verdicts import KINDS
from zeroing import Gone, zeroed

QUICK = {"samples": 4, "seq_len": 16, "calibration": text_file()}
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
EVERYTHING = ("heads", "query_heads", "ffn", "residual", "layers", "attention", "mlp")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model("llama")


@pytest.fixture(scope="module")
def groups(model) -> Groups:
    return discover(model, KINDS)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("modes") / "llama"
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def gone(groups: Groups, cuts: tuple[Cut, ...]) -> Gone:
    lost = {entry.group: sorted(set(range(groups.named()[entry.group].units)) - set(entry.kept)) for entry in cuts}

    def by_layer(kind):
        return {layer: lost[name] for layer in range(groups.layers) if (name := f"layers.{layer}.{kind}") in lost}

    return Gone(
        heads=by_layer("heads"),
        query_heads=by_layer("query_heads"),
        ffn=by_layer("ffn"),
        residual=tuple(lost.get("residual", ())),
        attention=tuple(by_layer("attention")),
        mlp=tuple(by_layer("mlp")),
        layers=tuple(by_layer("layer")),
    )


# Targets, ratio, and the largest step by which it can be missed: one unit of what closes the gap, in parameters.
MODES = [
    (("query_heads",), 0.06, 3 * 2 * 3 * 8 * 48),
    (("residual",), 0.2, 1300),
    (("layers",), 0.3, 16_300),
    (("attention",), 0.2, 7000),
    (("mlp",), 0.2, 9300),
    (("residual", "ffn"), 0.25, 3 * 144),
    (("layers", "ffn"), 0.4, 3 * 144),
    (("heads", "query_heads", "attention", "ffn"), 0.35, 3 * 144),
    (EVERYTHING, 0.5, 3 * 144),
]


@pytest.mark.long
@pytest.mark.parametrize(("targets", "ratio", "unit"), MODES)
@pytest.mark.parametrize("select_by", ["uniform", "global"])
def test_the_share_is_met_and_removing_is_zeroing(folder, targets, ratio, unit, select_by):
    settings = PruneSettings(
        targets=targets, ratio=ratio, criterion="l1", select=select_by, shape="per-layer", align=1, depth="block_influence", **QUICK
    )
    done = prune(folder, None, settings)
    plan = done.plan
    assert parameter_count(done.model) == plan.parameters_after
    assert abs(plan.parameters_before * (1 - ratio) - plan.parameters_after) <= unit
    dense = done.loaded.model
    with torch.no_grad(), zeroed(dense, "llama", gone(done.groups, plan.cuts), groups=3, repeats=2, dim=8):
        want = dense(IDS).logits
    with torch.no_grad():
        assert (done.model(IDS).logits - want).abs().max() <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("select_by", ["uniform", "global", "knapsack"])
@pytest.mark.parametrize("targets", [("heads", "query_heads", "ffn"), ("layers",), ("residual", "layers", "heads", "ffn")])
def test_a_uniform_shape_stays_of_the_familys_own_class(folder, targets, select_by):
    """Whatever is cut and however it is chosen; the share is met within a step of what closes the gap, the same in all layers."""
    settings = PruneSettings(targets=targets, ratio=0.35, criterion="wanda", select=select_by, shape="uniform", align=1, **QUICK)
    done = prune(folder, None, settings)
    assert type(done.model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")
    assert parameter_count(done.model) == done.plan.parameters_after
    step = 16_300 if targets == ("layers",) else 3 * 3 * 48
    assert abs(done.plan.achieved - 0.35) * done.plan.parameters_before <= step
    for kind in ("heads", "query_heads", "ffn"):
        left = {len(entry.kept) for entry in done.plan.cuts if entry.group.endswith(f".{kind}")}
        assert len(left) <= 1


@pytest.mark.slow
def test_the_uniform_knapsack_finds_the_best_of_all_choices(groups):
    """Against all choices of heads, feed-forward width, stream and depth on planted curves."""
    kinds = ("heads", "ffn", "residual", "layer")
    chosen = tuple(group for group in groups.groups if group.kind in kinds)
    small = Groups(groups.fingerprint, groups.family, 3, groups.parameters, chosen, groups.shapes)
    draw = torch.Generator().manual_seed(4)
    sizes = {"heads": (1, 2, 3), "ffn": (16, 32, 48, 64), "residual": (16, 32, 48), "layer": (0, 1)}
    curves: dict[str, Curve] = {}
    for group in chosen:
        damage = torch.rand(len(sizes[group.kind]) - 1, generator=draw).sort(descending=True).values.tolist()
        curves[group.name] = Curve(sizes[group.kind], (*damage, 0.0), tuple(map(float, sizes[group.kind])))
    scores = Scores(groups.fingerprint, "planted", {group.name: tuple(map(float, range(group.units))) for group in chosen})
    ledger = Ledger(small, [group.name for group in chosen])
    depth = sorted((f"layers.{layer}.layer" for layer in range(3)), key=lambda name: curves[name].damage_nats[0])
    every: list[tuple[float, float]] = []
    for heads, ffn, width, gone in product(sizes["heads"], sizes["ffn"], sizes["residual"], range(3)):
        there = [layer for layer in range(3) if f"layers.{layer}.layer" not in depth[:gone]]
        kept = {"residual": width} | dict.fromkeys(depth[:gone], 0)
        kept |= {f"layers.{layer}.{kind}": count for layer in range(3) for kind, count in (("heads", heads), ("ffn", ffn))}
        counted = [name for name in kept if name in depth or name == "residual" or int(name.split(".")[1]) in there]
        damage = sum(curves[name].damage_nats[curves[name].kept.index(kept[name])] for name in counted)
        every.append((ledger.left(kept), damage))
    for goal in (0.2, 0.45, 0.6):
        budget = Budget(goal, "uniform", (0, 1, 2), kinds, 16, Curves(groups.fingerprint, "parameters", 0.0, curves))
        plan = select("knapsack", small, scores, budget)
        half = 0.5 * 3 * 16 * groups.of("ffn")[0].unit_parameters
        wanted = groups.parameters * (1 - goal)
        assert abs(plan.parameters_after - wanted) <= half
        close = min(half, 0.01 * groups.parameters)
        near = [damage for left, damage in every if abs(left - wanted) <= close]
        nearest = min(every, key=lambda choice: abs(choice[0] - wanted))[1]
        found = {entry.group: len(entry.kept) for entry in plan.cuts}
        damage = sum(curves[name].damage_nats[curves[name].kept.index(count)] for name, count in found.items())
        assert damage == pytest.approx(min(near, default=nearest))


@pytest.mark.long
@pytest.mark.parametrize("targets", ["residual,ffn", "layers,heads,query_heads,ffn", "attention,mlp,ffn,residual"])
def test_the_command_prunes_by_measured_damage(folder, tmp_path, targets):
    out = tmp_path / "out"
    options = [
        "--criterion",
        "wanda",
        "--ratio",
        "0.4",
        "--samples",
        "8",
        "--seq-len",
        "16",
        "--align",
        "1",
        "--shape",
        "per-layer",
        "--calibration",
        str(text_file()),
    ]
    assert run(["prune", str(folder), "-o", str(out), "--targets", targets, *options]) == 0
    record = load(out).provenance
    assert record is not None
    assert record.plan is not None
    assert record.plan.selection == "knapsack"
    assert abs(record.plan.achieved - 0.4) * record.plan.parameters_before <= 3 * 144
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert parameter_count(loaded) == record.plan.parameters_after
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, load(out).model(IDS).logits)
    again = run(["prune", str(folder), "-o", str(tmp_path / "again"), "--plan", str(out)])
    assert again == 0
    for first, second in zip(loaded.parameters(), load(tmp_path / "again").model.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
def test_the_ledger_counts_what_is_really_left(model, groups):
    """Against the shapes of a state dict that was cut, for every pair of kinds and for all of them."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ledger = Ledger(groups, [group.name for group in groups.groups])
    some = {
        "layers.0.heads": (0, 2), "layers.0.query_heads": (1,), "layers.1.ffn": tuple(range(5, 50)), "residual": tuple(range(7, 40)),
        "layers.1.attention": (), "layers.0.mlp": (), "layers.2.layer": (), "layers.2.ffn": (3, 4), "layers.1.heads": (0,),
    }  # fmt: skip
    for names in [*product(some, repeat=2), tuple(some)]:
        cuts = tuple(Cut(name, some[name]) for name in dict.fromkeys(names))
        left = sum(tensor.numel() for tensor in cut_state(dict(model.named_parameters()), groups, cuts).values())
        assert left == parameters_after(shapes, groups, cuts)
        assert ledger.left({entry.group: len(entry.kept) for entry in cuts}) == left
    before = {"residual": 33}
    want = ledger.left(before) - ledger.left(before | {"layers.1.ffn": 45})
    assert ledger.lost("layers.1.ffn", before, 45) == want


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["block_influence", "angular", "removal"])
def test_a_layer_that_does_nothing_goes_first(criterion):
    """The planted layer writes next to nothing; so does the attention of another."""
    torch.manual_seed(0)
    model = random_model("llama")
    with torch.no_grad():
        for name in ("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj", "layers.2.self_attn.o_proj"):
            model.get_parameter(f"model.{name}.weight").mul_(1e-3)
    groups = discover(model, ("layer", "attention", "mlp"))
    values = score(criterion, Evidence(model, groups, IDS, seed=0)).values
    layers = [values[f"layers.{layer}.layer"][0] for layer in range(3)]
    assert layers[1] < 0.1 * min(layers[0], layers[2])
    assert values["layers.2.attention"][0] < 0.1 * values["layers.2.mlp"][0]
    assert values["layers.2.attention"][0] < 0.1 * values["layers.0.attention"][0]


@pytest.mark.slow
def test_angular_is_the_formula_of_its_paper():
    """Each layer has the angle of the best run of two that contains it, from states that transformers itself returns."""
    torch.manual_seed(0)
    model = random_model("llama")
    last: list[torch.Tensor] = []
    with model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0])), torch.no_grad():
        states = [*model(IDS, output_hidden_states=True).hidden_states[:-1], last[0]]  # the last that is returned is normalised
    first, second = (torch.stack(states[start:end]).double() for start, end in ((0, -2), (2, None)))
    cosines = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    run01, run12 = (torch.acos(cosines).mean(dim=(1, 2)) / torch.pi).tolist()
    assert abs(run01 - run12) > 1e-3, "the runs differ, or the test proves nothing"
    groups = discover(model, ("layer",))
    values = score("angular", Evidence(model, groups, IDS, seed=0, consecutive=2)).values
    found = [values[f"layers.{layer}.layer"][0] for layer in range(3)]
    assert found == pytest.approx([run01, min(run01, run12), run12], rel=1e-6)


def test_block_influence_is_shortgpts_formula(model, groups):
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    first, second = states[1].double(), states[2].double()
    cosine = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    layers = Groups(groups.fingerprint, groups.family, 3, groups.parameters, groups.of("layer"), groups.shapes)
    values = score("block_influence", Evidence(model, layers, IDS, seed=0)).values
    assert values["layers.1.layer"][0] == pytest.approx(float((1 - cosine).mean()), rel=1e-6)


def test_units_are_not_scored_as_layers(model, groups):
    with pytest.raises(InputError, match=r"does not score attention .*block_influence"):
        score("l1", Evidence(model, groups, None, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["wanda", "energy", "surgeon", "taylor", "l2"])
def test_a_silent_channel_of_the_stream_goes_first(criterion):
    """Channel 5 is written and read by nothing worth the name."""
    torch.manual_seed(0)
    model = random_model("llama")
    with torch.no_grad():
        for group in discover(model, ("residual",)).groups:
            for member in group.members:
                parameter = model.get_parameter(member.parameter)
                parameter.select(member.axis, 5).mul_(1e-4)
    groups = discover(model, ("residual",))
    values = score(criterion, Evidence(model, groups, IDS, seed=0)).values["residual"]
    assert min(range(48), key=lambda channel: values[channel]) == 5


def test_the_nested_knapsack_finds_the_best_of_all_choices(groups):
    """Against all choices of a small problem: two layers, sizes of the FFN, either part alone, or all of a layer."""
    chosen = tuple(group for group in groups.groups if group.kind in ("ffn", "mlp", "layer") and group.layer in (0, 1))
    small = Groups(groups.fingerprint, groups.family, 3, groups.parameters, chosen, groups.shapes)
    draw = torch.Generator().manual_seed(4)
    curves: dict[str, Curve] = {}
    for group in chosen:
        sizes = (0, 1) if group.units == 1 else (16, 32, 48, 64)
        damage = torch.rand(len(sizes) - 1, generator=draw).sort(descending=True).values.tolist()
        curves[group.name] = Curve(sizes, (*damage, 0.0), tuple(float(size * group.unit_parameters) for size in sizes))
    scores = Scores(groups.fingerprint, "planted", {group.name: tuple(map(float, range(group.units))) for group in chosen})
    ledger = Ledger(small, [group.name for group in chosen])
    options = [
        [{f"layers.{layer}.ffn": size} for size in (16, 32, 48, 64)] + [{f"layers.{layer}.mlp": 0}, {f"layers.{layer}.layer": 0}]
        for layer in (0, 1)
    ]
    dear = max(("layers.0.layer", "layers.1.layer"), key=lambda name: curves[name].damage_nats[0])
    every = [first | second for first, second in product(*options) if dear not in first | second]
    damage_of = {id(kept): sum(curves[name].damage_nats[curves[name].kept.index(count)] for name, count in kept.items()) for kept in every}
    half = 16 * 3 * 48 // 2  # an aligned step of one FFN, halved
    for wanted in every:
        goal = groups.parameters - ledger.left(wanted)
        if not goal:
            continue
        budget = Budget(
            goal / groups.parameters, "per-layer", (0, 1, 2), ("ffn", "mlp", "layer"), 16,
            Curves(groups.fingerprint, "parameters", 0.0, curves),
        )  # fmt: skip
        plan = select("knapsack", small, scores, budget)
        found = {entry.group: len(entry.kept) for entry in plan.cuts}
        near = [kept for kept in every if abs(groups.parameters - ledger.left(kept) - goal) <= half]
        damage = sum(curves[name].damage_nats[curves[name].kept.index(count)] for name, count in found.items())
        assert abs(groups.parameters - plan.parameters_after - goal) <= half
        assert damage == pytest.approx(min(damage_of[id(kept)] for kept in near))


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--targets", "layer"], "did you mean"),
        (["--targets", "attention", "--shape", "uniform"], "--shape uniform"),
        (["--targets", "residual", "--layers", "1:"], "--layers 1:"),
        (["--targets", "residual", "--memory", "3GB", "--criterion", "l1"], "--memory"),
        (["--targets", "residual,ffn", "--budget", "milliseconds"], "milliseconds"),
        (["--targets", "layers", "--ratio", "0.9"], "at most 0."),
        (["--depth", "shortgpt"], "block_influence"),
        (["--criterion", "block_influence"], "does not score"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, tmp_path, capsys, options, says):
    assert (
        run(
            [
                "prune",
                str(folder),
                "-o",
                str(tmp_path / "out"),
                "--samples",
                "4",
                "--seq-len",
                "16",
                "--calibration",
                str(text_file()),
                *options,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
