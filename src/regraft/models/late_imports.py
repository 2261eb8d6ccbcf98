"""Actions that run after another package's module is imported, so that ``import regraft`` need not import that package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # whose module takes a fifth of the time of `import regraft`, and which give nothing but defaults that nobody calls
    Loader = MetaPathFinder = object

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action) -> None:
    """Runs an action on a module: now if the module is already imported, else right after its first import.

    Args:
        name: Full name of the module.
        action: Function that is called once with the module.
    """
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Waiting) and (finder.name, finder.action) == (name, action) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, action))


class _Waiting(MetaPathFinder):
    """A finder for one module name, which uses the other finders and adds an action to the result."""

    def __init__(self, name: str, action: Action) -> None:
        self.name = name
        self.action = action

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Returns the spec of the module with a loader that runs the action after the module's own."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAct(spec.loader, self.action)
        return spec


class _ThenAct(Loader):
    """A loader that runs an action after a module's own loader."""

    def __init__(self, loader: Loader, action: Action) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Creates the module as its own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module, restores its own loader and runs the action."""
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.action(module)
