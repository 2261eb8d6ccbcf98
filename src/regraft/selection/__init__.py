"""Selection of the units to keep in each layer."""

from regraft.selection.budget import SELECTORS, Budget, Selector, select

__all__ = ["SELECTORS", "Budget", "Selector", "select"]
