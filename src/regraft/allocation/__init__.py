"""Allocation of LoRA ranks to layers, under one hard budget of trainable parameters."""

from regraft.allocation.confirm import confirm
from regraft.allocation.contract import ALLOCATORS, PRIOR, Allocator, ClosedForm, Learner, Prediction, Proposal, Ranks, refuse_prior
from regraft.allocation.meta import PAST, add_to_store
from regraft.allocation.prior import Prior, default_prior, load_prior, shipped_prior
from regraft.allocation.rankadaptor import RankAdaptor
from regraft.allocation.schedule import MOST_FINALISTS, Request, Rung, Schedule, finalists, next_request, winner
from regraft.allocation.spaces import rank_plan, rank_space

__all__ = [
    "ALLOCATORS",
    "MOST_FINALISTS",
    "PAST",
    "PRIOR",
    "Allocator",
    "ClosedForm",
    "Learner",
    "Prediction",
    "Prior",
    "Proposal",
    "RankAdaptor",
    "Ranks",
    "Request",
    "Rung",
    "Schedule",
    "add_to_store",
    "confirm",
    "default_prior",
    "finalists",
    "load_prior",
    "next_request",
    "rank_plan",
    "rank_space",
    "refuse_prior",
    "shipped_prior",
    "winner",
]
