"""How much each prunable unit matters."""

from regraft.importance import activation, depth, magnitude, random, taylor, two_sided
from regraft.importance.criteria import CRITERIA, Criterion, Evidence, score

__all__ = ["CRITERIA", "Criterion", "Evidence", "activation", "depth", "magnitude", "random", "score", "taylor", "two_sided"]
