"""Damaged files of every kind that is read: bytes changed, cut and doubled at drawn places; each is read, or refused in one line."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from folders import tiny_tokenizer
from nasty import NASTY_VALUES, leaves, one_line, with_leaf
from regraft.completion.ratings import read_ratings
from regraft.data.labelled import read_labelled
from regraft.data.text import read_corpus
from regraft.models.gguf_header import read_gguf_header
from regraft.models.tokenizer import load_tokenizer
from regraft.models.weights import read_header, read_tensors
from regraft.pipelines.prune.plan_files import read_plan
from regraft.pipelines.run.recipe import read_recipe

DRAWS = 150  # of damaged bytes for each kind
LEAVES = 120  # of tokenizers with one value changed


def _gguf() -> bytes:
    """Returns the smallest file of its kind: two values of two types, a list, and a tensor."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    values = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    values += text(b"llama.block_count") + struct.pack("<II", 4, 2)
    values += text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")
    tensor = text(b"output.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 3) + values + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


def _safetensors(folder: Path) -> bytes:
    save_file({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


CUT = {"fingerprint": "f", "criterion": "l2", "selection": "uniform", "shape": "uniform", "ratio": 0.2, "align": 1}
PLAN = CUT | {"parameters_before": 10, "parameters_after": 8, "cuts": [{"group": "layers.0.ffn", "kept": [0, 2]}]}
RECIPE = "model: seedling\nprune:\n  ratio: 0.2\nrecover: {steps: 3}\n"
ROWS = [
    {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
    {"messages": [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Ho"}]},
    {"text": "a"},
]
KINDS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], object]]] = {
    "weights' header": ("w.safetensors", _safetensors, read_header),
    "weights": ("w.safetensors", _safetensors, read_tensors),
    "gguf": ("m.gguf", lambda _: _gguf(), read_gguf_header),
    "text": ("t.txt", lambda _: "One é.\r\n<|endoftext|>Two 🙂\n".encode(), lambda path: read_corpus(path, "test")),
    "rows": ("t.jsonl", lambda _: "\n".join(map(json.dumps, ROWS[:1] * 3)).encode(), lambda path: read_corpus(path, "test")),
    "array": ("t.json", lambda _: json.dumps(ROWS[1:2] * 2).encode(), lambda path: read_corpus(path, "test")),
    "table": ("t.csv", lambda _: b'text,more\n"a ""b"", c",1\nd,2\n', lambda path: read_corpus(path, "test")),
    "ratings": ("r.csv", lambda _: b"user,item,rating\n1,2,3.5\n2,2,1\n3,1,5\n", read_ratings),
    "labelled": ("l.csv", lambda _: b"text,label\nquite good,1\nbad,0\nfine,1\n", lambda path: read_labelled(path, "classification")),
    "plan": ("p.json", lambda _: json.dumps(PLAN).encode(), read_plan),
    "recipe": ("r.yaml", lambda _: RECIPE.encode(), read_recipe),
}


def damaged(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yields a file with bytes changed, cut off, left out, doubled, or replaced by what readers stumble over."""
    draw = random.Random(seed)
    pieces = (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"{", b"[", b"-1", b"1e999", b"NaN", b"\n", b"\r", b"\x1b[31m", b"\xff" * 8)
    for _ in range(count):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(raw) + 1)
            match draw.randrange(5):
                case 0:
                    raw[at : at + 1] = bytes([draw.randrange(256)])
                case 1:
                    del raw[at:]
                case 2:
                    del raw[at : at + draw.randint(1, 9)]
                case 3:
                    raw[at:at] = raw[max(0, at - draw.randint(1, 40)) : at]
                case _:
                    raw[at:at] = draw.choice(pieces)
        yield bytes(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes(tmp_path: Path, kind: str) -> None:
    name, make, read = KINDS[kind]
    whole = make(tmp_path)
    path = tmp_path / name
    path.write_bytes(whole)
    read(path)  # the control: what is whole is read
    for raw in damaged(whole, DRAWS, len(kind)):
        path.write_bytes(raw)
        one_line(lambda: read(path), raw[:300])


@pytest.mark.slow
def test_tokenizers_with_one_value_changed(tmp_path: Path) -> None:
    """Also where the library behind it panics, which is no exception of Python's usual kind."""
    whole = tmp_path / "whole"
    tiny_tokenizer(40).save_pretrained(whole)
    draw = random.Random(5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        value = json.loads((whole / name).read_text(encoding="utf-8"))
        ways = list(leaves(value))
        for _ in range(LEAVES // 2):
            way = draw.choice(ways)
            leaf: Any = draw.choice(NASTY_VALUES)
            folder = tmp_path / "folder"
            shutil.copytree(whole, folder)
            (folder / name).write_text(json.dumps(with_leaf(value, way[: draw.randint(1, len(way))], leaf)), encoding="utf-8")
            one_line(lambda folder=folder: load_tokenizer(folder, 97, trust_remote_code=False), (name, way, leaf))
            shutil.rmtree(folder)
