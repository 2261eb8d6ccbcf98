"""Private names of other packages that we use: each test fails when a new version has renamed or moved what it stands for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import RDBStorage
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from regraft import compat


@pytest.fixture
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    return model


def test_a_modules_own_parameters_and_buffers_can_be_replaced() -> None:
    norm, value = nn.BatchNorm1d(3), nn.Parameter(torch.full((3,), 7.0))
    compat.own_parameters(norm)["weight"] = value
    compat.own_buffers(norm)["running_mean"] = torch.full((3,), 5.0)
    assert norm.weight is value
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [5.0] * 3
    assert set(compat.own_parameters(nn.Sequential(norm))) == set(), "those of modules inside are not its own"


def test_fake_tensors_have_shapes_and_no_memory() -> None:
    with compat.fake_tensors():
        huge = torch.empty(10**7, 10**7) @ torch.empty(10**7, 3)
    assert huge.shape == (10**7, 3)


def test_the_trainer_takes_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert "_n_gpu" in vars(arguments), "transformers keeps the number of GPUs elsewhere now"
    monkeypatch.setattr(arguments, "_n_gpu", 4)
    assert arguments.n_gpu == 4
    compat.train_on_one_gpu(arguments)
    assert arguments.n_gpu == 1


def test_activations_are_recomputed_and_kept_again(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **compat.recomputing())
    (getattr(llama, "activation_checkpointing_enable", None) or llama.gradient_checkpointing_enable)()

    def recomputes() -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in llama.modules())

    assert recomputes()
    compat.stop_recomputing(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), llama)
    assert recomputes()
    compat.stop_recomputing(arguments, llama)
    assert not recomputes()


def test_the_attention_that_a_model_runs_is_known(llama: LlamaForCausalLM) -> None:
    assert compat.attention_kernel(llama.config) == "eager"
    llama.set_attn_implementation("sdpa")
    assert compat.attention_kernel(llama.config) == "sdpa"


def test_a_loaded_model_knows_how_its_tensors_were_renamed(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    assert compat.CONVERSIONS in vars(LlamaForCausalLM.from_pretrained(tmp_path))


def test_names_that_peft_takes_for_experts_are_known() -> None:
    assert compat.names_of_experts("deepseek_v3") == compat.names_of_experts("qwen3_next") == {"gate", "gate_proj", "up_proj", "down_proj"}
    assert compat.names_of_experts("llama") == compat.names_of_experts("regraft_qwen3_next") == frozenset()


def test_names_that_saved_models_use_without_this_package(llama: LlamaForCausalLM) -> None:
    assert llama.config._attn_implementation_internal == "eager", "models/uneven writes it into the configs of layers"
    assert llama.config._experts_implementation_internal == "eager", "and this"
    assert LlamaForCausalLM._can_set_experts_implementation() is False, "models/uneven answers it for the family's own file"
    assert next(iter(llama.model.layers[0]._modules)) == "self_attn"
    assert list(llama.lm_head._parameters) == ["weight", "bias"]


def test_registered_configs_stand_beside_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compat.extra_configs(CONFIG_MAPPING)
    assert "llama" in compat.stock_configs(CONFIG_MAPPING)
    extra = copy.copy(before)
    extra["llama-of-this-test"] = LlamaConfig
    try:
        compat.put_extra_configs(CONFIG_MAPPING, extra)
        assert CONFIG_MAPPING["llama-of-this-test"] is LlamaConfig
    finally:
        compat.put_extra_configs(CONFIG_MAPPING, before)
    assert "llama-of-this-test" not in CONFIG_MAPPING


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_the_importance_of_triplets_is_sensitivity_times_uncertainty(llama: LlamaForCausalLM) -> None:
    config = AdaLoraConfig(init_r=3, target_r=2, tinit=1, tfinal=1, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(llama, config)
    ids = torch.arange(3, 19)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    allocator: Any = adapted.base_model.rankallocator
    allocator.update_ipt(adapted.base_model.model)
    name = "model.layers.0.self_attn.q_proj.lora_A.default"
    assert torch.equal(compat.triplet_score(allocator, name), allocator.exp_avg_ipt[name] * allocator.exp_avg_unc[name])
    assert compat.triplet_score(allocator, name).shape == (3, 16)


@pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning")
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_trials_are_found_and_beaten_for_in_their_storage(tmp_path: Path) -> None:
    storage = RDBStorage(f"sqlite:///{tmp_path / 'trials.db'}", heartbeat_interval=60)
    optuna.create_study(storage=storage, study_name="another").ask()
    study = optuna.create_study(storage=storage, study_name="ours")
    study.ask()
    (trial,) = study.get_trials()
    assert compat.trial_id(trial) != trial.number
    compat.storage_of(study).set_trial_user_attr(compat.trial_id(trial), "said", "here")
    assert study.get_trials()[0].user_attrs == {"said": "here"}
    compat.beat(compat.storage_of(study), compat.trial_id(trial))
    with storage.engine.connect() as connection:
        rows = connection.exec_driver_sql("select trial_id from trial_heartbeats").all()
    assert [tuple(row) for row in rows] == [(compat.trial_id(trial),)]
    storage.engine.dispose()
