"""Importance criteria: scores of prunable units."""

from regraft.importance import activation, depth, magnitude, random, taylor, two_sided
from regraft.importance.criteria import CRITERIA, Criterion, Evidence, reduce_saliency, score

__all__ = [
    "CRITERIA",
    "Criterion",
    "Evidence",
    "activation",
    "depth",
    "magnitude",
    "random",
    "reduce_saliency",
    "score",
    "taylor",
    "two_sided",
]
