"""Actions that wait for a module of another package to be imported, so that ``import regraft`` need not import that package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action) -> None:
    """Runs an action on a module: now where it is imported already, else right after its first import by whomever.

    Args:
        name: The module's full name.
        action: Called once with the module.
    """
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Waiting) and (finder.name, finder.action) == (name, action) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, action))


class _Waiting(MetaPathFinder):
    """A finder that finds nothing by itself: it adds the action to what the other finders find for one name."""

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
    """A module's own loader with an action behind it."""

    def __init__(self, loader: Loader, action: Action) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Creates the module as its own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module, puts its own loader back and runs the action."""
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.action(module)
