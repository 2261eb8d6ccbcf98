"""How many units stay in each layer, and which."""

from regraft.selection import global_threshold, uniform
from regraft.selection.budget import SELECTORS, Budget, select

__all__ = ["SELECTORS", "Budget", "global_threshold", "select", "uniform"]
