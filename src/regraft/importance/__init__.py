"""Importance criteria: scores of prunable units."""

from regraft.importance.criteria import CRITERIA, Criterion, Evidence, reduce_saliency, score

__all__ = [
    "CRITERIA",
    "Criterion",
    "Evidence",
    "reduce_saliency",
    "score",
]
