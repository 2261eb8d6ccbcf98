"""Targets of adapters by their names: what is no name and no glob says so."""

from __future__ import annotations

import pytest

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
