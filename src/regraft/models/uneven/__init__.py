"""Models with layers of different sizes, registered with the Auto classes of transformers.

``configuration_regraft``, ``modeling_regraft`` and ``factored_regraft`` are also copied into saved folders for users without regraft; they
import nothing of regraft. ``import regraft`` does not import transformers' models, which takes seconds: the configs are registered when
AutoConfig is asked for one, and the model classes before the first config is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Container
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from regraft.compat import extra_configs, put_extra_configs, stock_configs
from regraft.models.late_imports import after_import

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
PEFT_TABLES = "peft.utils.constants"
PREFIX = "regraft_"
CODE_FILES = ("configuration_regraft.py", "factored_regraft.py", "modeling_regraft.py")


def code_paths() -> tuple[Path, ...]:
    """Returns the code files to copy into a saved folder."""
    return tuple(Path(__file__).with_name(name) for name in CODE_FILES)


def register() -> None:
    """Prepares the Auto classes for our models now; each family's classes are registered when one of them is requested."""
    _defer(importlib.import_module(AUTO_CONFIG))


def own_config(model_type: str) -> Any:
    """Returns the config class of a family's uneven models, after registering it and its models with the Auto classes.

    Args:
        model_type: Model type of the family's own config, such as ``llama``.
    """
    config_class = _register_config(model_type)
    _register_models(config_class.model_type)
    return config_class


def register_on_import() -> None:
    """Arranges that :func:`register` runs as soon as the Auto classes or PEFT are imported; until then it costs nothing."""
    after_import(AUTO_CONFIG, _defer)
    after_import(PEFT_TABLES, _teach_peft)


@cache
def _register_config(model_type: str) -> Any:
    auto = importlib.import_module(AUTO_CONFIG)
    configuration = importlib.import_module(f"{__name__}.configuration_regraft")
    config_class = configuration.config_class(model_type)
    auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    if _register_models not in configuration.BEFORE_FIRST_CONFIG:
        configuration.BEFORE_FIRST_CONFIG.append(_register_models)
    return config_class


@cache
def _register_models(own_type: str) -> None:
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    modeling = importlib.import_module(f"{__name__}.modeling_regraft")
    config_class = _register_config(own_type.removeprefix(PREFIX))
    base_class, causal_class = modeling.model_classes(config_class)
    auto.AutoModel.register(config_class, base_class, exist_ok=True)
    auto.AutoModelForCausalLM.register(config_class, causal_class, exist_ok=True)


class _Pending(dict[str, Any]):
    """AutoConfig's table of additional model types, which registers ours when one of them is looked up."""

    def __init__(self, known: dict[str, Any], stock: Container[str]) -> None:
        super().__init__(known)
        self.stock = stock

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        if not isinstance(key, str) or not key.startswith(PREFIX) or key.removeprefix(PREFIX) not in self.stock:
            return False
        _register_config(key.removeprefix(PREFIX))
        return super().__contains__(key)


def _defer(module: ModuleType) -> None:
    """Arranges the registration with an imported module of AutoConfig.

    Immediate registration would import the families' configs, which is not possible during transformers' own imports.
    """
    mapping = module.CONFIG_MAPPING
    if not isinstance(extra_configs(mapping), _Pending):
        put_extra_configs(mapping, _Pending(extra_configs(mapping), stock_configs(mapping)))


def _teach_peft(module: ModuleType) -> None:
    """Adds our model types to PEFT's tables of default target modules, with their families' modules, so that ``LoraConfig(r=4)`` works."""
    for name, table in vars(module).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
            table.update({f"{PREFIX}{family}": targets for family, targets in list(table.items()) if not family.startswith(PREFIX)})
