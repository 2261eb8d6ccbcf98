"""LoRA through PEFT: which modules, which ranks, and what merging and saving give."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import fresh
from regraft.adapters import ADAPTERS
from regraft.adapters.plain_lora import target_names
from regraft.adapters.seeding import derived_seed, isolated
from regraft.errors import InputError, PlanError
from regraft.models.view import ModelView
from regraft.plans import RankPlan
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import Injected, inject, merge, save_adapter

# What plain PEFT 0.21 says of itself under transformers 5.23; our own use of it is silent.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LAST = "model.layers.2."


def train_factors(injected: Injected, scale: float = 0.1) -> None:
    """Puts random values into every trained parameter, so that the adapter does something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in injected.module.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) % 97
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def make_uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Takes half of one layer's channels and another layer's attention output projections away."""
    layer: Any = model.get_submodule("model.layers.1")
    layer.mlp.gate_proj = nn.Linear(48, 24, bias=False)
    layer.mlp.up_proj = nn.Linear(48, 24, bias=False)
    layer.mlp.down_proj = nn.Linear(24, 48, bias=False)
    return model


def test_every_linear_is_adapted_and_nothing_changes_at_first(make_model: Callable[..., PreTrainedModel], family: str) -> None:
    model = make_uneven(make_model(family))
    before = logits(model)
    modules = ModelView(model).adapted_modules()
    expected = sum(4 * sum(module.weight.shape) for module in modules.values())
    injected = inject(model, RecoverSettings(rank=4), None, seed=3)
    assert injected.trainable_parameters == expected
    trained = {name for name, parameter in injected.module.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * len(modules) == 2 * 7 * 3
    torch.testing.assert_close(logits(injected.module), before, rtol=0, atol=0)


def test_the_forward_pass_is_that_of_plain_peft(make_model: Callable[..., PreTrainedModel]) -> None:
    ours, theirs = make_model("qwen3"), make_model("qwen3")
    injected = inject(ours, RecoverSettings(rank=4, alpha=6.0, dropout=0.0), None, seed=3)
    train_factors(injected)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = get_peft_model(theirs, config)
    with torch.no_grad():
        mine = dict(injected.module.named_parameters())
        for name, parameter in plain.named_parameters():
            parameter.copy_(mine[name])
    assert injected.trainable_parameters == plain.get_nb_trainable_parameters()[0]
    torch.testing.assert_close(logits(injected.module), logits(plain), rtol=0, atol=0)


def test_merged_weights_are_the_dense_formula(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_uneven(make_model())
    names = list(ModelView(model).adapted_modules())
    plan = RankPlan("any", "test", {name: 2 + index % 5 for index, name in enumerate(names)}, alpha_per_rank=3.0)
    before = {name: module.weight.detach().double() for name, module in ModelView(model).adapted_modules().items()}
    untouched = {name: value.clone() for name, value in model.state_dict().items() if "norm" in name or "embed" in name}
    injected = inject(model, RecoverSettings(), plan, seed=3)
    train_factors(injected)
    factors = {name: value.double() for name, value in injected.module.state_dict().items() if "lora" in name}
    adapted = logits(injected.module)
    merged = merge(injected)
    for name, module in ModelView(merged).adapted_modules().items():
        first, second = (factors[f"base_model.model.{name}.lora_{which}.default.weight"] for which in "AB")
        assert first.shape[0] == plan.ranks[name]
        dense = before[name] + 3.0 * second @ first
        torch.testing.assert_close(module.weight.double(), dense, rtol=0, atol=1e-6)
    for name, value in untouched.items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=0)
    assert merged is model
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert (logits(merged) - adapted).abs().max() <= 1e-5


def test_merging_rounds_once_in_bfloat16(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model().bfloat16()
    name = LAST + "mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    injected = inject(model, RecoverSettings(rank=4), None, seed=3)
    train_factors(injected, scale=0.03)
    factors = {key: value.double() for key, value in injected.module.state_dict().items() if name in key and "lora" in key}
    first, second = (factors[f"base_model.model.{name}.lora_{which}.default.weight"] for which in "AB")
    dense = weight.double() + 2.0 * second @ first
    merged = merge(injected).get_submodule(name).weight
    assert merged.dtype == torch.bfloat16
    # Nearest in bfloat16, but for the few values whose float32 sum falls on the other side of a midpoint.
    assert float((merged == dense.float().bfloat16()).double().mean()) > 0.999
    twice = weight + (2.0 * second @ first).bfloat16()
    assert float((twice == dense.float().bfloat16()).double().mean()) < 0.99  # what rounding the change first would give


def test_a_rank_plan_leaves_modules_out(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    ranks = {LAST + "mlp.up_proj": 5, LAST + "mlp.down_proj": 3, LAST + "mlp.gate_proj": 0}
    injected = inject(model, RecoverSettings(), RankPlan("any", "test", ranks), seed=0)
    shapes = {name: tuple(p.shape) for name, p in injected.module.named_parameters() if p.requires_grad}
    prefix = "base_model.model." + LAST
    assert shapes == {
        prefix + "mlp.up_proj.lora_A.default.weight": (5, 48),
        prefix + "mlp.up_proj.lora_B.default.weight": (64, 5),
        prefix + "mlp.down_proj.lora_A.default.weight": (3, 64),
        prefix + "mlp.down_proj.lora_B.default.weight": (48, 3),
    }
    scaling = [module.scaling["default"] for module in injected.module.modules() if isinstance(module, BaseTunerLayer)]
    assert scaling == [2.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "ranks", "error", "said"),
    [
        ({"rank": 25}, None, InputError, r"rank 25 exceeds the limit 24 .*k_proj' \(24 x 48\); use `rank=24` or less"),
        ({"adapter": "lore"}, None, InputError, "unknown adapter 'lore'; known: .*lora.*; did you mean 'lora'"),
        ({}, {"model.layers.9.mlp.up_proj": 2}, PlanError, "'model.layers.9.mlp.up_proj', which this model does not have"),
        ({}, {LAST + "mlp.up_proj": 49}, InputError, "rank 49 exceeds the limit 48 .* lower it in the plan"),
        ({}, {LAST + "mlp.up_proj": -1}, PlanError, "rank -1"),
        ({}, {LAST + "mlp.up_proj": 0}, PlanError, "no module a rank"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(
    make_model: Callable[..., PreTrainedModel],
    settings: dict[str, Any],
    ranks: dict[str, int] | None,
    error: type[Exception],
    said: str,
) -> None:
    model = make_model()
    before = logits(model)
    plan = RankPlan("any", "test", ranks) if ranks is not None else None
    with pytest.raises(error, match=said) as raised:
        inject(model, RecoverSettings(**settings), plan, seed=0)
    assert "\n" not in str(raised.value)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_a_plan_counted_on_another_model_is_refused(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    before = logits(model)
    right = RankPlan("any", "test", {LAST + "mlp.up_proj": 2}, trainable_parameters=2 * (48 + 64))
    wrong = RankPlan("any", "test", {LAST + "mlp.up_proj": 2}, trainable_parameters=2 * (48 + 63))
    with pytest.raises(PlanError, match="counts 222 trainable parameters, but on this model it costs 224"):
        inject(model, RecoverSettings(), wrong, seed=0)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert inject(model, RecoverSettings(), right, seed=0).trainable_parameters == 224


@pytest.mark.parametrize("ranks", [None, {LAST + "mlp.up_proj": 5, LAST + "mlp.down_proj": 3, "model.layers.0.mlp.up_proj": 5}])
def test_stock_peft_loads_what_is_saved(make_model: Callable[..., PreTrainedModel], tmp_path: Path, ranks: dict[str, int] | None) -> None:
    make_model("mistral").save_pretrained(tmp_path / "base")
    model = make_model("mistral")
    injected = inject(model, RecoverSettings(rank=4), RankPlan("any", "test", ranks) if ranks else None, seed=0)
    train_factors(injected)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(injected, folder, str(tmp_path / "base"))
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(folder))
    torch.testing.assert_close(logits(stock), logits(injected.module), rtol=0, atol=0)


@pytest.mark.long
def test_a_saved_adapter_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Whose sets of names are in another order: here, and where the hashes of texts have another seed."""
    script = """
import sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import torch
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject, save_adapter
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                                     num_attention_heads=2, num_key_value_heads=2))
folder = Path(sys.argv[1]); folder.mkdir()
save_adapter(inject(model, RecoverSettings(rank=2), None, seed=5), folder, "base")
"""
    arguments = ["-c", script]
    subprocess.run([sys.executable, *arguments, str(tmp_path / "seeded")], check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert fresh.run([*arguments, str(tmp_path / "unseeded")]).returncode == 0
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("seeded", "unseeded")]
    assert contents[0] == contents[1]
    config = json.loads(contents[0]["adapter_config.json"])
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_target_names_are_full_where_an_ending_is_not_wholly_wanted() -> None:
    names = ["l.0", "l.0.up", "l.1", "l.1.up", "l.0.down", "l.1.down", "other.down"]
    assert target_names(["l.0.up", "l.1.up", "l.0.down", "l.1.down"], names) == ["l.0.down", "l.1.down", "up"]


@pytest.mark.slow
def test_first_values_follow_the_seed_and_leave_the_generators_alone(make_model: Callable[..., PreTrainedModel]) -> None:
    models = [make_model() for _ in range(4)]

    def first(seed: int) -> torch.Tensor:
        injected = inject(models.pop(), RecoverSettings(rank=2), None, seed=seed)
        return injected.module.state_dict()[f"base_model.model.{LAST}mlp.up_proj.lora_A.default.weight"]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    undisturbed = (random.random(), np.random.rand(), torch.rand(()))  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    assert bool((first(0) == first(0)).all())
    assert not bool((first(0) == first(1)).any())
    assert (random.random(), np.random.rand(), torch.rand(())) == undisturbed  # noqa: NPY002


def test_isolation_restores_the_generators_after_an_error() -> None:
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)

    def fail() -> None:
        with isolated(0):
            torch.rand(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.rand(()) == expected
    assert len({derived_seed(0, "a", n) for n in range(1000)} | {derived_seed(1, "a", n) for n in range(1000)}) == 2000
    assert all(0 <= derived_seed(0, n) < 2**63 for n in range(1000))


def test_lora_is_registered() -> None:
    assert "lora" in ADAPTERS.names()
