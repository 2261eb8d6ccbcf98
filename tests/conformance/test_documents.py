"""Every block of Python and shell of the documentation runs, in the order of its page, in a folder of its own.

Commands run as they stand, with settings appended that make them short (:data:`SHORT`; the last of an option counts), and with a model of
three layers in the place of ``seedling`` and of the names in capitals. Blocks of Python run on one page as one program, with the
replacements of :data:`PYTHON`. A block that cannot run here has a mark in the line above it, ``<!-- not run: REASON -->``, and is reported
as skipped for that reason.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from regraft.allocation.fill import random_vectors
from regraft.allocation.meta import add_to_store
from regraft.cli.app import run
from regraft.plans import PastSearch
from regraft.testing.planted import World
from tiny_inputs import TEXT as WORDS
from tiny_inputs import make_inputs

ROOT = Path(__file__).parents[2]
# Every page under docs/ but those that are made from the code, which hold no blocks but lines of usage: tests/unit/test_docs.py has them.
MADE = ("docs/commands.md", "docs/methods/")
PAGES = [page for path in sorted((ROOT / "docs").rglob("*.md")) if not (page := path.relative_to(ROOT).as_posix()).startswith(MADE)]
PAGES += ["CONTRIBUTING.md", "README.md"]
SHELL = ("console", "sh", "bash", "shell")
OTHER = ("toml", "yaml", "json", "text", "csv")

TEXT = "--samples 4 --seq-len 16 --calibration text.txt"
STEPS = "--steps 2 --batch 2 --seq-len 16 --eval-every 2 --held-out 0.2"
SHORT = {
    "prune": f"{TEXT} --align 1",
    "compress": TEXT,
    "allocate": f"{STEPS} --data text.txt --samples 2 --trials 2 --elastic 0 --confirm-seeds 2",
    "recover": STEPS,
    "complete": "--rank 4",
    "export": "--no-check",
    "generate": "--tokens 8",
    "evaluate": "--text text.txt --window 16 --max-tokens 200",
    "run": "model=model prune.samples=4 prune.seq_len=16 prune.calibration=text.txt prune.align=1 recover.steps=2 recover.seq_len=16 "
    "recover.batch=2 recover.eval_every=2 recover.held_out=0.2 recover.data=text.txt evaluate.window=16 evaluate.max_tokens=200 "
    "evaluate.text=text.txt sample.tokens=4",
}
NAMES = {"seedling": "model", "MODEL": "model", "other": "model", "PRUNED": "pruned", "ENCODER": "encoder"}
PYTHON = {
    '"seedling"': '"model"',
    "samples=16": 'samples=2, seq_len=16, align=1, calibration=Path("text.txt")',
    "steps=20": 'steps=2, held_out=0.2, data=Path("text.txt")',
    "steps=10": 'steps=2, held_out=0.2, data=Path("text.txt")',
    "max_length=128": "max_length=16",
    "seq_len=128": "seq_len=16",
    "max_tokens=20_000": 'max_tokens=300, window=16, text=Path("text.txt")',
    "max_tokens=4000": 'max_tokens=300, window=16, text=Path("text.txt")',
    "calibration=texts": "calibration=texts, settings=regraft.CompressSettings(samples=4, seq_len=16)",
    "rank=10, depth=3": "rank=4, depth=3",
    '"MODEL"': '"model"',
    'criterion="taylor", memory': 'criterion="taylor", samples=2, seq_len=16, calibration=Path("text.txt"), memory',
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str

    def commands(self) -> list[str]:
        """Lines to run: of a console those with a prompt, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        chosen = [line.removeprefix("$ ") for line in lines if self.language != "console" or line.startswith("$ ")]
        return [line.partition(" #")[0].strip() for line in chosen if line.strip() and not line.startswith("#")]


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"(?:^ *<!-- not run: ([^\n]*?) -->\n)?^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text[: found.start(2)].count("\n") + 1, found[2], found[3], found[1] or "")


def is_shell(block: Block) -> bool:
    return block.language in SHELL or (not block.language and re.match(r"(\$ )?(regraft|make|pip|python) ", block.text) is not None)


