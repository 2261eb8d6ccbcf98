"""Factored models: what they compute, what they store, and that a saved folder is the model in memory, with and without regraft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import fresh
from regraft.compression import COMPRESSORS, RANK_CHOICES, decompose, factor_plan, factor_space, gather
from regraft.errors import ModelError, PlanError
from regraft.export import EXPORTERS, ModelFormat
from regraft.groups.discover import discover
from regraft.models.live import held
from regraft.models.save import save
from regraft.models.view import ModelView, fingerprint, parameter_count, refuse_factored
from regraft.pipelines.export_model import export_loaded
from regraft.plans import Cut, FactorLayout, FactorPlan, Provenance, PrunePlan
from regraft.settings import ExportSettings
from regraft.surgery.cut import cut
from regraft.surgery.factorize import densified, factorize

WINDOWS = torch.randint(3, 97, (36, 12), generator=torch.Generator().manual_seed(5))
IDS = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(6))


def compressed(
    model: PreTrainedModel, method: str = "fisher", layout: FactorLayout = "plain", ratio: float = 0.2
) -> tuple[PreTrainedModel, FactorPlan, dict[str, Tensor]]:
    """Returns the model, its plan, and the dense matrix that each factored layer stands for, multiplied here."""
    view = ModelView(model)
    names = [
        f"{view.layer_name(layer)}.{name}"
        for layer in range(len(view.layers))
        for name in view.linear_names()
        if view.module(layer, name) is not None
    ]
    modules = {name: model.get_submodule(name) for name in names}
    compressor = COMPRESSORS.get(method)
    evidence = gather(model, modules, WINDOWS, compressor.looks_at, transposed=view.family.transposed)
    biased = {name for name, module in modules.items() if getattr(module, "bias", None) is not None}

    def layer_of(name: str) -> int:
        return int(name.removeprefix(f"{view.family.layers}.").split(".")[0])

    found = decompose(evidence, compressor, layout, layer_of, biased.__contains__)
    space = factor_space(
        [one.priced for one in found],
        fingerprint=fingerprint(model),
        method=method,
        unit="nats",
        layout=layout,
        parameters=parameter_count(model),
        ratio=ratio,
    )
    ranks = RANK_CHOICES.get("closed")(space)
    biases = {one.priced.name: one.has_bias or compressor.adds_bias for one in found}
    plan = factor_plan(space, ranks, "closed", ratio, biases)
    factors = {one.priced.name: one.truncation.at(plan.ranks()[one.priced.name]) for one in found if one.priced.name in plan.ranks()}
    products = {name: own.left_OR @ own.right_RI for name, own in factors.items()}
    return factorize(model, plan, factors), plan, products


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def record() -> Provenance:
    return Provenance("test", "test", "test", 0, {})


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model with another feed-forward width in its first layer."""
    groups = discover(ModelView(model))
    cuts = (Cut("layers.0.ffn", tuple(range(40))),)
    return cut(model, groups, PrunePlan(groups.fingerprint, "t", "t", "per-layer", 0.1, 1, groups.parameters, groups.parameters, cuts))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "pifa"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "gpt2", "gpt_neox", "phi3", "bloom", "opt"])
def test_it_computes_what_the_products_do(make_model, family: str, layout: FactorLayout) -> None:
    """Beside a copy of the dense model whose weights and biases are overwritten by hand."""
    dense = make_model(family)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    model, plan, products = compressed(dense, "svd_llm", layout)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    view = ModelView(model)
    assert set(view.factored()) == set(products)
    with torch.no_grad():
        for name, product in products.items():
            dense.get_parameter(f"{name}.weight").copy_(product.T if view.family.transposed else product)
            torch.testing.assert_close(view.factored()[name].dense_weight(), product, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-4)
    assert parameter_count(model) == plan.parameters_after
    assert plan.parameters_before - plan.parameters_after >= 0.2 * plan.parameters_before


@pytest.mark.slow
def test_a_bias_is_added_to_the_layers_own(make_model) -> None:
    for family in ("llama", "llama-bias"):
        dense = make_model(family)
        model, plan, _ = compressed(dense, "bolaco")
        name, layer = next(iter(ModelView(model).factored().items()))
        rows: list[Tensor] = []
        outputs: list[Tensor] = []

        def keep(_module: Any, inputs: Any, output: Tensor, rows=rows, outputs=outputs) -> None:
            rows.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
            outputs.append(output.reshape(-1, output.shape[-1]))

        handle = dense.get_submodule(name).register_forward_hook(keep)
        logits(dense, WINDOWS)
        handle.remove()
        with torch.no_grad():
            after = layer(torch.cat(rows)).mean(dim=0)
        torch.testing.assert_close(after, torch.cat(outputs).mean(dim=0), rtol=1e-3, atol=1e-4)
        assert parameter_count(model) == plan.parameters_after
        assert all(entry.bias for entry in plan.factorings)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "pifa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_folder_is_the_model(make_model, tmp_path: Path, family: str, layout: FactorLayout) -> None:
    dense = make_model(family)
    model, plan, _ = compressed(dense, layout=layout)
    save(model, None, tmp_path / "out", record(), "card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert again.config.factor_layout == layout
    assert parameter_count(again) == plan.parameters_after
    bare = AutoModel.from_pretrained(tmp_path / "out")
    assert len(ModelView(again).factored()) == sum("reduce" in name for name, _ in bare.named_parameters())
    numbers = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values() if tensor.is_floating_point())
    assert numbers == plan.parameters_after
    save(again, None, tmp_path / "twice", record(), "card")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), logits(model))


