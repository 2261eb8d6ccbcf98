"""The configs and classes of uneven models, and how the Auto classes come to know them."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import fresh
from regraft.models.family import families
from regraft.models.uneven import code_paths, configuration_regraft, modeling_regraft, own_config, register_on_import

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


LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("name", sorted(families()))
def test_every_declared_family_has_its_classes(name):
    config = own_config(name)
    base, causal = modeling_regraft.model_classes(config)
    assert config.model_type == f"regraft_{name}"
    stem = config.__name__.removesuffix("Config")
    assert (base.__name__, causal.__name__) == (f"{stem}Model", f"{stem}ForCausalLM")
    assert base.config_class is causal.config_class is config
    assert not any(hasattr(transformers, name) for name in (config.__name__, base.__name__, causal.__name__))
    assert issubclass(causal, getattr(transformers, families()[name].model_class))
    # found by name, as the code that travels is, and the same each time
    assert getattr(configuration_regraft, config.__name__) is config
    assert getattr(modeling_regraft, causal.__name__) is causal


def test_other_names_are_not_made_up():
    for module, name in (
        (configuration_regraft, "LlamaConfig"),
        (configuration_regraft, "RegraftNothingConfig"),
        (modeling_regraft, "RegraftNothingForCausalLM"),
        (modeling_regraft, "RegraftLlamaForSequenceClassification"),
    ):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)


def test_the_defaults_of_the_layout_are_those_of_llama():
    family = families()["llama"]
    assert (family.attention, [family.mlp]) == (configuration_regraft.LAYOUT["attention"], configuration_regraft.LAYOUT["mlp"])
    assert list(family.attention_norms) == configuration_regraft.LAYOUT["attention_norms"]
    assert list(family.mlp_norms) == configuration_regraft.LAYOUT["mlp_norms"]
    assert family.layers == f"model.{configuration_regraft.LAYOUT['layers']}"
    assert family.keys.heads == configuration_regraft.LAYOUT["heads"]


def test_the_code_that_travels_needs_only_torch_and_transformers():
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "huggingface_hub"}
    for path in code_paths():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                here = node.level == 1 and f"{node.module}.py" in {other.name for other in code_paths()}
                assert here or (node.level == 0 and str(node.module).split(".")[0] in allowed)


@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_head_counts_that_do_not_divide_the_hidden_size(name, tmp_path):
    config_class = own_config(name)
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
    for name in LIKE_LLAMA:
        config_class = own_config(name)
        base, causal = modeling_regraft.model_classes(config_class)
        config = config_class(**SIZES, per_layer_config={"0": {"intermediate_size": 8}})
        assert type(AutoModel.from_config(config)) is base
        assert type(AutoModelForCausalLM.from_config(config)) is causal


IMPORTS = {
    "regraft first": "import regraft; from transformers import AutoConfig",
    "transformers first": "from transformers import AutoConfig; import regraft",
    "a model class in between": "import regraft; from transformers import LlamaForCausalLM, AutoConfig",
}


@pytest.mark.long
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
    path = {"PYTHONPATH": ":".join(sys.path)}
    if order.startswith("transformers"):  # as in the server of fresh processes
        done = fresh.run(["-c", code], env=path)
    else:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=path)
    assert done.stdout.split() == ["RegraftQwen3ForCausalLM"], done.stderr


def test_importing_regraft_is_light():
    code = (
        "import sys, regraft\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'typer', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_waiting_for_auto_config_leaves_one_finder_at_most():
    register_on_import()
    waiting = list(sys.meta_path)
    register_on_import()
    assert sys.meta_path == waiting
