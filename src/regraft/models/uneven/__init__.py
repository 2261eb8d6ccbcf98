"""Models whose layers differ, known to the Auto classes of transformers.

``configuration_regraft`` and ``modeling_regraft`` are also what a saved folder carries for those who have not got regraft; they
import nothing of ours. Importing transformers' models takes seconds, so ``import regraft`` does not: it waits until somebody else
imports the Auto classes, and the model classes wait until the first config is made.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
CODE_FILES = ("configuration_regraft.py", "modeling_regraft.py")


def code_paths() -> tuple[Path, ...]:
    """Returns the files that a saved folder carries."""
    return tuple(Path(__file__).with_name(name) for name in CODE_FILES)


@cache
def register() -> None:
    """Makes the Auto classes know our configs and models; a second call does nothing."""
    _register_configs()
    _register_models()


def register_on_import() -> None:
    """Does what :func:`register` does, as soon as something imports the Auto classes; costs nothing until then."""
    if AUTO_CONFIG in sys.modules:
        _register_configs()
    elif not any(isinstance(finder, _AfterAutoConfig) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAutoConfig())


@cache
def _register_configs() -> None:
    auto = importlib.import_module(AUTO_CONFIG)
    configuration = importlib.import_module(f"{__name__}.configuration_regraft")
    for config_class in configuration.CONFIGS:
        auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    configuration.BEFORE_FIRST_CONFIG.append(_register_models)


@cache
def _register_models() -> None:
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    modeling = importlib.import_module(f"{__name__}.modeling_regraft")
    for config_class, base_class, causal_class in modeling.MODELS:
        auto.AutoModel.register(config_class, base_class, exist_ok=True)
        auto.AutoModelForCausalLM.register(config_class, causal_class, exist_ok=True)


class _AfterAutoConfig(MetaPathFinder):
    """Registers our configs right after the module of AutoConfig has been imported by whomever.

    The models cannot be registered at that moment: it lies in the middle of transformers' own imports.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Finds the module as everybody else would, and adds the registration behind it."""
        if fullname != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """A module's own loader, with the registration behind it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Creates the module as its own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module, then registers."""
        self.loader.exec_module(module)
        spec = module.__spec__
        if spec is not None:
            spec.loader = self.loader
        module.__loader__ = self.loader
        _register_configs()
