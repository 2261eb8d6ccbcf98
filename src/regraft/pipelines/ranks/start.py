"""Start of a rank search: the shipped prior, a user's own prior, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.allocation import ALLOCATORS, Allocator, Prior, default_prior, load_prior, shipped_prior
from regraft.settings import AllocateSettings


def started(settings: AllocateSettings) -> Allocator:
    """Returns the allocator of the settings, with the prior of the settings.

    Raises:
        InputError: The method is unknown, or takes no prior.
        PlanError: The prior cannot be read.
    """
    method = ALLOCATORS.get(settings.method)
    if settings.prior == "shipped":
        return method
    return method.starting_from(prior_of(settings))


def prior_of(settings: AllocateSettings) -> Prior:
    """Returns the prior of the settings.

    Raises:
        PlanError: It cannot be read.
    """
    if isinstance(settings.prior, Path):
        return load_prior(settings.prior)
    return shipped_prior() if settings.prior == "shipped" else default_prior()


def decisive(settings: AllocateSettings) -> dict[str, Any]:
    """Returns the settings that affect the result of a search, as plain JSON types, with a hash of the prior's numbers."""
    return {**settings.decisive(), "prior": prior_of(settings).digest()}
