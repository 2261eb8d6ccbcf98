"""Allocation of LoRA ranks to layers, under one hard budget of trainable parameters."""

from regraft.allocation import adalora, bayes, eva, gradient, perceptron, proportional, uniform
from regraft.allocation.confirm import confirm
from regraft.allocation.contract import ALLOCATORS, Allocator, ClosedForm, Learner, Prediction, Proposal, Ranks, refuse_prior
from regraft.allocation.meta import PAST, add_to_store
from regraft.allocation.prior import Prior, default_prior, load_prior, shipped_prior
from regraft.allocation.rankadaptor import RankAdaptor
from regraft.allocation.schedule import MOST_FINALISTS, Request, Rung, Schedule, finalists, next_request, winner
from regraft.allocation.spaces import rank_plan, rank_space

__all__ = [
    "ALLOCATORS",
    "MOST_FINALISTS",
    "PAST",
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
    "adalora",
    "add_to_store",
    "bayes",
    "confirm",
    "default_prior",
    "eva",
    "finalists",
    "gradient",
    "load_prior",
    "next_request",
    "perceptron",
    "proportional",
    "rank_plan",
    "rank_space",
    "refuse_prior",
    "shipped_prior",
    "uniform",
    "winner",
]
