"""Targets of adapters by their names: what is no name and no glob says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from regraft.errors import InputError
from regraft.surgery.targets import find_targets
from regraft.testing.toys import tiny_llama


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "pattern",
    [r".*q_proj", r".*\.(q|v)_proj", r"model\.layers\.[01]\.self_attn\.q_proj", r".*\.\d{1,2}\.mlp\.(up|down)_proj", r".*(?<!gate)_proj"],
)
def test_a_regular_expression_finds_what_it_finds_in_peft(pattern: str) -> None:
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=pattern))
    theirs = {name.removeprefix("base_model.model.") for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert set(find_targets(tiny_llama(), [pattern])) == theirs != set()


@pytest.mark.parametrize("pattern", ["(q|v)_proj", r"layers\.0\.self_attn\.q_proj"])
def test_an_expression_of_a_part_of_a_name_is_refused_with_the_form_that_is_taken(pattern: str) -> None:
    with pytest.raises(InputError, match=r"has to match a whole name, as in PEFT, such as \.\*\[\.\]\(q\|v\)_proj$"):
        find_targets(tiny_llama(), [pattern])


@pytest.mark.parametrize(("pattern", "problem"), [("(.*)*(.*)*(.*)*x$", "takes more than 1 s"), (".*(q_proj", "is no pattern")])
def test_an_expression_that_never_ends_or_is_none_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(InputError, match=rf"^`targets`: .*{problem}.*; write a list of names, or globs"):
        find_targets(tiny_llama(), [pattern])


def test_a_misspelt_name_is_answered_by_the_closest_one() -> None:
    with pytest.raises(InputError, match=r"did you mean 'q_proj'\?$"):
        find_targets(tiny_llama(), ["q_prj"])
    assert set(find_targets(tiny_llama(), ["*.layers.0.self_attn.[qv]_proj"])) == {f"model.layers.0.self_attn.{name}_proj" for name in "qv"}


def test_the_last_matrix_of_a_mamba_mixer_is_no_target_by_default() -> None:
    """Its kernel reads the weight by itself, so that an adapter would be passed by; PEFT refuses it."""
    names = ["layers.0.mixer.in_proj", "layers.0.mixer.out_proj", "layers.1.self_attn.out_proj"]
    mixer, attention = nn.Module(), nn.Module()
    mixer.in_proj, mixer.out_proj, attention.out_proj = (nn.Linear(4, 4) for _ in names)
    mixer.A_log, mixer.D = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    model: Any = nn.Module()
    model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    model.layers[0].mixer, model.layers[1].self_attn = mixer, attention
    model.config = SimpleNamespace(model_type="bamba")
    assert list(find_targets(model)) == [names[0], names[2]]
    assert list(find_targets(model, ["mixer.out_proj"])) == [names[1]]


def test_names_that_peft_takes_for_experts_and_gates_of_one_number_are_no_targets_by_default() -> None:
    model: Any = nn.Module()
    model.config = SimpleNamespace(model_type="deepseek_v3")
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].up_proj, model.layers[0].q_proj, model.layers[0].shared_gate = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
    assert list(find_targets(model)) == ["layers.0.q_proj"]
    model.config.model_type = "llama"
    assert list(find_targets(model)) == ["layers.0.up_proj", "layers.0.q_proj"]
