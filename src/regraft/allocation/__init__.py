"""A LoRA rank for each layer, under one hard budget of trainable parameters."""

from regraft.allocation import uniform
from regraft.allocation.contract import ALLOCATORS, Allocator, ClosedForm, Learner, Prediction, Proposal, Ranks
from regraft.allocation.schedule import Request, Rung, Schedule, next_request, winner
from regraft.allocation.spaces import DEFAULT_CHOICES, rank_plan, rank_space

__all__ = [
    "ALLOCATORS",
    "DEFAULT_CHOICES",
    "Allocator",
    "ClosedForm",
    "Learner",
    "Prediction",
    "Proposal",
    "Ranks",
    "Request",
    "Rung",
    "Schedule",
    "next_request",
    "rank_plan",
    "rank_space",
    "uniform",
    "winner",
]
