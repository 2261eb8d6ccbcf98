"""Targets of adapters by their names: what is no name and no glob says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from regraft.errors import InputError
from regraft.surgery.targets import find_targets
from regraft.testing.toys import tiny_llama


@pytest.mark.parametrize("pattern", [".*q_proj", "(q|v)_proj", r"layers\.0\.self_attn\.q_proj"])
def test_a_regular_expression_is_answered_by_the_form_that_is_taken(pattern: str) -> None:
    with pytest.raises(InputError, match=r"globs such as \*\.layers\.0\.\*_proj, several as a list, not regular expressions$"):
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
    assert list(find_targets(model)) == [names[0], names[2]]
    assert list(find_targets(model, ["mixer.out_proj"])) == [names[1]]
