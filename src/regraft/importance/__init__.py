"""Importance criteria: scores of prunable units."""

from regraft.importance import activation, depth, magnitude, random, taylor, two_sided
from regraft.importance.criteria import CRITERIA, Criterion, Evidence, score

__all__ = ["CRITERIA", "Criterion", "Evidence", "activation", "depth", "magnitude", "random", "score", "taylor", "two_sided"]
