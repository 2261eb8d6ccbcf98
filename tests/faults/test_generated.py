"""Bad input of generated kinds, in one process: every reader answers each with one line, and never with anything else."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from transformers import TrainingArguments

from nasty import NASTY_TEXTS, NASTY_VALUES, leaves, one_line, with_leaf
from regraft.adapters.stock_files import read_stock_config
from regraft.allocation.meta import read_store, train
from regraft.allocation.prior import load_prior
from regraft.atomic import refuse_existing, refuse_special, sha256_of
from regraft.cli.compress import read_plan as compression_plan
from regraft.data.text import read_text
from regraft.errors import InputError, shown
from regraft.models.load import check_folder, locate
from regraft.models.provenance import read_provenance
from regraft.models.weights import read_header, stored_tensors
from regraft.pipelines.prune.plan_files import read_plan
from regraft.pipelines.run.recipe import read_recipe
from regraft.pipelines.run.strict_yaml import read_yaml
from regraft.search.storage import open_storage
from regraft.surgery.adapter_files import read_master
from regraft.training.distributed import in_surroundings
from regraft.training.job import read_ranks

PLAN = {
    "fingerprint": "f",
    "criterion": "l2",
    "selection": "uniform",
    "shape": "uniform",
    "ratio": 0.2,
    "align": 1,
    "parameters_before": 10,
    "parameters_after": 8,
    "cuts": [],
}
RANKS = {"fingerprint": "f", "method": "m", "ranks": {"model.layers.0.mlp.up_proj": 4}, "alpha_per_rank": 2.0}
RECORD = {"command": "", "source": "", "source_fingerprint": "", "seed": 0, "versions": {}, "files": {}}
STOCK = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 2,
    "target_modules": ["q_proj"],
    "lora_alpha": 4,
    "rank_pattern": {"q": 3},
}
MASTER = {
    "format": "regraft adapter",
    "version": 1,
    "method": "nola",
    "base": "b",
    "base_fingerprint": "f",
    "options": {},
    "sha256": "0",
    "modules": {},
}
RECIPE = "model: seedling\nprune:\n  ratio: 0.2\n"


def changed(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields an object with each entry left out, and with each entry replaced by each nasty value."""
    for key in value:
        yield {name: entry for name, entry in value.items() if name != key}
        for nasty in NASTY_VALUES:
            yield value | {key: nasty}


