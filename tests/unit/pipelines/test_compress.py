"""``compress`` as a pipeline: budgets, plans that move, searches that go on, texts that may not be used, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from regraft.cli.app import run
from regraft.compression import COMPRESSORS
from regraft.data.text import read_corpus
from regraft.errors import ConfigError, DataError, InputError, MissingDependencyError, ModelError, PlanError, StorageError
from regraft.models.provenance import read_provenance
from regraft.models.view import ModelView, fingerprint, parameter_count
from regraft.numerics.truncation import Truncation, truncation
from regraft.pipelines.compress import CompressResult, compress
from regraft.pipelines.compress.search import Elsewhere, Objective, read_terms, write_terms
from regraft.plans import FactorPlan, FactorSite, FactorSpace, RankPlan, RankSlot, RankSpace, from_json, to_json
from regraft.settings import CompressSettings, LoadSettings
from regraft.surgery.trial_ranks import TrialModel
from regraft.training.distill import Teacher
from regraft.training.recover import recover

Compress = Callable[..., CompressResult]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Three texts of letters, none of which holds a document of another."""
    generator = torch.Generator().manual_seed(4)
    found: dict[str, Path] = {}
    for name in ("calibration", "validation", "test"):
        letters = torch.randint(97, 123, (12, 300), generator=generator).tolist()
        found[name] = tmp_path / f"{name}.txt"
        found[name].write_text("\n<|endoftext|>\n".join("".join(map(chr, row)) for row in letters), encoding="utf-8")
    return found


@pytest.fixture
def folder(tmp_path: Path, make_tiny, tokenizer) -> Path:
    make_tiny().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def quickly(make_tiny, tokenizer, texts: dict[str, Path]) -> Compress:
    """Returns ``quickly(**settings)``: compresses the tiny model in memory."""

    def call(model: PreTrainedModel | None = None, *, output: Path | None = None, seed: int = 0, **rest: Any) -> CompressResult:
        given = {key: rest.pop(key) for key in ("plan", "dry_run", "resume") if key in rest}
        settings = CompressSettings(**({"calibration": texts["calibration"], "samples": 24, "seq_len": 24} | rest))
        return compress(model or make_tiny(), output, settings, tokenizer=tokenizer, seed=seed, **given)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm", "bolaco", "fisher"])
@pytest.mark.parametrize("layout", ["plain", "pifa"])
def test_every_method_meets_the_budget(quickly: Compress, make_tiny, method: str, layout: str) -> None:
    dense = make_tiny()
    result = quickly(dense, method=method, layout=layout, ratio=0.25)
    assert result.model is not None
    before, after = parameter_count(dense), parameter_count(result.model)
    assert (before, after) == (result.plan.parameters_before, result.plan.parameters_after)
    assert before - after >= 0.25 * before
    assert result.plan.achieved < 0.3
    assert (result.plan.predicted_nats is not None) == (method == "fisher")


