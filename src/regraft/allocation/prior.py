"""Prior of the performance model: weak by default, or learned from past searches.

A prior is stored as two files: ``prior.safetensors`` with the numbers, and ``prior.json`` with their names and origin.
"""

# SciPy and safetensors carry few types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from regraft.atomic import atomic_folder
from regraft.errors import PlanError
from regraft.reading import check_ordinary, read_object

FORMAT = 1
SHIPPED = Path(__file__).parent / "shipped"
_NUMBERS, _NAMES = "prior.safetensors", "prior.json"

BASE_NAMES = ("log_gain", "log_half_rank", "fidelity_exponent", "log_elastic_scale")
"""Parameters that all slots share, followed by the coefficients of the features; see :mod:`regraft.allocation.concave`."""

_BASE_MEAN = (float(np.log(0.1)), float(np.log(8.0)), 0.3, 0.0)
_BASE_DEVIATION = (1.5, 0.7, 0.3, 0.5)
_COEFFICIENT_DEVIATION = 0.4


@dataclass(frozen=True, eq=False)
class Prior:
    """A Gaussian over the shared parameters of the performance model, with priors of the slots' spread and of the noise.

    Attributes:
        features: Names of the features with a coefficient in this prior.
        mean: (4 + F,) mean of the shared parameters: those of ``BASE_NAMES``, then one coefficient for each feature.
        covariance: (4 + F, 4 + F) covariance of the shared parameters.
        log_spread: Mean and standard deviation of log tau; tau is the spread of the slots' log amplitudes that features do not explain.
        log_noise: Mean and standard deviation of the logarithm of a trial's noise in nats.
        made_from: Origin of the prior: searches, errors, versions; empty for the default.
    """

    features: tuple[str, ...]
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    log_spread: tuple[float, float] = (float(np.log(0.7)), 0.5)
    log_noise: tuple[float, float] = (float(np.log(0.004)), 1.5)
    made_from: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, in the order of ``mean``."""
        return (*BASE_NAMES, *self.features)

    def over(self, features: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns mean (4 + F,) and covariance (4 + F, 4 + F) for these features; features without a coefficient get the default."""
        base = len(BASE_NAMES)
        mean = np.zeros(base + len(features))
        covariance = np.diag(np.concatenate([np.zeros(base), np.full(len(features), _COEFFICIENT_DEVIATION**2)]))
        here = [*range(base), *(base + features.index(name) for name in self.features if name in features)]
        there = [*range(base), *(base + place for place, name in enumerate(self.features) if name in features)]
        mean[here] = self.mean[there]
        covariance[np.ix_(here, here)] = self.covariance[np.ix_(there, there)]
        return mean, covariance

    def digest(self) -> str:
        """Returns a hash of the numbers, 16 hexadecimal digits."""
        numbers = (self.mean, self.covariance, np.array(self.log_spread), np.array(self.log_noise))
        return hashlib.sha256(b"".join([repr(self.features).encode(), *(array.tobytes() for array in numbers)])).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes the two files of the prior into a new folder.

        Raises:
            OutputError: The folder exists or cannot be written.
        """
        described = {"format": FORMAT, "parameters": list(BASE_NAMES), "features": list(self.features), "made_from": self.made_from}
        with atomic_folder(folder) as partial:
            (partial / _NAMES).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            arrays = {
                "mean": self.mean,
                "covariance": self.covariance,
                "log_spread": np.array(self.log_spread),
                "log_noise": np.array(self.log_noise),
            }
            save_file(arrays, partial / _NUMBERS)


def default_prior() -> Prior:
    """Returns a prior without features: a total gain of about 0.1 nats, half of it at rank 8, both uncertain by a factor of a few."""
    return Prior((), np.array(_BASE_MEAN), np.diag(np.square(_BASE_DEVIATION)))


def load_prior(folder: Path) -> Prior:
    """Reads a prior from its two files.

    Raises:
        PlanError: A file is missing, damaged, or of another format.
    """
    try:
        described = read_object(folder / _NAMES, PlanError)
        check_ordinary(folder / _NUMBERS, PlanError)
        arrays = load_file(folder / _NUMBERS)
        known = described["format"] == FORMAT and tuple(described["parameters"]) == BASE_NAMES
        features, made_from = tuple(described["features"]), dict(described["made_from"])
        mean, covariance = arrays["mean"], arrays["covariance"]
        (spread, spread_sd), (noise, noise_sd) = arrays["log_spread"].tolist(), arrays["log_noise"].tolist()
    except (PlanError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PlanError(f"prior '{folder}' cannot be read ({error}); train it again: regraft meta train STORE") from None
    if not known:
        raise PlanError(f"prior '{folder}' has another format than this version reads; train it again: regraft meta train STORE")
    size = len(BASE_NAMES) + len(features)
    if mean.shape != (size,) or covariance.shape != (size, size) or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise PlanError(f"prior '{folder}' is damaged: its numbers do not fit its names; train it again: regraft meta train STORE")
    return Prior(features, mean, covariance, (spread, spread_sd), (noise, noise_sd), made_from)


@cache
def shipped_prior() -> Prior:
    """Returns the prior that comes with the package, or the default prior without one."""
    return load_prior(SHIPPED) if (SHIPPED / _NAMES).is_file() else default_prior()
