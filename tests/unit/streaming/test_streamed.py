"""Streamed pruning against pruning in memory: the same units, the same weights, the same folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from choices import assert_same_choice
from regraft.cli.app import run
from regraft.errors import InputError, ModelError, PlanError
from regraft.importance import CRITERIA
from regraft.models.load import load
from regraft.models.weights import stored_tensors
from regraft.pipelines.prune.prune import prune, replay
from regraft.plans import Cut
from regraft.settings import LoadSettings
from regraft.streaming import output as streaming_output

PLENTY = "2GB"


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_weights(got, want, tolerance=1e-5):
    got, want = tensors_of(got), tensors_of(want)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        torch.testing.assert_close(
            got[name].float(), tensor.float(), rtol=tolerance, atol=tolerance * float(tensor.float().abs().max()), msg=name
        )


def in_nats(criterion):
    return CRITERIA.get(criterion).in_nats


@pytest.mark.parametrize("criterion", [name for name in sorted(CRITERIA.names()) if in_nats(name)])
def test_a_criterion_that_runs_the_whole_model_is_refused_before_anything_is_read(settings, tmp_path, criterion):
    """There is no such folder: the refusal comes first."""
    with pytest.raises(InputError, match=f"`criterion={criterion}` runs the whole model back.*`criterion=surgeon`"):
        prune(tmp_path / "absent", tmp_path / "out", settings(criterion=criterion, memory=PLENTY))


@pytest.mark.slow
@pytest.mark.parametrize("reconstruct", ["none", "least_squares"])
@pytest.mark.parametrize(
    "criterion", [name for name in sorted(CRITERIA.names()) if "ffn" in CRITERIA.get(name).scores and not in_nats(name)]
)
def test_every_criterion_gives_the_model_that_memory_gives(make_folder, settings, tmp_path, criterion, reconstruct):
    folder = make_folder("llama", tie_word_embeddings=True)
    plain = prune(folder, tmp_path / "plain", settings(criterion=criterion, reconstruct=reconstruct))
    streamed = prune(folder, tmp_path / "streamed", settings(criterion=criterion, reconstruct=reconstruct, memory=PLENTY))
    assert_same_choice(streamed.plan, plain.plan)
    assert streamed.model is None
    assert_same_weights(tmp_path / "streamed", tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["second", "mixed"])
@pytest.mark.parametrize("granularity", ["element", "vector"])
def test_every_order_of_taylor(make_folder, settings, tmp_path, order, granularity):
    folder = make_folder("llama-bias")
    asked = {"order": order, "granularity": granularity, "shape": "uniform", "select": "auto", "reconstruct": "none"}
    plain = prune(folder, tmp_path / "plain", settings(**asked | {"select": "uniform"}))
    streamed = prune(folder, tmp_path / "streamed", settings(**asked, memory=PLENTY))
    assert streamed.plan.selection == "uniform"
    assert streamed.plan.cuts == plain.plan.cuts
    assert_same_weights(tmp_path / "streamed", tmp_path / "plain", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("reconstruct", ["least_squares", "mean"])
def test_every_family(make_folder, settings, tmp_path, family, reconstruct):
    folder = make_folder(family)
    plain = prune(folder, tmp_path / "plain", settings(criterion="flap", reconstruct=reconstruct))
    streamed = prune(folder, tmp_path / "streamed", settings(criterion="flap", reconstruct=reconstruct, memory=PLENTY))
    assert_same_choice(streamed.plan, plain.plan)
    assert_same_weights(tmp_path / "streamed", tmp_path / "plain")


DEPTH = {"depth": "block_influence", "align": 1}


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("targets", [("layers",), ("attention", "mlp"), ("layers", "attention", "heads", "query_heads", "ffn")])
def test_layers_and_parts_of_layers(make_folder, settings, tmp_path, monkeypatch, family, targets):
    """Left out or silent on the way up, as in the model that they were cut from; in many shards, with the layers renumbered."""
    monkeypatch.setattr(streaming_output, "SHARD_BYTES", 25_000)
    folder = make_folder(family)
    targets = tuple(target for target in targets if family != "gpt2" or target != "query_heads")
    asked = settings(targets=targets, ratio=0.35 if len(targets) < 3 else 0.65, **DEPTH)
    plain = prune(folder, tmp_path / "plain", asked)
    streamed = prune(folder, tmp_path / "streamed", asked.model_copy(update={"memory": 2_000_000_000}))
    assert_same_choice(streamed.plan, plain.plan)
    assert any(entry.group.endswith((".layer", ".attention", ".mlp")) for entry in plain.plan.cuts)
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    assert_same_weights(tmp_path / "streamed", tmp_path / "plain", 1e-4)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "streamed").model(ids).logits, plain.model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_folder_is_the_one_that_memory_gives(make_folder, settings, tmp_path):
    for shape, select in (("uniform", "uniform"), ("per-layer", "global")):
        folder = make_folder("llama")
        asked = settings(shape=shape, select=select)
        prune(folder, tmp_path / f"plain-{shape}", asked, command="same")
        prune(folder, tmp_path / f"streamed-{shape}", asked.model_copy(update={"memory": 2_000_000_000}), command="same")
        plain, streamed = ({path.name: path for path in (tmp_path / f"{kind}-{shape}").iterdir()} for kind in ("plain", "streamed"))
        assert plain.keys() == streamed.keys()
        different = {name for name, path in plain.items() if path.read_bytes() != streamed[name].read_bytes()}
        assert different <= {"model.safetensors", "regraft.json"}, "tensors are in another order, with another checksum"
        record, other = (json.loads(path["regraft.json"].read_text()) for path in (plain, streamed))
        assert record.keys() == other.keys()
        for found in (record, other):
            del found["plan"]["removed"]  # differs by rounding
        assert {key for key in record if record[key] != other[key]} <= {"files"}


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_a_result_in_many_shards_loads_in_transformers(make_folder, settings, tmp_path, monkeypatch, shape):
    monkeypatch.setattr(streaming_output, "SHARD_BYTES", 25_000)
    folder = make_folder("qwen2", torch.bfloat16)
    made = prune(folder, tmp_path / "streamed", settings(shape=shape, select="auto", memory=PLENTY))
    assert len(list((tmp_path / "streamed").glob("model-*-of-*.safetensors"))) > 3
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == made.plan.parameters_after
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": made.plan.parameters_after, "total_size": 2 * made.plan.parameters_after}
    load(tmp_path / "streamed")  # every checksum is right


@pytest.mark.slow
def test_half_precision_is_scored_in_single_and_written_as_it_was(make_folder, settings, tmp_path):
    folder = make_folder("llama", torch.bfloat16)
    streamed = prune(folder, tmp_path / "streamed", settings(reconstruct="none", memory=PLENTY))
    exact = prune(folder, None, settings(reconstruct="none"), load=LoadSettings(dtype="float32"))
    assert streamed.plan.cuts == exact.plan.cuts
    assert streamed.plan.fingerprint == load(folder).fingerprint
    replayed = replay(folder, streamed.plan, tmp_path / "replayed")
    assert replayed.plan == streamed.plan
    assert_same_weights(tmp_path / "streamed", tmp_path / "replayed", 0.0)
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "streamed").values()} == {"BF16"}


@pytest.mark.slow
def test_re_fitted_half_precision_is_near_the_exact_fit(make_folder, settings, tmp_path):
    folder = make_folder("llama", torch.bfloat16)
    made = prune(folder, tmp_path / "streamed", settings(memory=PLENTY))
    exact = prune(folder, tmp_path / "exact", settings(memory=PLENTY), load=LoadSettings(dtype="float32"))
    assert made.plan.cuts == exact.plan.cuts
    coarse, fine = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "exact")
    for name, tensor in fine.items():
        error = (coarse[name].float() - tensor).norm() / tensor.norm()
        assert error < (0.02 if ".down_proj." in name or ".o_proj." in name else 1e-9), name


@pytest.mark.slow
def test_little_memory_gives_the_same_model(make_folder, settings, tmp_path, monkeypatch):
    """With less than it likes to have, states are on disk, windows come one by one and the head in blocks."""
    folder = make_folder("llama")
    rich = prune(folder, tmp_path / "rich", settings(memory=PLENTY))
    poor = prune(folder, tmp_path / "poor", settings(memory="5MB"))
    assert any("kept on disk" in note for note in poor.notes)
    assert any("the program itself takes" in note for note in poor.notes)
    assert not any("kept on disk" in note or "program itself" in note for note in rich.notes)
    assert_same_choice(poor.plan, rich.plan)
    assert_same_weights(tmp_path / "poor", tmp_path / "rich")
    assert sorted(path.name for path in (tmp_path / "poor").iterdir()) == sorted(path.name for path in (tmp_path / "rich").iterdir())


@pytest.mark.slow
def test_a_pruned_model_is_pruned_again(make_folder, settings, tmp_path):
    folder = make_folder("qwen3")
    prune(folder, tmp_path / "once", settings(memory=PLENTY))
    plain = prune(tmp_path / "once", tmp_path / "plain", settings())
    streamed = prune(tmp_path / "once", tmp_path / "streamed", settings(memory=PLENTY))
    assert_same_choice(streamed.plan, plain.plan)
    assert_same_weights(tmp_path / "streamed", tmp_path / "plain")
    assert len(json.loads((tmp_path / "streamed" / "regraft.json").read_text())["parents"]) == 1


@pytest.mark.slow
def test_a_dry_run_plans_and_writes_nothing(make_folder, settings, tmp_path):
    folder = make_folder("llama")
    before = sorted(tmp_path.iterdir())
    dry = prune(folder, tmp_path / "out", settings(memory=PLENTY), dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    assert_same_choice(dry.plan, prune(folder, None, settings(), dry_run=True).plan)


@pytest.mark.slow
def test_knapsack_gives_way_and_it_is_said(make_folder, settings):
    made = prune(make_folder("llama"), None, settings(select="auto", memory=PLENTY), dry_run=True)
    assert made.plan.selection == "uniform"
    assert any(note.startswith("selection: uniform; the knapsack") for note in made.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": "100KB"}, r"`memory=100KB` is below what one layer needs, \d+(K|M)B: .* use `memory=\d+(MB|\.\d+GB)` or more"),
        (
            {"memory": PLENTY, "select": "knapsack"},
            "`select=knapsack` needs measurements of the whole model.*use `select=global` or `select=uniform`",
        ),
        ({"memory": PLENTY, "budget": "bytes", "select": "auto"}, "`budget=bytes` needs measurements of the whole model"),
        ({"memory": PLENTY, "rounds": 2}, "`rounds=2` prunes the pruned model again.*use `rounds=1`"),
        ({"memory": PLENTY, "targets": ("layers",), "depth": "removal"}, "`depth=removal` looks at several .* use `depth=block_influence`"),
        ({"memory": PLENTY, "targets": ("residual",)}, "`targets=residual` changes more than one layer at a time"),
        ({"memory": PLENTY, "seq_len": 65}, "`seq_len=65` exceeds the model's context of 64 tokens; use at most 64"),
        ({"memory": PLENTY, "ratio": 0.99}, "ratio 0.99 would leave a layer empty"),
        ({"memory": PLENTY, "seq_len": 1, "criterion": "taylor"}, "at least 2"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(make_folder, settings, tmp_path, changes, words):
    folder = make_folder("llama")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=words):
        prune(folder, tmp_path / "out", settings(**changes))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_damage_that_shows_while_it_is_written_leaves_nothing(make_folder, settings, tmp_path):
    """A row of the embedding that the calibration text does not use is read last."""
    folder = make_folder("llama", shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][96] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight' holds NaN"):
        prune(folder, tmp_path / "out", settings(memory=PLENTY))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_generation_config_that_cannot_be_read_is_done_without(make_folder, settings, tmp_path):
    """As transformers does: the model in memory is pruned as well."""
    folder = make_folder("llama")
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    for memory, name in ((PLENTY, "streamed"), (None, "whole")):
        prune(folder, tmp_path / name, settings(memory=memory))
    assert_same_weights(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.slow
def test_the_command_says_how_much_memory_is_needed_and_takes_that(make_folder, text, tmp_path, capsys):
    usual = ["prune", str(make_folder("llama")), "--output", str(tmp_path / "out"), "--criterion", "taylor", "--calibration", str(text)]
    usual += ["--samples", "4", "--seq-len", "16"]
    capsys.readouterr()
    assert run([*usual, "--memory", "10KB"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "--memory 10KB is below what one layer needs" in lines[0]
    assert not list(tmp_path.glob("*out*"))
    assert run([*usual, "--memory", lines[0].partition("use --memory ")[2].partition(" ")[0]]) == 0


def test_an_output_is_needed(make_folder, settings):
    with pytest.raises(InputError, match="say where with `output`"):
        prune(make_folder("llama"), None, settings(memory=PLENTY))


@pytest.mark.slow
@pytest.mark.parametrize("memory", [PLENTY, None])
def test_an_output_may_be_a_string(make_folder, settings, tmp_path, memory):
    folder = make_folder("llama")
    made = prune(str(folder), str(tmp_path / "out"), settings(memory=memory))
    replay(str(folder), made.plan, str(tmp_path / "again"), settings(memory=memory))
    assert_same_weights(tmp_path / "again", tmp_path / "out", 0.0)


@pytest.mark.slow
def test_a_plan_for_another_model_is_refused(make_folder, settings, tmp_path):
    folder, other = make_folder("llama"), make_folder("llama", tie_word_embeddings=True)
    plan = prune(folder, None, settings(), dry_run=True).plan
    with pytest.raises(PlanError, match=f"the plan is for model {plan.fingerprint}, this is model"):
        replay(other, plan, tmp_path / "out", settings(memory=PLENTY))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_bound_that_is_named_is_enough(make_folder, settings, tmp_path):
    """The remedy of the refusal has to work."""
    folder = make_folder("llama")
    with pytest.raises(InputError) as refused:
        prune(folder, tmp_path / "out", settings(memory="100KB"))
    named = str(refused.value).partition("use `memory=")[2].partition("`")[0]
    made = prune(folder, tmp_path / "out", settings(memory=named))
    assert not any("program itself" in note for note in made.notes)
    assert isinstance(made.plan.cuts[0], Cut)
