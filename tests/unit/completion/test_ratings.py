"""Files of ratings: what is read from them, and what each bad line is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regraft.completion.ratings import Ratings, read_pairs, read_ratings, split_ratings
from regraft.errors import DataError, InputError

PLAIN = "userId,movieId,rating,timestamp\n7,100,4.0,964982703\n7,30,3.5,964981247\n2,100,5.0,964982224\n"


def written(folder: Path, text: str | bytes, name: str = "ratings.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def as_triplets(ratings: Ratings) -> list[tuple[int, int, float]]:
    users, items = ratings.user_ids[ratings.rows].tolist(), ratings.item_ids[ratings.columns].tolist()
    return list(zip(users, items, ratings.values.tolist(), strict=True))


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        "\ufeff" + PLAIN,
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "::"),
        PLAIN.split("\n", 1)[1],  # no line of names
        "\n" + PLAIN.split("\n", 1)[1] + "\n\n",
        "\n" + PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "|"),
        PLAIN.replace(",", " "),
        " 7   100 4.0\n7 30\t 3.5\n\n2 100 5\n".replace("\t", ""),
        "user-id;Item.ID;Book-Rating\n7;100;4.0\n7;30;3.5\n2;100;5.0\n",
        ",userId,movieId,rating\n0,7.0,100.0,4.0\n1,7.0,30.0,3.5\n2,2.0,100.0,5.0\n",  # a table with gaps, and its index
        "rating,user_id,Item ID\n4.0,7,100\n3.5,7,30\n5.0,2,100\n",
        '"userId","movieId","rating"\n"7","100","4.0"\n7, 30 ,3.5\n2,100,5\n',
    ],
)
def test_every_way_of_writing_ratings_is_read(tmp_path: Path, text: str) -> None:
    ratings = read_ratings(written(tmp_path, text))
    assert as_triplets(ratings) == [(7, 100, 4.0), (7, 30, 3.5), (2, 100, 5.0)]
    assert ratings.user_ids.tolist() == [2, 7]
    assert ratings.item_ids.tolist() == [30, 100]
    assert ratings.shape == (2, 2)
    assert ratings.values.dtype == torch.float64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no ratings"),
        ("userId,movieId,rating\n", "holds no ratings"),
        ("name,place,date\nann,here,now\n", r"line 1: no number, and none of the names 'name, place, date' is that of the user column"),
        ("userId,movieId,colour\n1,2,3\n", "that of the rating column; call it rating"),
        ("1,2,good\n", "line 1: rating 'good' is not a number"),
        ("1,2,3\n1,x,3\n", "line 2: item 'x' is not a whole number"),
        ("1,2,3\n1.5,2,3\n", "line 2: user '1.5' is not a whole number"),
        ("1,2,3\n1,nan,3\n", "line 2: item 'nan' is not a whole number"),
        ("1,2,3\n1,1e300,3\n", "line 2: item '1e300' is not a whole number"),
        ("1,2,3\n-4,2,3\n", "line 2: user -4 is out of range"),
        (f"1,2,3\n1,{2**63},3\n", f"line 2: item {2**63} is out of range; ids go from 0 to {2**63 - 1}"),
        ("1,2,3\n\n1,3,nan\n", "line 3: rating nan is not finite"),
        ("1,2,inf\n", "line 1: rating inf is not finite"),
        ("1,2,3\n1,3\n", "line 2: 2 fields, but user and item and rating need 3"),
        ("1,2,3\n1,3,\n", "line 2: rating '' is not a number"),
        ("5,8,3\n5,9,3\n5,8,2\n5,8,1\n", r"line 3: user 5 has rated item 8 already on line 1 \(2 repetitions in all\)"),
        (b"1,2,3\n\xff\xfe,3,4\n", "is not a text file"),
        (b"PK\x03\x04\x00\x00" + bytes(range(128, 256)), "is not a text file|no number"),
    ],
)
def test_bad_files_are_told_where_and_why(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as refusal:
        read_ratings(written(tmp_path, text))
    assert "\n" not in str(refusal.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        read_ratings(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_ratings(tmp_path)


def test_duplicates_are_averaged_or_the_last_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, "5,8,3\n5,9,4\n5,8,2\n1,8,5\n5,8,1\n")
    assert as_triplets(read_ratings(path, "mean")) == [(5, 8, 2.0), (5, 9, 4.0), (1, 8, 5.0)]
    assert as_triplets(read_ratings(path, "last")) == [(5, 8, 1.0), (5, 9, 4.0), (1, 8, 5.0)]


def test_pairs_need_no_rating(tmp_path: Path) -> None:
    pairs = read_pairs(written(tmp_path, "movieId,userId\n3,1\n4,2\n"))
    assert pairs.users.tolist() == [1, 2]
    assert pairs.items.tolist() == [3, 4]
    with pytest.raises(DataError, match="line 2: 1 field, but user and item need 2"):
        read_pairs(written(tmp_path, "1,3\n4\n"))
    with pytest.raises(DataError, match="holds no pairs"):
        read_pairs(written(tmp_path, ""))


def many(tmp_path: Path) -> Ratings:
    lines = [f"{user},{item},{(user * item) % 5 + 1}" for user in range(20) for item in range(10)]
    return read_ratings(written(tmp_path, "\n".join(lines)))


def test_a_split_parts_the_ratings_by_its_seed(tmp_path: Path) -> None:
    ratings = many(tmp_path)
    known, held = split_ratings(ratings, 0.1, seed=3)
    assert len(held) == 20
    assert sorted(as_triplets(known) + as_triplets(held)) == sorted(as_triplets(ratings))
    assert known.shape == held.shape == ratings.shape
    again, other = split_ratings(ratings, 0.1, seed=3)[1], split_ratings(ratings, 0.1, seed=4)[1]
    assert as_triplets(again) == as_triplets(held)
    assert as_triplets(other) != as_triplets(held)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(InputError, match="is not between 0 and 1"):
        split_ratings(many(tmp_path), share, 0)


def test_one_rating_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 1 rating, which cannot be split"):
        split_ratings(read_ratings(written(tmp_path, "1,2,3\n")), 0.5, 0)


def test_a_widened_table_keeps_its_ratings(tmp_path: Path) -> None:
    ratings = read_ratings(written(tmp_path, PLAIN))
    wider = ratings.widened(torch.tensor([1, 7, 90]), torch.tensor([60]))
    assert wider.user_ids.tolist() == [1, 2, 7, 90]
    assert wider.item_ids.tolist() == [30, 60, 100]
    assert as_triplets(wider) == as_triplets(ratings)
