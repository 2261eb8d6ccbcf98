"""Ratings: read from a MovieLens-style file, checked line by line, and split into known and held-out ones.

A file has one rating on each line: user, item, rating, and perhaps further fields such as a timestamp, which are ignored. The separator
is ``::``, a tab, a semicolon, a bar, a comma or blanks: the first of these that the first line contains. A header line may name the
columns; without one they are in the order above. The text is UTF-8.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from regraft.errors import DataError, InputError, shown
from regraft.reading import is_file, is_folder

Duplicates = Literal["refuse", "mean", "last"]

SEPARATORS = ("::", "\t", ";", "|", ",", " ")
NAMES = {
    "user": ("userid", "user", "uid", "row"),
    "item": ("movieid", "itemid", "item", "movie", "filmid", "film", "bookid", "productid", "iid", "column"),
    "rating": ("rating", "ratings", "bookrating", "score", "value", "stars"),
}
LARGEST_ID = 2**63 - 1
LARGEST_EXACT = 2**53
"""Largest whole number that a float holds exactly. Programs that allow gaps in a table write ids as floats, such as 7.0."""


@dataclass(frozen=True)
class Ratings:
    """Ratings of items by users, with users and items renumbered from 0.

    Attributes:
        source: The file.
        user_ids: m different ids, ascending (int64).
        item_ids: n different ids, ascending (int64).
        rows: Index of the user of each rating, in ``user_ids``.
        columns: Index of the item of each rating, in ``item_ids``.
        values: The ratings, float64.
    """

    source: str
    user_ids: Tensor
    item_ids: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(users, items)."""
        return self.user_ids.numel(), self.item_ids.numel()

    def __len__(self) -> int:
        return self.values.numel()

    def at(self, places: Tensor) -> Ratings:
        """Returns the ratings at these indices, in a table of the same users and items."""
        parts = (self.rows[places], self.columns[places], self.values[places])
        return Ratings(self.source, self.user_ids, self.item_ids, *parts)

    def widened(self, users: Tensor, items: Tensor) -> Ratings:
        """Returns the same ratings in a table with additional users and items.

        Args:
            users: User ids to add; ids that the table has already change nothing.
            items: Item ids to add, likewise.
        """
        user_ids, item_ids = torch.cat([self.user_ids, users]).unique(), torch.cat([self.item_ids, items]).unique()
        rows = torch.searchsorted(user_ids, self.user_ids)[self.rows]
        columns = torch.searchsorted(item_ids, self.item_ids)[self.columns]
        return Ratings(self.source, user_ids, item_ids, rows, columns, self.values)


class Pairs(NamedTuple):
    """Pairs of user id and item id whose rating is to be predicted."""

    users: Tensor
    items: Tensor


def read_ratings(path: Path | str, duplicates: Duplicates = "refuse") -> Ratings:
    """Reads ratings.

    Args:
        path: A file as the module describes it.
        duplicates: What happens when a user rated an item twice: refuse the file, take the mean, or keep the last.

    Returns:
        At least one rating, in the order of the file.

    Raises:
        DataError: The file is missing, empty or not text, a field is not a number, an id is out of range, or an item was rated twice
            by one user; the message names the line.
    """
    path = Path(path)
    users, items, values, lines = array("q"), array("q"), array("d"), array("q")
    for line, (user, item, rating) in _records(path, ("user", "item", "rating")):
        users.append(_identity(path, line, "user", user))
        items.append(_identity(path, line, "item", item))
        values.append(_rating(path, line, rating))
        lines.append(line)
    if not values:
        raise DataError(f"'{path}' holds no ratings; give lines of user, item and rating")
    user_ids, rows = torch.unique(_tensor(users), return_inverse=True)
    item_ids, columns = torch.unique(_tensor(items), return_inverse=True)
    ratings = Ratings(str(path), user_ids, item_ids, rows, columns, torch.frombuffer(values, dtype=torch.float64).clone())
    return _without_duplicates(ratings, lines, duplicates)


def read_pairs(path: Path | str) -> Pairs:
    """Reads pairs of user and item from a file like that of :func:`read_ratings`, with or without a column of ratings.

    Raises:
        DataError: As in :func:`read_ratings`.
    """
    path = Path(path)
    users, items = array("q"), array("q")
    for line, (user, item) in _records(path, ("user", "item")):
        users.append(_identity(path, line, "user", user))
        items.append(_identity(path, line, "item", item))
    if not users:
        raise DataError(f"'{path}' holds no pairs; give lines of user and item")
    return Pairs(_tensor(users), _tensor(items))


def split_ratings(ratings: Ratings, held_out: float, seed: int) -> tuple[Ratings, Ratings]:
    """Splits ratings at random into known and held-out ones. Both parts keep the numbering of all users and items.

    Args:
        ratings: At least two.
        held_out: Share to hold out, in (0, 1); rounded, and at least one rating goes to each side.
        seed: Seed of the draw.

    Raises:
        InputError: The share is out of range.
        DataError: There are too few ratings.
    """
    if not 0.0 < held_out < 1.0:
        raise InputError(f"held-out share {held_out:g} is not between 0 and 1; give one such as 0.1")
    if len(ratings) < 2:
        raise DataError(f"'{ratings.source}' holds {len(ratings)} rating, which cannot be split; give at least 2")
    order = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(held_out * len(ratings))), len(ratings) - 1)
    return ratings.at(order[count:]), ratings.at(order[:count])


