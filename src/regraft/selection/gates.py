"""One threshold over gates that are learned for all layers together, where the knapsack adds up damage of each group alone.

What is learned, and how, is in :mod:`regraft.surgery.gates`. The threshold then takes the units with the lowest gates, as ``global`` takes
those with the lowest scores.
"""

from __future__ import annotations

from regraft.selection.budget import SELECTORS, Selector
from regraft.selection.global_threshold import global_threshold

SELECTORS.include(Selector("gates", needs_curves=True, choose=global_threshold, learned=True))
