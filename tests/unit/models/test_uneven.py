"""The configs and classes of uneven models, and how the Auto classes come to know them."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from regraft.models.family import families
from regraft.models.uneven import code_paths, configuration_regraft, modeling_regraft, register, register_on_import

SIZES = {
    "vocab_size": 31,
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_every_declared_family_has_its_classes():
    assert [f"regraft_{name}" for name in families()] == sorted(config.model_type for config in configuration_regraft.CONFIGS)
    for config, base, causal in modeling_regraft.MODELS:
        stem = config.__name__.removesuffix("Config")
        assert (base.__name__, causal.__name__) == (f"{stem}Model", f"{stem}ForCausalLM")
        assert base.config_class is causal.config_class is config
        assert not any(hasattr(transformers, name) for name in (config.__name__, base.__name__, causal.__name__))
        assert issubclass(causal, getattr(transformers, families()[config.model_type.removeprefix("regraft_")].model_class))


def test_the_norms_of_removed_parts_are_the_declared_ones():
    for family in families().values():
        assert (family.attention,) == modeling_regraft.ATTENTION
        assert family.attention_norms == modeling_regraft.ATTENTION_NORMS
        assert (family.mlp,) == modeling_regraft.MLP
        assert family.mlp_norms == modeling_regraft.MLP_NORMS


def test_the_code_that_travels_needs_only_torch_and_transformers():
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "huggingface_hub"}
    for path in code_paths():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                here = node.level == 1 and f"{node.module}.py" in {other.name for other in code_paths()}
                assert here or (node.level == 0 and str(node.module).split(".")[0] in allowed)


@pytest.mark.parametrize("config_class", configuration_regraft.CONFIGS)
def test_head_counts_that_do_not_divide_the_hidden_size(config_class, tmp_path):
    per_layer = {"1": {"num_attention_heads": 2, "num_key_value_heads": 1}, "2": {"skip": ["mlp"]}}
    config = config_class(**SIZES, per_layer_config=per_layer)
    config.validate()
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is config_class
    assert [again.layer(i).num_attention_heads for i in range(3)] == [3, 2, 3]
    assert [again.layer(i).skip for i in range(3)] == [[], [], ["mlp"]]
    assert again.even().num_attention_heads == 3
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = again.num_attention_heads  # it varies, so no number is right for the whole model


def test_the_auto_classes_know_them():
    register()
    for config_class, base, causal in modeling_regraft.MODELS:
        config = config_class(**SIZES, per_layer_config={"0": {"intermediate_size": 8}})
        assert type(AutoModel.from_config(config)) is base
        assert type(AutoModelForCausalLM.from_config(config)) is causal


IMPORTS = {
    "regraft first": "import regraft; from transformers import AutoConfig",
    "transformers first": "from transformers import AutoConfig; import regraft",
    "a model class in between": "import regraft; from transformers import LlamaForCausalLM, AutoConfig",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", sorted(IMPORTS))
def test_importing_regraft_is_enough_in_any_order(order):
    code = (
        f"import sys; {IMPORTS[order]}\n"
        "config = AutoConfig.for_model('regraft_qwen3', num_hidden_layers=2, hidden_size=8, vocab_size=9, intermediate_size=8,"
        " num_attention_heads=2, num_key_value_heads=1, head_dim=4, per_layer_config={'1': {'skip': ['attention']}})\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_config(config)).__name__)\n"
        "import transformers.models.auto.configuration_auto as c, inspect\n"
        "assert 'class AutoConfig' in inspect.getsource(c)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.split() == ["RegraftQwen3ForCausalLM"], done.stderr


def test_importing_regraft_is_light():
    code = (
        "import sys, regraft\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'typer', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_waiting_for_auto_config_leaves_one_finder_at_most():
    before = list(sys.meta_path)
    register_on_import()
    register_on_import()
    assert sys.meta_path == before  # the Auto classes are imported already, so there is nothing to wait for