@pytest.mark.slow
def test_a_model_that_was_pruned_before(make_model, tmp_path: Path) -> None:
    model, plan, _ = compressed(uneven(make_model("llama")))
    assert parameter_count(model) == plan.parameters_after
    save(model, None, tmp_path / "out", record(), "card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert ModelView(again).sizes(0).ffn == 40


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "pifa"])
def test_it_loads_without_regraft(make_model, tmp_path: Path, layout: FactorLayout) -> None:
    model, _, _ = compressed(make_model("llama"), layout=layout)
    save(model, None, tmp_path / "out", record(), "card")
    assert (tmp_path / "out" / "factored_regraft.py").is_file()
    script = (
        "import sys, torch, json\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "assert 'regraft' not in sys.modules\n"
        f"print(json.dumps(model(input_ids=torch.tensor({IDS.tolist()})).logits.tolist()))\n"
    )
    run = fresh.run(["-c", script], env={"PATH": ""})
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout.splitlines()[-1])), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_class_that_does_not_know_it_fails_loudly(make_model, tmp_path: Path) -> None:
    model, _, _ = compressed(make_model("llama"))
    save(model, None, tmp_path / "out", record(), "card")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatch"):
        LlamaForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "pifa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_again_is_the_stock_class(make_model, tmp_path: Path, layout: FactorLayout, dtype: torch.dtype) -> None:
    model, _, _ = compressed(make_model("llama").to(dtype), layout=layout)
    dense = densified(model)
    assert type(dense) is LlamaForCausalLM
    loose = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(logits(dense), logits(model), **loose)
    save(dense, None, tmp_path / "out", record(), "card")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out")), logits(dense))


@pytest.mark.slow
def test_dense_with_a_bias_that_the_family_has_no_place_for(make_model) -> None:
    model, _, _ = compressed(make_model("mistral"))
    with pytest.raises(ModelError, match="has a bias that keeps the mean"):
        densified(model)
    plain, _, _ = compressed(make_model("mistral"), "svd_llm")
    torch.testing.assert_close(logits(densified(plain)), logits(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("layout", ["plain", "pifa"])
def test_peft_attaches_to_the_factors_and_folds_in_exactly(make_model, layout: FactorLayout) -> None:
    model, _, _ = compressed(make_model("llama"), layout=layout)
    before, stored = logits(model), parameter_count(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["reduce", "expand"], init_lora_weights=False))
    changed = logits(adapted)
    assert float((changed - before).abs().max()) > 1e-3
    merged: Any = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), changed, rtol=1e-4, atol=1e-5)
    assert parameter_count(merged) == stored
    assert len(ModelView(merged).factored()) > 0


@pytest.mark.slow
def test_generation_runs_with_a_cache(make_model) -> None:
    model, _, _ = compressed(make_model("llama"))
    tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
    step = IDS
    for _ in range(5):
        step = torch.cat([step, logits(model, step)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, step)


@pytest.mark.slow
def test_what_is_factored_is_refused_a_second_time(make_model) -> None:
    model, _, _ = compressed(make_model("llama"))
    with pytest.raises(ModelError, match=r"'here' is factored already \(\d+ layers, such as 'model"):
        refuse_factored(model, "'here'")
    with pytest.raises(ModelError, match="is factored already"):
        discover(ModelView(model))
    refuse_factored(make_model("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("to", sorted(name for name in EXPORTERS if isinstance(EXPORTERS.get(name), ModelFormat) and name != "hf"))
def test_formats_without_a_place_for_factors_refuse_them(make_model, tmp_path: Path, to: str) -> None:
    """In one line that names the way out, before anything is written; the format of transformers holds them."""
    model, _, _ = compressed(make_model("llama"))
    form = EXPORTERS.get(to)
    assert isinstance(form, ModelFormat)
    with pytest.raises(ModelError, match=rf"stores \d+ layers as two factors.* format {to} .*compress .*--dense"):
        export_loaded(held(model, None), tmp_path / "out", to, form, ExportSettings(), check=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_plan_of_another_model_is_refused(make_model) -> None:
    dense = make_model("llama")
    _, plan, _ = compressed(dense)
    with torch.no_grad():
        dense.get_parameter("model.norm.weight").add_(1.0)
    with pytest.raises(PlanError, match="this one has"):
        factorize(dense, plan, {})