def rated() -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of user and item, int64 (N, 2), and noisy ratings, float64 (N,): what has no exact completion is fitted in a second."""
    pairs = torch.cartesian_prod(torch.arange(40), torch.arange(30))
    pairs = pairs[pairs.sum(1) % 3 > 0]
    user, item = pairs.unbind(1)
    return pairs, (1 + (user * 7919 + item * 104729 + user * item * 31) % 997 % 5).double()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a text, models, a pruned one, adapters, tables."""
    work = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        make_inputs()
        shutil.copy("text.txt", "held-out.txt")
        tokenizer = AutoTokenizer.from_pretrained("model")
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)).save_pretrained("encoder")
        tokenizer.add_special_tokens({"pad_token": "</s>"})
        tokenizer.save_pretrained("encoder")
        pairs = "\n".join(f"the cat sat {n},two birds {n},{n % 5}" for n in range(60))
        Path("pairs.csv").write_text(f"sentence1,sentence2,score\n{pairs}\n", encoding="utf-8")
        rows = (json.dumps({"title": f"t{n}", "body": "birds" if n % 2 else "a cat", "topic": "ab"[n % 2]}) for n in range(60))
        Path("rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        pairs_rated, stars = rated()
        ratings = [f"{user},{item},{star:.0f}" for (user, item), star in zip(pairs_rated.tolist(), stars.tolist(), strict=True)]
        Path("ratings.csv").write_text("user,item,rating\n" + "\n".join(ratings) + "\n", encoding="utf-8")
        for seed in range(2):  # searches of other models, beside which a page keeps its own
            world = World(slots=3, seed=seed)
            vectors = [world.uniform, *random_vectors(world.space, 4, {world.uniform}, np.random.default_rng(seed))]
            add_to_store(Path("searches"), PastSearch(world.space, tuple(map(world.trial, vectors)), "planted", 1000, 0.2))
        made = "prune model --criterion l2 --ratio 0.2 --shape uniform --select uniform --reconstruct none --align 1 --output pruned"
        assert run(made.split()) == 0
        for name in ("first", "second"):
            kept = f"recover model --data text.txt --adapter deep_lora --rank 2 --no-merge {STEPS} --quiet --output {name}"
            assert run(kept.split()) == 0
    return work


def run_command(command: str) -> None:
    words = [NAMES.get(word, word) for word in shlex.split(command.replace("--rank 16", "--rank 2"))]  # the thin layers here are thinner
    assert words[0] == "regraft", command
    name = words[1]
    given = set(words)
    words += SHORT.get(name, "").split()
    if name == "recover" and "--data" not in given:
        words += ["--data", "text.txt"]
    if "--output" in words:
        output = Path(words[words.index("--output") + 1])
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
        shutil.rmtree(output.with_suffix(".search"), ignore_errors=True)
    assert run(words[1:]) == 0, f"{command}\nrun as: {' '.join(words)}"


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "page"
    shutil.copytree(prepared, work)
    monkeypatch.chdir(work)
    names: dict[str, Any] = {"Path": Path, "__name__": "page"}
    for block in blocks(page):
        if block.not_run:
            continue
        if is_shell(block):
            for command in block.commands():
                run_command(command)
        elif block.language == "python":
            names |= given_names(block)
            text = block.text
            for old, new in PYTHON.items():
                text = text.replace(old, new)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of PEFT about transformers
                exec(compile(text, f"{page}, block at line {block.line}", "exec"), names)


def given_names(block: Block) -> dict[str, Any]:
    """What a page calls by a plain name without saying where it comes from: a model, its tokenizer, the entries of a table."""
    names: dict[str, Any] = {}
    if re.search(r"\bmodel\b", block.text) and "model =" not in block.text:
        names |= {"model": AutoModelForCausalLM.from_pretrained("model"), "tokenizer": AutoTokenizer.from_pretrained("model")}
    if "rows, columns, values" in block.text:
        pairs, stars = rated()
        names |= {"rows": pairs[:, 0], "columns": pairs[:, 1], "values": stars, "users": 40, "items": 30}
    if re.search(r"\btexts\b", block.text):
        names["texts"] = WORDS.splitlines()
    return names


MARKED = [block for page in PAGES for block in blocks(page) if block.not_run]


@pytest.mark.parametrize("block", MARKED, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert len(block.not_run.split()) > 2, "a reason is a few words"
    pytest.skip(block.not_run)


def test_every_block_is_run_or_says_why_not() -> None:
    """The control: no block is passed over because of how it is written."""
    every = [block for page in PAGES for block in blocks(page)]
    for block in every:
        other = block.language in OTHER or not block.language
        assert block.not_run or is_shell(block) or block.language == "python" or other, (
            f"{block.page}:{block.line}: ```{block.language} is run by nothing"
        )
        if not block.language and not is_shell(block):
            assert "regraft prune" not in block.text, f"{block.page}:{block.line}: a command in a block that is not run"
        assert block.not_run or "not run" not in block.text, f"{block.page}:{block.line}: the mark belongs in the line above the block"
    written = sum((ROOT / page).read_text(encoding="utf-8").count("<!-- not run: ") for page in PAGES)
    assert written == len(MARKED), "a mark stands directly above its block"
    assert sum(is_shell(block) and not block.not_run for block in every) >= 16
    assert sum(block.language == "python" and not block.not_run for block in every) >= 10
