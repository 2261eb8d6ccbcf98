"""CSV tables that a completion of ratings writes: predictions, requested pairs, recommendations."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.completion.inputs import Numbers
from regraft.completion.ratings import Pairs, Ratings

Predict = Callable[[Any, Any], Numbers]
"""A function from row and column indices to predicted values."""

SCORED_AT_ONCE = 2**21
"""Number of scores (users times items) held in memory at one time while recommending: about 16 MiB an array."""


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file with a header line."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_predictions(path: Path, held: Ratings, predicted: Tensor) -> None:
    """Writes held-out ratings with their predictions, which come from a fit that did not see them."""
    users, items = held.user_ids[held.rows].tolist(), held.item_ids[held.columns].tolist()
    fitted = (f"{value:.4f}" for value in predicted.tolist())
    given = (f"{value:g}" for value in held.values.tolist())
    write_rows(path, ("userId", "itemId", "rating", "prediction"), zip(users, items, given, fitted, strict=True))


def write_pairs(path: Path, pairs: Pairs, predicted: Tensor) -> None:
    """Writes the requested pairs, in their order, with their predictions."""
    shown = (f"{value:.4f}" for value in predicted.tolist())
    rows = zip(pairs.users.tolist(), pairs.items.tolist(), shown, strict=True)
    write_rows(path, ("userId", "itemId", "prediction"), rows)


def recommendations(predict: Predict, table: Ratings, count: int) -> Iterator[tuple[int, int, str]]:
    """Yields (user, item, prediction): for every user with a rating, the ``count`` best items not rated by that user, best first."""
    limits = float(table.values.min()), float(table.values.max())
    users, items = table.rows.unique(), table.columns.unique()
    order = torch.argsort(table.rows)
    rows_in_order = table.rows[order]
    at_once = max(1, SCORED_AT_ONCE // items.numel())
    for some in users.split(at_once):
        scores = predict(some.repeat_interleave(items.numel()), items.repeat(some.numel()))
        score = torch.from_numpy(scores).reshape(some.numel(), items.numel())
        bounds = torch.searchsorted(rows_in_order, torch.stack([some[0], some[-1] + 1]))
        rated = order[int(bounds[0]) : int(bounds[1])]
        score[torch.searchsorted(some, table.rows[rated]), torch.searchsorted(items, table.columns[rated])] = -torch.inf
        best, places = score.topk(min(count, items.numel()), dim=1)
        for user, values, columns in zip(some.tolist(), best.tolist(), places.tolist(), strict=True):
            for value, column in zip(values, columns, strict=True):
                if value > -math.inf:
                    shown = f"{min(max(value, limits[0]), limits[1]):.4f}"
                    yield int(table.user_ids[user]), int(table.item_ids[items[column]]), shown