def texts(value: dict[str, Any]) -> Iterator[bytes]:
    """Yields files: of changed objects, and what is no such object at all."""
    yield from (json.dumps(one).encode("utf-8", "surrogatepass") for one in changed(value))
    whole = json.dumps(value).encode()
    yield from (b"", b"[]", b"3", b"null", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 10, b"9" * 5000)
    yield from (whole[: len(whole) // 2], whole + b"x", b"\xef\xbb\xbf" + whole, whole.replace(b"{", b"[", 1))


READERS: dict[str, tuple[str, dict[str, Any], Callable[[Path], object]]] = {
    "plan": ("plan.json", PLAN, read_plan),
    "ranks": ("ranks.json", RANKS, read_ranks),
    "record": ("regraft.json", RECORD, lambda path: read_provenance(path.parent)),
    "record as plan": ("regraft.json", RECORD, read_plan),
    "stock adapter": ("adapter_config.json", STOCK, lambda path: read_stock_config(path.parent)),
    "own adapter": ("adapter.json", MASTER, lambda path: read_master(path.parent)),
    "past search": ("search.json", {"fingerprint": "f", "trials": [], "space": {}}, lambda path: read_store(path.parent)),
    "index": ("model.safetensors.index.json", {"weight_map": {"a": "a.safetensors"}}, lambda path: stored_tensors(path.parent)),
    "config": ("config.json", {"model_type": "llama", "num_hidden_layers": 2}, lambda path: check_folder(path.parent)),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_json_that_is_read(tmp_path: Path, reader: str) -> None:
    name, value, read = READERS[reader]
    count = 0
    for text in texts(value):
        (tmp_path / name).write_bytes(text)
        one_line(lambda: read(tmp_path / name), text[:200])
        count += 1
    assert count > 20


def digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except (OSError, ValueError) as error:  # whose callers say what they wanted the file for
        raise InputError("cannot be read") from error


def a_past_search(first: float) -> dict[str, Any]:
    slots = [{"name": f"layers.{i}", "modules": [f"m.{i}"], "layer": i, "parameters_per_rank": 4 + i, "limit": 9} for i in range(2)]
    for slot in slots:
        slot["features"] = {"share_pruned": 0.2}
    ranks = [[1, 2], [2, 1], [2, 2], [1, 1], [3, 1], [1, 3]]
    trials = [
        {"ranks": pair, "loss_nats": first + 0.01 * pair[0], "fidelity": 1.0, "cost": 1.0, "kind": "recovery", "seed": 0, "note": ""}
        for pair in ranks
    ]
    space = {"fingerprint": "f", "granularity": "layer", "slots": slots, "choices": [1, 2, 3], "budget": 40, "uniform": 2}
    allocate = {"method": "rankadaptor", "budget": "r=2", "ranks": [1, 2, 3], "trials": 6, "samples": 2, "prior": "none"}
    recover = {"task": "language", "adapter": "lora", "lr": None, "steps": 8, "batch": 1, "seq_len": 16, "packing": False}
    settings = {"model": "f", "allocate": allocate, "recover": recover, "held_out": 0.05, "teacher": None, "data": "d", "seed": 0}
    return {"space": space, "trials": trials, "model": "m", "parameters": 400, "ratio": 0.2, "settings": settings}


@pytest.mark.long
def test_every_leaf_of_a_past_search(tmp_path: Path) -> None:
    whole = a_past_search(2.0)
    others = read_one(tmp_path, a_past_search(3.0))
    assert read_one(tmp_path, whole)[0].settings["recover"]["steps"] == 8
    learned_from = count = 0
    for way in leaves(whole):
        for nasty in NASTY_VALUES:
            found: list[Any] = []
            changed_search = with_leaf(whole, way, nasty)
            one_line(lambda value=changed_search, into=found: into.extend(read_one(tmp_path, value)), (way, nasty))
            if found and count % 97 == 0:
                one_line(lambda found=found: train((*others, *found)), (way, nasty))
                learned_from += 1
            count += 1
    assert count > 1000
    assert learned_from > 3


def read_one(folder: Path, search: dict[str, Any]) -> tuple[Any, ...]:
    (folder / "search.json").write_bytes(json.dumps(search).encode("utf-8", "surrogatepass"))
    return read_store(folder)


def kinds_of_path(folder: Path) -> Iterator[Path]:
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "zero").symlink_to("/dev/zero")
    for name in ("missing", "folder", "pipe", "loop", "zero", "file/below", "n" * 300, "a\0b", "\udcff", "a/" * 3000, *NASTY_TEXTS):
        yield folder / name
        yield folder / f"{name}.json"
        yield folder / f"{name}.txt"


@pytest.mark.parametrize(
    "read",
    [
        read_plan,
        read_ranks,
        locate,
        read_text,
        lambda path: read_recipe(str(path)),
        read_header,
        refuse_existing,
        refuse_special,
        read_store,
        load_prior,
        compression_plan,
        digest,
    ],
    ids=["plan", "ranks", "model", "text", "recipe", "weights", "output", "output file", "store", "prior", "compression plan", "digest"],
)
def test_every_kind_of_path(tmp_path: Path, read: Callable[[Path], object]) -> None:
    for path in kinds_of_path(tmp_path):
        one_line(lambda path=path: read(path), path)


def nested(kind: str, levels: int) -> str:
    """A document of a few lines that stands for 10**levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]" if kind == "list" else "a0: &a0 {k: v}"]
    for level in range(1, levels):
        before = f"*a{level - 1}"
        entry = f"[{', '.join([before] * 10)}]" if kind == "list" else "{" + ", ".join(f"k{i}: {before}" for i in range(10)) + "}"
        lines.append(f"a{level}: &a{level} {entry}")
    return "\n".join(lines)


YAML = [
    *(nested(kind, levels) for kind in ("list", "mapping") for levels in (5, 9, 12)),
    *(f"model: !!{tag} x" for tag in ("timestamp", "binary", "set", "omap", "pairs", "python/object:os.system", "int", "float")),
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "1: 2\ntrue: 3\nnull: 4",
    "[" * 2000,
    "a: " * 2000,
    "- " * 2000,
    "a: &a [*a]",
    "a: &a {b: *a}",
    "<<: *a",
    "a: &a {b: 1}\n<<: [*a, *a]",
    "\x1b[31m: 1",
    "model: \x07",
    "model: " + "9" * 5000,
    "seed: 1e999",
    "seed: .nan",
    "%YAML 9.9\n---\na: 1",
    "---\na: 1\n---\nb: 2",
    "\ufeffa: 1",
    "\tx: 1",
    "a: 'b",
]


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_every_yaml(tmp_path: Path, text: str) -> None:
    one_line(lambda: read_yaml(text, "recipe.yaml"), text[:100])
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    one_line(lambda: read_recipe(str(path)), text[:100])
    path.write_text(RECIPE + text, encoding="utf-8", errors="surrogatepass")
    one_line(lambda: read_recipe(str(path)), text[:100])


@pytest.mark.parametrize("key", ["prune.ratio", "prune.samples", "prune.seq_len", "prune.calibration", "seed", "model", "evaluate.window"])
def test_every_override(tmp_path: Path, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    for value in (
        "",
        "x",
        "-1",
        "0",
        "1e999",
        ".inf",
        ".nan",
        "9" * 400,
        "[1]",
        "{a: 1}",
        "null",
        "true",
        "a\0b",
        "\x1b[31m",
        "!!set x",
        "&a [*a]",
    ):
        one_line(lambda value=value: read_recipe(str(path), [f"{key}={value}"]), (key, value[:50]))


URLS = [
    "",
    "x",
    "sqlite",
    "mysql+pymysql://127.0.0.1/x",
    "oracle://x",
    "mssql://x",
    "postgresql+asyncpg://127.0.0.1:1/x",
    "sqlite+aiosqlite:///x.db",
    "postgresql://127.0.0.1:abc/x",
    "postgresql://127.0.0.1:99999999/x",
    "sqlite:///f.db?timeout=abc",
    "sqlite:///f.db?mode=ro",
    "sqlite:///" + "d" * 300,
    "sqlite:///missing/x.db",
    "sqlite:///a\0b",
    "\x1b[31m://x",
    "nosuch://x",
    "http://x",
    "sqlite:////dev/zero",
]


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_every_storage(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(lambda: open_storage(url, tmp_path).close(), url[:80])


SURROUNDINGS = [
    {"LOCAL_RANK": "99"},
    {"ACCELERATE_USE_FSDP": "x"},
    {"ACCELERATE_USE_CPU": "zz"},
    {"ACCELERATE_MIXED_PRECISION": "\x1b[31m"},
    {"LOCAL_RANK": "0", "MASTER_PORT": "x", "ACCELERATE_USE_DEEPSPEED": "perhaps"},
]


@pytest.mark.parametrize("variables", SURROUNDINGS, ids=lambda variables: " ".join(variables))
def test_what_a_launcher_left_behind(variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    PartialState._reset_state()
    try:
        one_line(lambda: in_surroundings(TrainingArguments, output_dir=str(tmp_path), use_cpu=True).device, variables)
    finally:
        PartialState._reset_state()


def test_headers_of_every_kind(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    path = tmp_path / "model.safetensors"
    for one in changed(entry):
        header = json.dumps({"w": one}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
        one_line(lambda: read_header(path), one)
    draw = random.Random(3)
    header = json.dumps({"w": entry}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(24)
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        path.write_bytes(bytes(raw[: draw.randint(0, len(raw))]))
        one_line(lambda: read_header(path), bytes(raw))


def test_whatever_is_shown_is_one_harmless_line() -> None:
    draw = random.Random(7)
    alphabet = "ab '[/]\n\r\t\x00\x07\x1b\x7f\x85\x9b\u2028\u202e\u200b\ud800é漢🙂"
    for length in (0, 1, 10, 299, 300, 301, 5000):
        for _ in range(50):
            text = shown("".join(draw.choice(alphabet) for _ in range(length)))
            assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
            assert len(text) <= 300 * 6


def test_there_are_more_than_a_thousand_inputs() -> None:
    objects = sum(len(list(texts(value))) for _, value, _ in READERS.values())
    paths = 12 * 3 * (10 + len(NASTY_TEXTS))
    assert objects + paths + 3 * len(YAML) + 7 * 16 + len(URLS) + 300 > 1000
    assert len(list(itertools.islice(changed(PLAN), 10))) == 10
