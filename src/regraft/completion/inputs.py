"""Conversion of an estimator's inputs: lists, arrays, tensors, matrices with NaN, sparse matrices, seeds and devices."""

# scikit-learn and NumPy's bridge to torch carry no types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from sklearn.utils import check_random_state
from torch import Tensor

from regraft.errors import DataError, InputError

Numbers = npt.NDArray[np.float64]

LARGEST, SMALLEST = 1e140, 1e-140
"""Limits for the magnitude of the largest value: sums of squares overflow above the one and vanish below the other."""


def as_entries(
    rows: Any, columns: Any, values: Any, shape: tuple[int, int] | None
) -> tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], Numbers, tuple[int, int]]:
    """Reads triplets, a matrix with NaN, or a sparse matrix; returns (rows, columns), values and the shape."""
    if (columns is None) != (values is None):
        raise InputError("rows, columns and values belong together; give all three, or one matrix with NaN where nothing is known")
    if columns is None:
        rows, columns, values, shape = _from_matrix(rows, shape)
    i, j, numbers = as_indices(rows, "row"), as_indices(columns, "column"), as_values(values)
    sizes = (i.size, j.size, numbers.size)
    if len(set(sizes)) != 1:
        raise DataError(f"rows, columns and values have {sizes[0]}, {sizes[1]} and {sizes[2]} entries; give as many of each")
    if not i.size:
        raise DataError("there are no known entries; give at least one")
    for indices, name in ((i, "row"), (j, "column")):
        if indices.min() < 0:
            raise DataError(f"{name} {indices.min()} is out of range: {name}s are numbered from 0; mend it")
    _check_size(numbers)
    return (i, j), numbers, _as_shape(shape) if shape is not None else (int(i.max()) + 1, int(j.max()) + 1)


def _check_size(values: Numbers) -> None:
    """Refuses values whose squares float64 cannot hold. ``EntryList`` refuses values that are not finite, with their position."""
    largest = float(np.abs(values).max())
    if np.isfinite(largest) and largest != 0 and not SMALLEST <= largest <= LARGEST:
        raise DataError(
            f"the largest value is of size {largest:.3g}, not between {SMALLEST:g} and {LARGEST:g}; give values in another unit"
        )


def _from_matrix(matrix: Any, shape: tuple[int, int] | None) -> tuple[Any, Any, Any, tuple[int, int]]:
    if sparse.issparse(matrix):
        listed: Any = matrix.tocoo()
        return listed.row, listed.col, listed.data, shape or listed.shape
    dense = _as_array(matrix, "matrix")
    if dense.ndim != 2:
        raise InputError(f"a matrix alone must be two-dimensional, not {dense.ndim}-dimensional; give rows, columns and values, or one")
    i, j = np.nonzero(~np.isnan(dense.astype(np.float64)))
    return i, j, dense[i, j], shape or (dense.shape[0], dense.shape[1])


def _as_array(given: Any, name: str) -> npt.NDArray[Any]:
    if isinstance(given, Tensor):
        given = (given.detach().double() if given.is_floating_point() else given.detach()).cpu().numpy()  # NumPy has no bfloat16
    array = np.asarray(given)
    if array.dtype.kind not in "iufb":
        raise DataError(f"the {name}s are not numbers ({array.dtype}); give numbers")
    return array


def as_indices(given: Any, name: str) -> npt.NDArray[np.int64]:
    """Returns a flat list of whole numbers, or refuses it."""
    array = np.atleast_1d(_as_array(given, name))
    if array.ndim != 1:
        raise DataError(f"the {name}s have {array.ndim} dimensions; give a flat list")
    if array.dtype.kind == "f":
        wrong = np.nonzero(array != np.floor(array))[0]  # NaN is not equal to itself: it is wrong too
        if wrong.size:
            raise DataError(f"{name} {array[wrong[0]]} (entry {wrong[0]}) is not a whole number; give indices from 0")
    return array.astype(np.int64)


def as_values(given: Any) -> Numbers:
    """Returns a flat list of numbers as float64, or refuses it."""
    array = np.atleast_1d(_as_array(given, "value")).astype(np.float64)
    if array.ndim != 1:
        raise DataError(f"the values have {array.ndim} dimensions; give a flat list")
    return array


def _as_shape(shape: Any) -> tuple[int, int]:
    sides = np.asarray(shape)
    if sides.shape != (2,) or sides.dtype.kind not in "iu" or bool((sides < 1).any()):
        raise InputError(f"shape {shape!r} is not two whole numbers of at least 1; give (rows, columns)")
    return int(sides[0]), int(sides[1])


def check_range(indices: npt.NDArray[np.int64], name: str, size: int) -> None:
    """Refuses an index that is negative or not below the size."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        worst = int(indices.min()) if indices.min() < 0 else int(indices.max())
        raise DataError(f"{name} {worst} is out of range: the matrix has {name}s 0 to {size - 1}; predict within these")


def as_seed(random_state: Any) -> int:
    """Returns a seed: from a scikit-learn random state, or drawn from a NumPy generator."""
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31 - 1))
    try:
        return int(check_random_state(random_state).randint(2**31 - 1))
    except ValueError:
        raise InputError(f"random_state {random_state!r} is not a seed; give a whole number from 0 to {2**32 - 1}, or None") from None


def as_device(name: str) -> torch.device:
    """Returns the torch device of that name, or refuses one that this machine does not have."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device '{name}' is not known; give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device '{name}' is not supported; give cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        seen = f"{count} CUDA devices; use cpu or cuda" if count else "no CUDA device; use cpu"
        raise InputError(f"device '{name}' is not there: torch sees {seen}")
    return device
