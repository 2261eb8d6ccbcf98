"""What a search for ranks starts from: what the package ships, what a user's own searches taught, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.allocation import ALLOCATORS, Allocator, ClosedForm, Prior, default_prior, load_prior, refuse_prior, shipped_prior
from regraft.settings import AllocateSettings


def started(settings: AllocateSettings) -> Allocator:
    """Returns the allocator that the settings name, with the prior that they name.

    Raises:
        InputError: There is no such method, or a prior tells it nothing.
        PlanError: The prior cannot be read.
    """
    method = ALLOCATORS.get(settings.method)
    if settings.prior == "shipped":
        return method
    return refuse_prior(settings.method) if isinstance(method, ClosedForm) else method.starting_from(prior_of(settings))


def prior_of(settings: AllocateSettings) -> Prior:
    """Returns the prior that the settings name.

    Raises:
        PlanError: It cannot be read.
    """
    if isinstance(settings.prior, Path):
        return load_prior(settings.prior)
    return shipped_prior() if settings.prior == "shipped" else default_prior()


def decisive(settings: AllocateSettings) -> dict[str, Any]:
    """Returns, as plain JSON types, what decides the result of a search; of a prior its numbers, wherever they lie."""
    return {**settings.decisive(), "prior": prior_of(settings).digest()}
