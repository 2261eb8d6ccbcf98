"""A LoRA rank for each layer, under one hard budget of trainable parameters."""

from regraft.allocation import adalora, bayes, eva, gradient, perceptron, proportional, uniform
from regraft.allocation.confirm import confirm
from regraft.allocation.contract import ALLOCATORS, Allocator, ClosedForm, Learner, Prediction, Proposal, Ranks
from regraft.allocation.rankadaptor import RankAdaptor
from regraft.allocation.schedule import MOST_FINALISTS, Request, Rung, Schedule, finalists, next_request, winner
from regraft.allocation.spaces import DEFAULT_CHOICES, rank_plan, rank_space

__all__ = [
    "ALLOCATORS",
    "DEFAULT_CHOICES",
    "MOST_FINALISTS",
    "Allocator",
    "ClosedForm",
    "Learner",
    "Prediction",
    "Proposal",
    "RankAdaptor",
    "Ranks",
    "Request",
    "Rung",
    "Schedule",
    "adalora",
    "bayes",
    "confirm",
    "eva",
    "finalists",
    "gradient",
    "next_request",
    "perceptron",
    "proportional",
    "rank_plan",
    "rank_space",
    "uniform",
    "winner",
]
