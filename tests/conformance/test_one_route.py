"""A recipe and the same steps by single commands write the same weights and the same records, byte by byte.

Every recipe that comes with regraft is run in a shrunken form: on a random model of three layers, with few and short windows, a few
steps, a closed form for the ranks. The commands get every setting of the recipe as an option. Two things differ by nature and are put
aside: how the folder was called for (``command``), and the path of the model before, of which the last part is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from folders import tiny_tokenizer
from regraft.cli.app import run
from regraft.models.folder import FOUND_AT
from regraft.pipelines.run.recipe import Recipe, read_recipe, shipped_recipes
from regraft.settings import Settings

TEXT = "\n\n".join(f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(60))
SHRUNK = (
    "model=tiny",
    "prune.calibration=text.txt",
    "prune.align=2",
    "recover.data=text.txt",
    "recover.held_out=0.2",
    "evaluate.text=text.txt",
    "compress.calibration=text.txt",
    "compress.samples=12",
    "compress.seq_len=24",
    "compress.ratio=0.2",
    "compress.trials=2",
    "compress.fade_steps=2",
    "compress.fade_batch=2",
    "prune.samples=4",
    "prune.seq_len=24",
    "recover.steps=4",
    "recover.batch=2",
    "recover.seq_len=24",
    "recover.eval_every=2",
    "recover.held_out_windows=4",
    "recover.quiet=true",
    "evaluate.window=32",
    "evaluate.max_tokens=200",
    "evaluate.speed=false",
    "tasks.tasks=[continuation]",
    "tasks.texts=[text.txt]",
    "tasks.windows=[24]",
    "tasks.limit=4",
    "load.device=cpu",
    "load.dtype=float32",
)
# A search measures recoveries, which takes minutes; a closed form goes through the same stage.
CLOSED_FORM = ("allocate.method=proportional", "allocate.cost=auto", "allocate.samples=2", "allocate.budget=2600", "allocate.ranks=[1, 2]")


def changes(recipe: Recipe) -> list[str]:
    """The overrides that make a recipe small; sections that it leaves out stay out."""
    wanted = [*SHRUNK, *(CLOSED_FORM if recipe.allocate is not None else ())]
    if recipe.recover is not None and recipe.allocate is not None:
        wanted.append("recover.alpha=null")
    if recipe.recover is not None and recipe.compress is not None:
        wanted.append("recover.rank=2")  # factors of a tiny model are thin
    present = {
        name for name in ("prune", "compress", "allocate", "recover", "evaluate", "tasks", "load") if getattr(recipe, name) is not None
    }
    return [change for change in wanted if change.split(".")[0] in present or change.startswith("model=")]


def options(section: Settings, *without: str) -> list[str]:
    """Every setting of a section as the options of a command."""
    found: list[str] = []
    for name, field in type(section).model_fields.items():
        value, flag = getattr(section, name), f"--{name.replace('_', '-')}"
        if name in without or value is None or value == ():
            continue
        if field.annotation is bool:
            on = f"--no-{flag[2:]}" if field.default and not value else flag
            found += [on] if value or field.default else []
        else:
            found += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return found


def models(recipe: Recipe) -> dict[str, str]:
    """The models of a recipe: label to the folder that the commands write, and the run too unless it is the first."""
    made = {"dense": recipe.model}
    if recipe.prune is not None:
        made["pruned"] = "pruned"
    if recipe.compress is not None:
        made["compressed"] = "compressed" if recipe.recover is not None else "model"
    if recipe.recover is not None:
        made["recovered"] = "model"
    return made


def steps(recipe: Recipe) -> list[list[str]]:
    """The commands that do what a recipe does; the models are called as in the run."""
    load, seed = options(recipe.load), ["--seed", str(recipe.seed)]
    made: list[list[str]] = []
    named, before = models(recipe), recipe.model
    if recipe.prune is not None:
        made.append(["prune", before, *options(recipe.prune), *load, *seed, "--output", "pruned"])
        before = "pruned"
    if recipe.compress is not None:
        made.append(["compress", before, *options(recipe.compress), *load, *seed, "--output", named["compressed"]])
        before = named["compressed"]
    ranks: list[str] = []
    if recipe.allocate is not None:
        assert recipe.recover is not None
        shared = (
            "merge",
            "quiet",
            "report_to",
            "targets",
            "rank",
            "ranks",
            "rank_pattern",
            "alpha",
            "adapter_options",
            "task",
            "patience",
            "load_in_4bit",
            "lr_sweep",
        )
        recovery = options(recipe.recover, *shared, "distill_hidden", "teacher_top_k", "gradient_checkpointing", "text_columns")
        made.append(["allocate", before, *options(recipe.allocate), *recovery, *load, *seed, "--output", "ranks.json"])
        ranks = ["--ranks", "ranks.json"]
    if recipe.recover is not None:
        made.append(["recover", before, *options(recipe.recover, "ranks"), *ranks, *load, *seed, "--output", "model"])
    made += [["evaluate", model, *options(recipe.evaluate), *load, *seed, "--json", f"{model}.json"] for model in named.values()]
    if recipe.tasks is not None:
        asked = [*options(recipe.tasks), *options(recipe.evaluate)]
        made += [["evaluate", model, *asked, *load, *seed, "--json", f"{model} on tasks.json"] for model in named.values()]
    return made


def call(*arguments: str) -> None:
    assert run([*arguments]) == 0, arguments


def record(folder: Path) -> dict[str, Any]:
    """A folder's record without how it was called for; of the models before, the last part of the path."""

    def comparable(values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if key != "command"}
        settings = {key: value for key, value in kept["settings"].items() if key != FOUND_AT}  # paths as seen from the folder
        return kept | {
            "settings": settings,
            "source": Path(kept["source"]).name,
            "parents": [comparable(parent) for parent in kept.get("parents", ())],
        }

    return comparable(json.loads((folder / "regraft.json").read_text(encoding="utf-8")))


def as_plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_recipe_and_its_steps_by_commands_agree(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., PreTrainedModel]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model("llama").save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    overrides = changes(read_recipe(name))
    recipe = read_recipe(name, overrides)
    call("run", name, *overrides, "--output", "run")
    for arguments in steps(recipe):
        call(*arguments)
    whole = tmp_path / "run"
    for folder in list(models(recipe).values())[1:]:
        ours, theirs = whole / folder, tmp_path / folder
        weights = sorted(path.name for path in theirs.glob("*.safetensors"))
        assert weights
        for file in (*weights, "config.json", "tokenizer.json"):
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), f"{folder}/{file}"
        assert as_plain(record(ours)) == as_plain(record(theirs)), folder
        assert '"auto"' not in as_plain(record(theirs)["settings"].get("prune", {})), "something is left to be decided"
    if recipe.allocate is not None:
        assert (whole / "ranks" / "ranks.json").read_bytes() == (tmp_path / "ranks.json").read_bytes()
    results = json.loads((whole / "results.json").read_text(encoding="utf-8"))
    for label, model in models(recipe).items():
        measured = json.loads((tmp_path / f"{model}.json").read_text(encoding="utf-8"))
        assert all(results[label][key] == value for key, value in measured.items() if key != "model"), label
        if recipe.tasks is not None:
            scored = json.loads((whole / "tasks" / label / "tasks.json").read_text(encoding="utf-8"))
            by_command = json.loads((tmp_path / f"{model} on tasks.json").read_text(encoding="utf-8"))
            assert scored["scores"]
            assert all(by_command[key] == value for key, value in scored.items() if key != "label"), label