def _records(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields (line, wanted fields) for every line that is not blank."""
    places: tuple[int, ...] | None = None
    for line, fields in _lines(path):
        if places is None:
            if _is_header(fields, len(wanted)):
                places = _places(path, fields, wanted)
                continue
            places = tuple(range(len(wanted)))
        if len(fields) <= max(places):
            raise DataError(
                f"'{path}', line {line}: {len(fields)} field{'s' if len(fields) != 1 else ''}, but {' and '.join(wanted)} "
                f"need {max(places) + 1}; mend the line"
            )
        yield line, tuple(fields[place].strip() for place in places)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the fields of every line that is not blank, with its number from 1."""
    if not is_file(path):
        raise DataError(f"'{shown(path)}' is {'a folder' if is_folder(path) else 'not there'}; give a CSV file of ratings")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = next((text.strip() for text in stream if text.strip()), "")
            separator = next((mark for mark in SEPARATORS if mark in first), ",")
            stream.seek(0)
            if separator in ("::", " "):  # more than one mark, or any number of them
                mark = separator.strip() or None
                split = ((number, text.strip().split(mark)) for number, text in enumerate(stream, start=1))
                yield from ((number, fields) for number, fields in split if any(field.strip() for field in fields))
            else:
                reader = csv.reader(stream, delimiter=separator)
                yield from ((reader.line_num, fields) for fields in reader if any(field.strip() for field in fields))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' is not a text file of ratings ({error}); give one in UTF-8") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}; give a file that can") from None


def _is_header(fields: list[str], least: int) -> bool:
    """Returns whether none of the fields that would be data is a number."""
    return not any(_is_number(field) for field in fields[:least])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _places(path: Path, header: list[str], wanted: tuple[str, ...]) -> tuple[int, ...]:
    """Finds the wanted columns by their names."""
    plain = ["".join(mark for mark in field.lower() if mark.isalnum()) for field in header]
    found: list[int] = []
    for name in wanted:
        place = next((plain.index(known) for known in NAMES[name] if known in plain), None)
        if place is None:
            raise DataError(
                f"'{path}', line 1: no number, and none of the names {', '.join(header)[:80]!r} is that of the {name} column; "
                f"call it {name if name == 'rating' else name + 'Id'}, or give numbers without a line of names"
            )
        found.append(place)
    return tuple(found)


def _identity(path: Path, line: int, name: str, text: str) -> int:
    try:
        number = int(text) if text.lstrip("+-").isdecimal() else _whole(text)
    except ValueError:
        raise DataError(f"'{path}', line {line}: {name} {text[:40]!r} is not a whole number; number the {name}s") from None
    if not 0 <= number <= LARGEST_ID:
        raise DataError(f"'{path}', line {line}: {name} {shown(text, 40)} is out of range; ids go from 0 to {LARGEST_ID}")
    return number


def _whole(text: str) -> int:
    """Returns a whole number that is written with a decimal point.

    Raises:
        ValueError: The text is not a whole number.
    """
    number = float(text)
    if not number.is_integer() or abs(number) > LARGEST_EXACT:
        raise ValueError(text)
    return int(number)


def _rating(path: Path, line: int, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise DataError(f"'{path}', line {line}: rating {text[:40]!r} is not a number; mend the line") from None
    if not math.isfinite(number):
        raise DataError(f"'{path}', line {line}: rating {text[:40]} is not finite; leave the line out")
    return number


def _tensor(numbers: array[int]) -> Tensor:
    return torch.frombuffer(numbers, dtype=torch.int64).clone()


def _without_duplicates(ratings: Ratings, lines: array[int], duplicates: Duplicates) -> Ratings:
    """Refuses, averages or drops repeated ratings. Pairs keep the order of their first line."""
    key = ratings.rows * ratings.shape[1] + ratings.columns
    different, group = torch.unique(key, return_inverse=True)
    if different.numel() == key.numel():
        return ratings
    place = torch.arange(key.numel())
    first = torch.full_like(different, key.numel()).scatter_reduce_(0, group, place, "amin")
    if duplicates == "refuse":
        again = int((first[group] != place).nonzero()[0])
        earlier = int(first[group[again]])
        raise DataError(
            f"'{ratings.source}', line {lines[again]}: user {int(ratings.user_ids[ratings.rows[again]])} has rated item "
            f"{int(ratings.item_ids[ratings.columns[again]])} already on line {lines[earlier]} "
            f"({key.numel() - different.numel()} repetitions in all); remove them, or choose mean or last for duplicates"
        )
    if duplicates == "mean":
        sums = torch.zeros(different.numel(), dtype=torch.float64).index_add_(0, group, ratings.values)
        values = sums / torch.bincount(group)
    else:
        last = torch.zeros_like(different).scatter_reduce_(0, group, place, "amax")
        values = ratings.values[last]
    order = first.argsort()
    kept = ratings.at(first[order])
    return Ratings(kept.source, kept.user_ids, kept.item_ids, kept.rows, kept.columns, values[order])
