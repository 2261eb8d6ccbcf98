"""Selection of the units to keep in each layer."""

from regraft.selection import global_threshold, knapsack, uniform
from regraft.selection.budget import SELECTORS, Budget, Selector, select

__all__ = ["SELECTORS", "Budget", "Selector", "global_threshold", "knapsack", "select", "uniform"]
