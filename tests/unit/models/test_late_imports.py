"""Actions that wait for an import, and what waits for PEFT: default target modules for uneven models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fresh
from regraft.models.late_imports import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"waited_for_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text("VALUE = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_an_action_runs_once_after_the_first_import_and_at_once_after_it(package: str) -> None:
    seen: list[int] = []

    def action(module: ModuleType) -> None:
        seen.append(module.VALUE)

    before = list(sys.meta_path)
    after_import(package, action)
    after_import(package, action)
    assert len(sys.meta_path) == len(before) + 1
    assert seen == []
    module = __import__(package)
    assert seen == [1]
    assert sys.meta_path == before
    assert module.__spec__ is not None
    assert module.__loader__ is module.__spec__.loader
    after_import(package, action)
    assert seen == [1, 1]


CODE = """
{imports}
import torch
from regraft.models.uneven import modeling_regraft, own_config
config_class = own_config("llama")
config = config_class(vocab_size=31, hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=5,
    num_key_value_heads=5, head_dim=4, per_layer_config={{"1": {{"intermediate_size": 16}}}})
_, causal = modeling_regraft.model_classes(config_class)
from peft import LoraConfig, get_peft_model
model = get_peft_model(causal(config), LoraConfig(r=4))
print(*sorted({{name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}}))
"""


@pytest.mark.long
@pytest.mark.parametrize("imports", ["import regraft", "import peft\nimport regraft"])
def test_peft_knows_where_to_put_lora_on_an_uneven_model(imports: str) -> None:
    command = ["-c", CODE.format(imports=imports)]
    if imports.startswith("import peft"):  # as in the server of fresh processes
        done = fresh.run(command)
    else:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["q_proj", "v_proj"]  # PEFT's own default for Llama