@pytest.mark.slow
def test_the_same_seed_makes_the_same_bytes(quickly: Compress, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quickly(output=tmp_path / name)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_plan_is_replayed_and_moves_to_a_model_of_the_same_shape(quickly: Compress, make_tiny) -> None:
    first = quickly()
    plan = from_json(FactorPlan, to_json(first.plan))
    again = quickly(plan=plan)
    assert first.model is not None
    assert again.model is not None
    for (name, one), (_, other) in zip(first.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    sibling = make_tiny()
    with torch.no_grad():
        for parameter in sibling.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    moved = quickly(sibling, plan=plan)
    assert moved.plan.ranks() == plan.ranks()
    assert moved.plan.fingerprint != plan.fingerprint
    with pytest.raises(PlanError, match="make one for this model"):
        quickly(make_tiny(intermediate_size=56), plan=plan)


@pytest.mark.slow
def test_measured_prices_are_divergences(quickly: Compress, make_tiny) -> None:
    """The summed prices of a plan that truncates a single layer are the divergence of that model, up to the text it is measured on."""
    result = quickly(prices="measured", targets=("down_proj",), ratio=0.05)
    assert "measured prices" in result.plan.choice
    assert result.plan.predicted_nats is not None
    assert result.model is not None
    ids = torch.randint(3, 60, (16, 24))
    with torch.no_grad():
        old, new = (model(ids).logits.log_softmax(-1) for model in (make_tiny(), result.model))
    divergence = float((old.exp() * (old - new)).sum(-1).mean())
    assert 0.2 < result.plan.predicted_nats / divergence < 5.0


@pytest.mark.long
def test_a_search_keeps_the_budget_and_goes_on(quickly: Compress, texts: dict[str, Path], tmp_path: Path) -> None:
    few: dict[str, Any] = {"ranks": "bayes", "trials": 4, "method": "bolaco", "validation": texts["validation"], "output": tmp_path / "out"}
    with pytest.raises(InputError, match="cannot be met"):
        quickly(**few | {"ratio": 0.9, "output": None})
    first = quickly(**few)
    assert first.plan.choice == "bayes"
    assert first.plan.parameters_before - first.plan.parameters_after >= 0.2 * first.plan.parameters_before
    assert not any(entry.module.endswith("v_proj") for entry in first.plan.factorings)
    assert (tmp_path / "out.search" / "search.db").is_file()
    with pytest.raises(StorageError, match="`resume`"):
        quickly(**few | {"dry_run": True})
    again = quickly(**few | {"dry_run": True, "resume": True})
    assert again.plan == first.plan


@pytest.mark.long
def test_other_processes_find_the_same_ranks(folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """Two processes load the model and what was decomposed, and give what one process gives; their file goes, the trials stay."""
    given: dict[str, Any] = {"ranks": "bayes", "trials": 4, "method": "bolaco", "samples": 24, "seq_len": 24, "dry_run": True}
    given |= {"calibration": texts["calibration"], "validation": texts["validation"]}
    alone = compress(folder, work=tmp_path / "alone", **given)
    both = compress(folder, work=tmp_path / "both", workers=2, **given)
    assert both.plan == alone.plan
    assert (tmp_path / "both" / "search.db").is_file()
    assert not list(tmp_path.rglob("*.safetensors.*"))
    assert not (tmp_path / "both" / "decompositions.safetensors").exists()


@pytest.mark.slow
def test_an_objective_that_is_opened_elsewhere_measures_the_same(folder: Path, make_tiny, tmp_path: Path) -> None:
    """What is written for other processes, biases included, gives the same number to the bit; a damaged file is one line."""
    model = make_tiny()
    generator = torch.Generator().manual_seed(2)
    truncations: dict[str, Truncation] = {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj"
        weight_OI = model.get_submodule(name).get_parameter("weight").detach()
        mean_I = torch.rand(weight_OI.shape[1], dtype=torch.float64, generator=generator) if layer else None
        truncations[name] = truncation(weight_OI, None, None, mean_I=mean_I)
    windows_NT = torch.randint(3, 60, (3, 16), generator=generator)
    file = tmp_path / "terms.safetensors"
    write_terms(file, truncations, windows_NT)
    again, text_NT = read_terms(file)
    assert torch.equal(text_NT, windows_NT)
    sites = tuple(
        FactorSite(name, 0, "down_proj", one.left_OK.shape[0], one.right_KI.shape[1], 0, (8, one.full_rank), (0.1, 0.0))
        for name, one in truncations.items()
    )
    space = FactorSpace("0" * 16, "svd", "nats", "plain", 1000, 10**6, sites)
    slots = RankSpace("0" * 16, "module", (RankSlot("down_proj", tuple(truncations), 0, 100, 100),), (20, 100), 100, 20)
    here = Objective.over(TrialModel(model, truncations), space, slots, windows_NT, 0.1)
    there = Elsewhere(str(folder), LoadSettings(), file, to_json(space), to_json(slots), 0.1).open()
    assert {name: set(one.__dict__) for name, one in again.items()} == {name: set(one.__dict__) for name, one in truncations.items()}
    for percent in (20, 100):
        assert there.of((percent,)) == here.of((percent,))
    assert here.of((20,)) != here.of((100,))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read"):
        read_terms(file)


def test_who_measures_is_asked_before_anything_is_computed(quickly: Compress, folder: Path) -> None:
    with pytest.raises(InputError, match="`ranks=auto` makes none; use `ranks=bayes`"):
        quickly(workers=2)
    with pytest.raises(InputError, match="give a folder or a hub id"):
        quickly(ranks="bayes", workers=2)
    with pytest.raises((InputError, MissingDependencyError), match=r"no Ray cluster is at 'nowhere'|pip install"):
        compress(folder, ranks="bayes", ray="nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.15, 0.35])
def test_channels_and_ranks_in_one_knapsack(quickly: Compress, make_tiny, tmp_path: Path, ratio: float) -> None:
    """The budget holds for both together, no group loses both, and the folder knows of both."""
    dense = make_tiny()
    result = quickly(dense, mix=True, ratio=ratio, output=tmp_path / "out")
    assert result.model is not None
    assert parameter_count(dense) - parameter_count(result.model) >= ratio * parameter_count(dense)
    assert parameter_count(dense) - parameter_count(result.model) < (ratio + 0.06) * parameter_count(dense)
    cut = {entry.group for entry in result.pruned.cuts} if result.pruned is not None else set()
    assert cut or result.plan.factorings
    for group in cut:
        _, layer, kind = group.split(".")
        part = f"model.layers.{layer}.{'mlp' if kind == 'ffn' else 'self_attn'}."
        assert not any(entry.module.startswith(part) for entry in result.plan.factorings)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, result.model(ids).logits)
    record = read_provenance(tmp_path / "out")
    assert record is not None
    assert record.plan == result.pruned
    with pytest.raises(InputError, match="mix is a knapsack"):
        quickly(mix=True, ranks="uniform")
    with pytest.raises(InputError, match="a plan brings ranks"):
        quickly(mix=True, plan=result.plan)


@pytest.mark.slow
def test_pc_lora_takes_a_rank_plan_and_a_call_takes_keywords(make_tiny, tokenizer, texts: dict[str, Path]) -> None:
    one, other = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    ranks = RankPlan("of a search", "rankadaptor", {other: 3, one: 5})
    fast: dict[str, Any] = {"calibration": str(texts["calibration"]), "samples": 8, "max_length": 24, "fade_steps": 2, "fade_batch": 2}
    result = compress(make_tiny(), tokenizer=tokenizer, method="pc_lora", plan=ranks, **fast)
    assert result.plan.ranks() == {one: 5, other: 3}
    assert result.model is not None
    assert parameter_count(result.model) == result.plan.parameters_after
    with pytest.raises(InputError, match="a rank plan is for method pc_lora, not for svd"):
        compress(make_tiny(), tokenizer=tokenizer, method="svd", plan=ranks, **fast)
    with pytest.raises(ConfigError, match="rtio: unknown keyword; did you mean 'ratio'"):
        compress(make_tiny(), tokenizer=tokenizer, rtio=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("warm_start", ["bolaco", "random"])
def test_pc_lora_ends_without_the_dense_weights(quickly: Compress, make_tiny, tmp_path: Path, warm_start: str) -> None:
    dense = make_tiny()
    result = quickly(dense, method="pc_lora", warm_start=warm_start, fade_steps=6, fade_batch=2, ratio=0.3, output=tmp_path / "out")
    assert result.model is not None
    assert result.plan.method == "pc_lora"
    assert parameter_count(dense) - parameter_count(result.model) >= 0.3 * parameter_count(dense)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for entry in result.plan.factorings:
        assert stored[f"{entry.module}.weight"].numel() == 0
        assert (
            sum(value.numel() for name, value in stored.items() if name.startswith(entry.module))
            < dense.get_parameter(f"{entry.module}.weight").numel()
        )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, result.model(ids).logits)


@pytest.mark.long
@pytest.mark.parametrize("adapter", ["lora", "diagonal"])
def test_recovery_trains_the_factors_and_folds_into_them(
    quickly: Compress, make_tiny, tokenizer, repeating, quick, tmp_path: Path, adapter: str
) -> None:
    """Adapters on both thin layers, distilled from the dense model; afterwards there are the same factors with other values."""
    dense = make_tiny()
    model = quickly(dense, method="svd_llm", ratio=0.3).model
    assert model is not None
    before, ranks = parameter_count(model), {name: module.rank for name, module in ModelView(model).factored().items()}
    first = next(iter(ModelView(model).factored().values()))
    old = first.dense_weight().clone()
    settings = quick(adapter=adapter, teacher="dense")
    teacher = Teacher(dense, "dense", tokenizer, fingerprint(dense))
    recovered = recover(model, tokenizer, *repeating, settings, seed=0, work=tmp_path / "work", teacher=teacher)
    assert isinstance(recovered.model, PreTrainedModel)
    assert {name: module.rank for name, module in ModelView(recovered.model).factored().items()} == ranks
    assert parameter_count(recovered.model) == before
    assert not torch.equal(next(iter(ModelView(recovered.model).factored().values())).dense_weight(), old)
    assert recovered.best_loss < recovered.first_loss


@pytest.mark.slow
def test_dense_writes_the_stock_class(quickly: Compress, tmp_path: Path) -> None:
    factored, dense = quickly(method="svd_llm"), quickly(method="svd_llm", dense=True, output=tmp_path / "out")
    assert type(dense.model) is LlamaForCausalLM
    ids = torch.randint(3, 60, (2, 12))
    assert factored.model is not None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, factored.model(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calibration", "validation"])
def test_nothing_is_chosen_by_the_test_text(quickly: Compress, texts: dict[str, Path], tmp_path: Path, name: str) -> None:
    texts["test"].write_text(texts[name].read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match=f"the {name} text .* holds documents of the test text"):
        quickly(ranks="bayes", validation=texts["validation"], test=texts["test"])
    built_in = tmp_path / "held_out.txt"
    built_in.write_text(read_corpus(None, "test").documents[0], encoding="utf-8")
    with pytest.raises(InputError, match="holds documents of the test text"):
        quickly(**{"ranks": "bayes", "validation": texts["validation"], name: built_in})


@pytest.mark.slow
def test_the_test_text_is_measured_before_and_after(quickly: Compress, texts: dict[str, Path]) -> None:
    result = quickly(test=texts["test"], ratio=0.4)
    assert result.test is not None
    assert result.test[1].loss_nats != result.test[0].loss_nats
    assert result.as_dict()["test"]["after"]["loss_nats"] == result.test[1].loss_nats


@pytest.mark.slow
def test_bad_input_is_one_line(quickly: Compress, make_tiny, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown compression method 'fischer'.*did you mean 'fisher'"):
        quickly(method="fischer")
    with pytest.raises(InputError, match=r"ratio 0.95 cannot be met by any rank.*at most 0\.\d+"):
        quickly(ratio=0.95)
    with pytest.raises(InputError, match="target 'up' matches nothing"):
        quickly(targets=("up",))
    with pytest.raises(InputError, match=r"calibration tokens cannot tell \d+ directions"):
        quickly(samples=1, seq_len=4)
    broken = make_tiny()
    with torch.no_grad():
        broken.get_parameter("model.layers.1.input_layernorm.weight").fill_(torch.inf)
    with pytest.raises(ModelError, match=r"'model.layers.1.input_layernorm.weight' holds NaN or infinity in 32 of 32 values"):
        quickly(broken)
    done = compress(folder, tmp_path / "out", CompressSettings(method="svd"))
    assert done.model is not None
    with pytest.raises(ModelError, match="is factored already"):
        compress(tmp_path / "out", None, CompressSettings(method="svd"))
    plan = done.plan
    high = FactorPlan(**(plan.__dict__ | {"factorings": (plan.factorings[0].__class__(plan.factorings[0].module, 99, False),)}))
    with pytest.raises(PlanError, match=r"rank 99 of 'model.*' \(\d+ x \d+\) is not from 1 to"):
        compress(folder, None, CompressSettings(), plan=high)


@pytest.mark.slow
def test_no_text_is_read_in_silence(folder: Path, make_tiny, tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what reads no text goes without; seedling itself has text of its own (tests/conformance/test_one_route.py)."""
    for source in (folder, make_tiny()):
        for given in ({"method": "svd_llm"}, {"method": "svd", "prices": "measured"}, {"method": "svd", "ranks": "bayes"}):
            with pytest.raises(DataError, match="`calibration` is missing: only seedling has text of its own"):
                compress(source, None, CompressSettings(**given), tokenizer=tokenizer)
        assert compress(source, None, CompressSettings(method="svd"), tokenizer=tokenizer).model is not None
    assert run(["compress", str(folder), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "--calibration is missing" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_command(folder: Path, texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["compress", str(folder), "--calibration", str(texts["calibration"]), "--samples", "24", "--seq-len", "24"]
    assert run([*common, "--ratio", "0.3", "-o", str(tmp_path / "out"), "--json", str(tmp_path / "plan.json")]) == 0
    assert "removed (asked for: 30.00%)" in capsys.readouterr().out
    record = read_provenance(tmp_path / "out")
    assert record is not None
    assert record.factors is not None
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["parameters_after"] == record.factors.parameters_after
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "a smaller file; faster only where measured" in card
    assert run([*common, "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "again")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert {name: module.rank for name, module in ModelView(again).factored().items()} == record.factors.ranks()
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "out")]) == 0
    assert run([*common, "-o", str(tmp_path / "out")]) == 2
    assert run(common) == 2
    assert "--output is missing" in capsys.readouterr().err
    assert run([*common, "--method", "magic", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(name in error for name in COMPRESSORS)
