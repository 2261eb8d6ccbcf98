"""How the situation of each handed input is made: ``../shared/cases/bad_inputs.jsonl`` names it, as in ``model/index one='…'``."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from folders import edit_header
from forked import Command, Forks

SHARED = Path(__file__).resolve().parents[2] / "shared"
STORIES = SHARED / "models" / "stories260K"
CASES = SHARED / "cases" / "bad_inputs.jsonl"
TEXT = "Once upon a time there was a little girl who had a red ball. She played in the garden with her dog. " * 40
RECIPE = f"""
model: {STORIES}
load: {{device: cpu, dtype: float32}}
prune: {{ratio: 0.2, criterion: l2}}
recover: {{data: SMALL.txt, rank: 2, steps: 2, batch: 1, seq_len: 32, eval_every: 1, quiet: true}}
evaluate: {{text: SMALL.txt, max_tokens: 200}}
sample: {{prompt: Once, tokens: 4}}
"""
_TRAIN = ["--batch", "1", "--seq-len", "32", "--held-out-windows", "1", "--quiet"]
_SEARCH = [
    *["--data", "SMALL.txt", "--steps", "4", "--batch", "1", "--seq-len", "32", "--held-out-windows", "1", "--samples", "1"],
    *["--trials", "4", "--elastic", "0"],
]
_SEARCH += ["--confirm-seeds", "0"]
_DEEP = "[" * 100_000
_LONG = "a" * 300
_ESCAPED = "\x1b[31m\nname"
_WHOLE_ARGUMENT = 400  # longer ones were cut where they were written down
_ANYTHING = 0o777


@dataclass(frozen=True)
class Handed:
    """One of the inputs.

    Attributes:
        name: Its name, whose first part is the command or the surroundings.
        arguments: What follows ``regraft``.
        problem: What went wrong when it was found.
    """

    name: str
    arguments: tuple[str, ...]
    problem: str

    @property
    def codes(self) -> set[int]:
        """The exit codes that are right."""
        if "not 0" in self.problem and "not 2" not in self.problem:
            return {0}
        only_refusal = re.search(r"\d, not 2|HANG|of another file|outside|replaced the device", self.problem) and not _FAIR.match(self.name)
        return {2} if only_refusal else {0, 2}


# Names of 250 bytes, which work now; slow but finite work, disks that are large enough today, and what is harmless where it is ignored.
_FAIR = re.compile(
    r".*(long$|nnn.*25\d)|env/|disk 16k|allocate/ranks='4'|allocate/ranks='2,2,2|allocate/storage='sqlite:///g\.db|model/transformers_weights|"
    r"allocate/resume timings|run/resume timings|model/record"
)


def read_cases() -> list[Handed]:
    """Returns the handed inputs; arguments of bytes and those that were cut are made whole."""
    found: list[Handed] = []
    for line in CASES.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        command = case["command"]
        start = command.index("regraft") + 1 if "regraft" in command else len(command)
        arguments = tuple(_whole(argument, case["name"]) for argument in command[start:])
        found.append(Handed(case["name"], arguments, "; ".join(case["problem"])))
    return found


def _whole(argument: str, name: str) -> str:
    if argument.startswith("b'"):
        return os.fsdecode(ast.literal_eval(argument))
    if len(argument) == _WHOLE_ARGUMENT:
        more = 4201 if name.startswith("out/a") else 5000 if name.endswith("5000") else 409
        return argument[:-1] + argument[-2:] * ((more - len(argument)) // 2) + ("GB" if name.endswith("402") else argument[-1])
    return argument.replace("FIX/", "").replace("../shared/models/stories260K", str(STORIES))


def make_base(forks: Forks, base: Path) -> None:
    """Writes all that the inputs start from into a folder: models, adapters, a search, a run, ratings."""
    (base / "SMALL.txt").write_text(TEXT, encoding="utf-8")
    (base / "t.txt").write_text(TEXT, encoding="utf-8")
    (base / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (base / "r.yaml").write_text(RECIPE.replace("recover:", "#"), encoding="utf-8")
    ratings = [f"{user},{item},{user * item % 5 + 1}" for user in range(12) for item in range(10) if (user + item) % 3]
    (base / "r.csv").write_text("\n".join(["user,item,rating", *ratings]), encoding="utf-8")
    labelled = [f"a story about {what},{what}" for what in ("cats", "dogs") * 12]
    (base / "rows.csv").write_text("\n".join(["text,label", *labelled]), encoding="utf-8")
    (base / "f.txt").write_text("x", encoding="utf-8")
    shutil.copytree(STORIES, base / "m", copy_function=shutil.copyfile)
    (base / "m").chmod(stat.S_IRWXU)
    for line in (
        ["prune", "m", "--criterion", "l2", "-o", "PRUNED"],
        ["recover", "PRUNED", "--data", "SMALL.txt", "--steps", "2", *_TRAIN, "--no-merge", "-o", "lora"],
        ["recover", "PRUNED", "--data", "SMALL.txt", "--steps", "2", *_TRAIN, "--no-merge", "--adapter", "nola", "-o", "nola"],
        ["recover", "m", "--task", "classification", "--data", "rows.csv", "--steps", "1", "--batch", "2", "--seq-len", "16", "-o", "clf"],
        ["allocate", "PRUNED", *_SEARCH, "--ranks", "2,4,6", "--budget", "r=4", "--store", "st", "-o", "found.json"],
        ["prune", "m", "--criterion", "l2", "--plan-only", "-o", "plan.json"],
        ["run", "recipe.yaml", "-o", "finished"],
    ):
        done = forks.run(base, *line)
        assert done.code == 0, (line, done.err)
    shutil.copytree(base / "finished", base / "rf")
    first = next((base / "st").iterdir())
    value = json.loads(first.read_text(encoding="utf-8"))
    value["trials"] = [trial | {"loss_nats": trial["loss_nats"] * 1.01} for trial in value["trials"]]
    (base / "st" / "search-2.json").write_text(json.dumps(value), encoding="utf-8")
    done = forks.run(base, "meta", "train", "st", "-o", "pr")
    assert done.code == 0, done.err


def make(case: Handed, base: Path, folder: Path) -> Command:
    """Makes the situation of an input in an empty folder, and returns the command to run there."""
    words = set(re.split(r"[\s/]+", " ".join(case.arguments))) | {"SMALL.txt", "f.txt", "t.txt"}
    for name in sorted(words & set(os.listdir(base))):
        copy(base, folder, name)
    circumstances: dict[str, Any] = {}
    for pattern, prepare in PREPARATIONS.items():
        if re.match(pattern, case.name):
            circumstances |= prepare(folder, base, case.name) or {}
    return Command(str(folder), case.arguments, **circumstances)


def copy(base: Path, folder: Path, name: str, to: str = "") -> Path:
    """Copies a file or a folder of the base, if it is not there yet."""
    target = folder / (to or name)
    if not target.exists():
        (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, target)
    return target


Prepare = Callable[[Path, Path, str], "dict[str, Any] | None"]


def edited(name: str, **changes: Any) -> Prepare:
    """Returns what changes keys of a JSON file."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        copy(base, folder, name.split("/", maxsplit=1)[0])
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(value | changes), encoding="utf-8")

    return prepare


def written(name: str, content: str) -> Prepare:
    """Returns what writes a file."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return prepare


def recipe(old: str, new: str) -> Prepare:
    """Returns what changes the recipe; without ``old`` it adds a line."""
    return written("r.yaml", RECIPE.replace("recover:", "#").replace(old, new) if old else RECIPE.replace("recover:", "#") + new)


def header(change: Callable[[dict[str, Any]], None]) -> Prepare:
    """Returns what changes the header of a model's weights."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        edit_header(copy(base, folder, "m") / "model.safetensors", change)

    return prepare


def _dtype(value: Any) -> Prepare:
    return header(lambda found: found["model.norm.weight"].update(dtype=value))


def _renamed(name: str) -> Prepare:
    return header(lambda found: found.update({name: found.pop("model.norm.weight")}))


def adapter(**changes: Any) -> Prepare:
    """Returns what changes the config of a PEFT adapter at ``a``."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        copy(base, folder, "PRUNED")
        edited_at(copy(base, folder, "lora", "a") / "adapter_config.json", **changes)

    return prepare


def edited_at(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def tensors(name: str, value: Any) -> Prepare:
    """Returns what adds a tensor to a PEFT adapter at ``a``."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        adapter()(folder, base, case)
        path = folder / "a" / "adapter_model.safetensors"
        save_file(load_file(path) | {name: value}, path, metadata={"format": "pt"})

    return prepare


def nola(change: Callable[[Path], None]) -> Prepare:
    """Returns what changes an adapter of ours at ``a``."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        copy(base, folder, "PRUNED")
        change(copy(base, folder, "nola", "a") / "adapter.json")

    return prepare


def _nola_seed(seed: Any) -> Prepare:
    def change(path: Path) -> None:
        value = json.loads(path.read_text(encoding="utf-8"))
        for spec in value["modules"].values():
            spec["seed"] = seed
        path.write_text(json.dumps(value), encoding="utf-8")

    return nola(change)


def rank_plan(**changes: Any) -> Prepare:
    """Returns what writes a rank plan at ``rk.json``."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        value = json.loads((base / "found.json").read_text(encoding="utf-8"))
        (folder / "rk.json").write_text(json.dumps(value | changes), encoding="utf-8")

    return prepare


def cut_plan(**changes: Any) -> Prepare:
    """Returns what writes a pruning plan at ``p.json``."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        value = json.loads((base / "plan.json").read_text(encoding="utf-8"))
        (folder / "p.json").write_text(json.dumps(value | changes), encoding="utf-8")

    return prepare


def pipe(name: str) -> Prepare:
    """Returns what makes a named pipe that nobody writes to."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return prepare


def search(name: str, content: str, rest: Callable[[Path], None] = lambda folder: None) -> Prepare:
    """Returns what makes a search that was stopped, with one file of it changed."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        aside = copy(base, folder, "found.search", "p.search")
        copy(base, folder, "PRUNED")
        if name:
            (aside / name).write_text(content, encoding="utf-8")
        rest(aside)

    return prepare


def _attributes_no_json(aside: Path) -> None:
    with sqlite3.connect(aside / "search.db") as store:
        for table in ("study_user_attributes", "trial_user_attributes", "trial_system_attributes"):
            store.execute(f"UPDATE {table} SET value_json = 'x y z'")


def finished(name: str, content: str) -> Prepare:
    """Returns what makes a run that was finished, with one file of it changed."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        out = copy(base, folder, "finished", "out")
        if content:
            (out / name).write_text(content, encoding="utf-8")
        (out / "report.md").unlink(missing_ok=True)

    return prepare


def _other_log(folder: Path, base: Path, case: str) -> None:
    """A training log that says something else, with the checksum that goes with it."""
    out = copy(base, folder, "finished", "out")
    body = {"46": "1,x,2.0", "54": "1e400,1.0,2.0", "50": "1,2,3,4,5,6,7,8,9"}[case[-2:]]
    log = out / "model" / "training_log.csv"
    log.write_text(log.read_text(encoding="utf-8").splitlines()[0] + "\n" + body + "\n", encoding="utf-8")
    import hashlib

    path = out / "model" / "manifest.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["files"]["training_log.csv"] = hashlib.sha256(log.read_bytes()).hexdigest()
    path.write_text(json.dumps(value), encoding="utf-8")


def _manifest(which: str, **files: str) -> Prepare:
    def prepare(folder: Path, base: Path, case: str) -> None:
        path = copy(base, folder, "finished", "out") / which / "manifest.json"
        value = json.loads(path.read_text(encoding="utf-8"))
        names = {"a\0b": "0" * 64} if "nul" in case else {_LONG: "0" * 64}
        path.write_text(json.dumps(value | {"files": value["files"] | names}), encoding="utf-8")

    return prepare


def store(change: Callable[[dict[str, Any]], None]) -> Prepare:
    """Returns what changes every past search of a store."""

    def prepare(folder: Path, base: Path, case: str) -> None:
        for path in copy(base, folder, "st").iterdir():
            value = json.loads(path.read_text(encoding="utf-8"))
            change(value)
            path.write_text(json.dumps(value), encoding="utf-8")

    return prepare


def _trials(**changes: Any) -> Prepare:
    return store(lambda found: [trial.update(changes) for trial in found["trials"]].clear())


def _space(**changes: Any) -> Prepare:
    return store(lambda found: found["space"].update(changes))


def _features(found: dict[str, Any]) -> None:
    for slot in found["space"]["slots"]:
        slot["features"] = {"\x1b[31mshare": 1.0}
        slot["name"] = "\x1b[31m" + slot["name"]


def _closed(name: str, mode: int = 0) -> Prepare:
    """Returns what takes all rights from a file or a folder, and the right to override them from the process."""

    def prepare(folder: Path, base: Path, case: str) -> dict[str, Any]:
        path = folder / name
        path.mkdir(exist_ok=True) if not path.exists() else None
        if name == "ro":
            for entry in ("m", "recipe.yaml"):
                copy(base, path, entry)
            shutil.copy(base / "plan.json", path / "p.json")
        path.chmod(mode)
        return {"setup": ["without_rights"]}

    return prepare


def open_again(folder: Path) -> None:
    """Gives back what :func:`_closed` took, so that the folder can be removed."""
    for name in ("ro", "rf", "rf/pruned", "rf/pruned/model.safetensors", "a/adapter_config.json"):
        path = folder / name
        if path.exists() and not path.is_symlink():
            path.chmod(stat.S_IRWXU)


def _labels(name: str) -> Prepare:
    def prepare(folder: Path, base: Path, case: str) -> None:
        copy(base, folder, "rows.csv")
        path = copy(base, folder, "clf") / "config.json"
        value = json.loads(path.read_text(encoding="utf-8"))
        names = [name + label for label in ("cats", "dogs")]
        value |= {"id2label": {str(index): label for index, label in enumerate(names)}}
        value |= {"label2id": {label: index for index, label in enumerate(names)}}
        path.write_text(json.dumps(value), encoding="utf-8")
        (folder / "rows.csv").write_text("text,label\n" + "".join(f"a story,{label}\n" for label in names * 3), encoding="utf-8")

    return prepare


def _device(folder: Path, base: Path, case: str) -> None:
    os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def _progress(content: str) -> Prepare:
    """Returns what leaves the checkpoint of a recovery that was stopped, with its record of progress changed."""

    def prepare(folder: Path, base: Path, case: str) -> dict[str, Any]:
        return {"code": _STOPPED.format(content=content)}

    return prepare


_STOPPED = """
import sys, os, signal
from pathlib import Path
from regraft.cli.app import run
line = ["recover", "PRUNED", "--data", "SMALL.txt", "--steps", "2", "--batch", "1", "--seq-len", "32", "--held-out-windows", "1",
        "--eval-every", "1", "--quiet", "-o", "out"]
child = os.fork()
if not child:
    import regraft.training.recover as recover
    import regraft.pipelines.recover as pipeline
    def stop(*about, **more):
        os.kill(os.getpid(), signal.SIGKILL)
    pipeline.save = stop
    run(line)
    os._exit(0)
os.waitpid(child, 0)
found = list(Path(".out.regraft/work").rglob("progress.json"))
assert found, list(Path(".").rglob("*"))
for path in found:
    path.write_text({content})
code = run([*line, "--resume"])
if code:
    raise SystemExit(code)
"""

_LAUGH = "\n".join(["a0: &a0 {k: v}", *(f"a{n}: &a{n} {{" + ", ".join(f"k{i}: *a{n - 1}" for i in range(10)) + "}" for n in range(1, 10))])
_MERGED = "\n".join(["a0: &a0 {k: v}", *(f"a{n}: &a{n} {{<<: [" + ", ".join([f"*a{n - 1}"] * 10) + "]}" for n in range(1, 10))])
_HEAD = "base_model.model.score.weight"


def _index(folder: Path, base: Path, case: str) -> None:
    model = copy(base, folder, "m")
    with (model / "model.safetensors").open("rb") as stream:
        names = [name for name in json.loads(stream.read(int.from_bytes(stream.read(8), "little"))) if name != "__metadata__"]
    (model / "model.safetensors").rename(model / "one.safetensors")
    places = dict.fromkeys(names, "one.safetensors") | {names[0]: "\x1b[31m.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def _code(program: str, **circumstances: Any) -> Prepare:
    def prepare(folder: Path, base: Path, case: str) -> dict[str, Any]:
        for name in ("r.csv", "recipe.yaml", "PRUNED"):
            copy(base, folder, name)
        start = (
            "from pathlib import Path\nimport math\nimport regraft\nfrom regraft.settings import *\n"
            "from regraft.completion.complete import *\nfrom regraft.pipelines.prune.plan_files import read_plan\n"
            f"M={str(STORIES)!r}; P2='PRUNED'; SMALL='SMALL.txt'\n"
        )
        return {"code": start + program} | circumstances

    return prepare


def _rates(**settings: Any) -> Prepare:
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return _code(f"complete_ratings('r.csv', None, CompletionSettings({given}))")


def _circumstances(**values: Any) -> Prepare:
    return lambda folder, base, case: values


def _many(*prepares: Prepare) -> Prepare:
    def prepare(folder: Path, base: Path, case: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in prepares:
            found |= one(folder, base, case) or {}
        return found

    return prepare


def _named_recipe(folder: Path, base: Path, case: str) -> None:
    shutil.copy(base / "r.yaml", folder / "<script>alert(1)<|script>.yaml")


def _model_named(name: str) -> Prepare:
    return lambda folder, base, case: shutil.copytree(base / "m", folder / name, dirs_exist_ok=True) and None


def _generation(**changes: Any) -> Prepare:
    return _many(edited("m/generation_config.json", **changes), recipe(str(STORIES), "m"))


PREPARATIONS: dict[str, Prepare] = {
    r"model/folder name with markup": _model_named("[/red] m"),
    r"model/folder name with escape$": _model_named("\x1b[31mm"),
    r"model/folder name with escape text": written("\x1b[31m.txt", TEXT),
    r"model/config model_type": edited("m/config.json", model_type="x" * 6000),
    r"model/config quantization": edited("m/config.json", quantization_config={"quant_method": "bits\n\x1b[31m"}),
    r"config/return_dict": edited("m/config.json", return_dict=False),
    r"model/weights dtype=\[": _dtype(["F32"]),
    r"model/weights dtype=\{": _dtype({"a": 1}),
    r"model/weights extra": _renamed(_ESCAPED),
    r"model/weights layer huge": _renamed(f"model.layers.{'9' * 5000}.norm.weight"),
    r"model/index one": _index,
    r"model/transformers_weights": edited("m/config.json", transformers_weights="other.safetensors"),
    r"gen/eos text": _generation(eos_token_id="x"),
    r"gen/eos huge": _generation(eos_token_id=10**30),
    r"gen/bad words": _generation(bad_words_ids=[[99999]]),
    r"gen/forced eos": _generation(forced_eos_token_id=99999),
    r"model/record": lambda folder, base, case: _record(folder, base, case),
    r"recover/checkpoint progress deep": _progress("'[' * 100000"),
    r"recover/checkpoint progress groups": _progress("'{\"groups\": 3}'"),
    r"recover/plan module esc": rank_plan(ranks={_ESCAPED: 4}),
    r"recover/plan other fingerprint": rank_plan(fingerprint="0" * 16),
    r"recover/plan fingerprint esc": rank_plan(fingerprint="\x1b[31m"),
    r"recover/plan alpha nan": rank_plan(alpha_per_rank=float("nan")),
    r"recover/plan alpha negative": rank_plan(alpha_per_rank=-1.0),
    r"recover/plan alpha zero": rank_plan(alpha_per_rank=0.0),
    r"recover/plan fifo": pipe("rk.json"),
    r"labels/huge number": written("rows.csv", "text,label\n" + f"a story,{'9' * 5000}\nanother,1\n" * 12),
    r"labels/evaluate markup": _labels("[/red]"),
    r"labels/evaluate esc": _labels("\x1b[31m"),
    r"evaluate/json to a character device": _device,
    r"adapter/lora config base user": adapter(base_model_name_or_path="~nosuchuser/x"),
    r"adapter/lora config base nul": adapter(base_model_name_or_path="a\0b"),
    r"adapter/lora config targets bomb": adapter(target_modules="(.*)*(.*)*x$"),
    r"adapter/(evaluate|export) nola description": nola(lambda path: path.write_text(_DEEP) and None),
    r"adapter/export lora extra": tensors(_ESCAPED, np.zeros(3, np.float32)),
    r"adapter/(evaluate|export) lora head scalar": tensors(_HEAD, np.zeros((), np.float32)),
    r"adapter/evaluate lora head zero": tensors(_HEAD, np.zeros((10**8, 0), np.float32)),
    r"adapter/type": adapter(
        peft_type="MULTITASK_PROMPT_TUNING", num_virtual_tokens=2, prompt_tuning_init="AVERAGE", prompt_tuning_init_state_dict_path="x.bin"
    ),
    r"adapter/nola method": nola(lambda path: edited_at(path, method=_ESCAPED)),
    r"adapter/nola seed huge": _nola_seed(2**80),
    r"adapter/nola seed float": _nola_seed(1.5),
    r"adapter/export (esc|output)": lambda folder, base, case: copy(base, folder, "lora") and copy(base, folder, "PRUNED") and None,
    r"read-only/export": lambda folder, base, case: [copy(base, folder, name) for name in ("lora", "nola", "PRUNED")].clear(),
    r"allocate/resume run.json list": search("run.json", "[]"),
    r"allocate/resume run.json number": search("run.json", "3"),
    r"allocate/resume run.json null": search("run.json", "null"),
    r"allocate/resume run.json text": search("run.json", '"x"'),
    r"allocate/resume timings list": search("timings.json", "[]"),
    r"allocate/resume timings number": search("timings.json", "3"),
    r"allocate/resume manifest deep": search("slots/manifest.json", _DEEP),
    r"allocate/resume manifest nul": search("slots/manifest.json", json.dumps({"files": {"a\0b": "0"}, "inputs": {}})),
    r"allocate/db attrs": search("", "", _attributes_no_json),
    r"allocate/prior mean": lambda folder, base, case: _prior(copy(base, folder, "pr")),
    r"run/billion laughs map$": recipe("", _LAUGH),
    r"run/billion laughs map in a value": recipe("", "prune: {x: 1}\n" + _LAUGH),
    r"run/billion laughs merge": recipe("", _MERGED),
    r"run/very long key": recipe("", "k" * 100_000 + ": 1\n"),
    r"run/null key": recipe("ratio: 0.2", "null: 0.2"),
    r"run/nul escape": recipe(str(STORIES), '"a\\0b"'),
    r"run/nul in path": recipe("criterion: l2", 'criterion: wanda, calibration: "a\\0b.txt"'),
    r"run/nul in text path": recipe("text: SMALL.txt", 'text: "a\\0b.txt"'),
    r"run/nul in ranks": written("r.yaml", RECIPE.replace("rank: 2", 'ranks: "a\\0b"')),
    r"run/nul in cache": recipe("criterion: l2", 'criterion: l2, cache: "a\\0b"'),
    r"run/nul in teacher": written("r.yaml", RECIPE.replace("rank: 2", 'rank: 2, teacher: "a\\0b"')),
    r"run/long model": recipe(str(STORIES), "x" * 300),
    r"run/memory huge": recipe("ratio: 0.2", f"ratio: 0.2, memory: {'9' * 400}"),
    r"run/recipe name": _named_recipe,
    r"run/prune deletes": written(".out.old/mine", "mine"),
    r"run/resume run.json deep": finished("run.json", _DEEP),
    r"run/resume run.json null": finished("run.json", "null"),
    r"run/resume run.json esc": finished("run.json", json.dumps({"\x1b[31m\nx": 1})),
    r"run/resume timings deep": finished("timings.json", _DEEP),
    r"run/resume timings null": finished("timings.json", "null"),
    r"run/resume pruned manifest long": _manifest("pruned"),
    r"run/resume model manifest deep": finished("model/manifest.json", _DEEP),
    r"run/resume model manifest nul": _manifest("model"),
    r"run/resume measured/dense manifest": finished("measured/dense/manifest.json", _DEEP),
    r"run/resume training log": _other_log,
    r"run/resume recipe.yaml folder": lambda folder, base, case: _recipe_folder(copy(base, folder, "finished", "out")),
    r"run/resume scores": lambda folder, base, case: _fewer_scores(copy(base, folder, "finished", "out")),
    r"plan/fingerprint": cut_plan(fingerprint="\x1b[31m"),
    r"plan/selection": cut_plan(selection="x[/bold]"),
    r"plan/made_with memory": lambda folder, base, case: _made_with(folder, base, "memory", float("inf")),
    r"plan/made_with seed": lambda folder, base, case: _made_with(folder, base, "seed", float("inf")),
    r"plan/file deep": written("p.json", _DEEP),
    r"plan/fifo": pipe("f.json"),
    r"plan/dev zero": lambda folder, base, case: (folder / "z").symlink_to("/dev/zero"),
    r"complete/giant id": written("r.csv", f"user,item,rating\n{'9' * 4000},1,2\n1,2,3\n2,2,2\n"),
    r"complete/file name '\[": lambda folder, base, case: _in_brackets(folder, base),
    r"complete/file name '.x1b": lambda folder, base, case: shutil.copy(base / "r.csv", folder / "\x1b[31m.csv") and None,
    r"complete/file name bytes": lambda folder, base, case: shutil.copy(base / "r.csv", os.fsencode(folder) + b"/\xff.csv") and None,
    r"complete/json f": written("f", "x"),
    r"meta/loss nan": _trials(loss_nats=float("nan")),
    r"meta/loss huge": _trials(loss_nats=1e300),
    r"meta/fidelity zero": _trials(fidelity=0),
    r"meta/fidelity nan": _trials(fidelity=float("nan")),
    r"meta/ranks giant": _trials(ranks=[10**6] * 5),
    r"meta/no slots": _space(slots=[]),
    r"meta/features": store(_features),
    r"meta/choices empty": _space(choices=[]),
    r"meta/choices negative": _space(choices=[-2, 4, 6]),
    r"meta/uniform zero": _space(uniform=0),
    r"meta/fifo": _many(store(lambda found: None), pipe("st/a.json")),
    r"perm/(model|output|recover|recipe|plan|allocate|cache|run output)": _closed("ro"),
    r"perm/adapter config": _many(adapter(), lambda folder, base, case: _closed("a/adapter_config.json")(folder, base, case)),
    r"perm/run folder": _closed("rf", 0o500),
    r"perm/run stage": _many(
        lambda folder, base, case: copy(base, folder, "rf") and None,
        lambda folder, base, case: _closed("rf/pruned/model.safetensors")(folder, base, case),
    ),
    r"read-only/": _circumstances(setup=["mounted:size=4m,ro"]),
    r"disk 16k/": _circumstances(setup=["mounted:size=16k"]),
    r"api/prune int": _code("regraft.prune(5, Path('out'))"),
    r"api/prune bytes": _code("regraft.prune(b'x', Path('out'))"),
    r"api/prune nul": _code("regraft.prune('a\\0b', Path('out'))"),
    r"api/prune out nul": _code("regraft.prune(M, Path('a\\0b'), PruneSettings(criterion='l2'))"),
    r"api/prune out int": _code("regraft.prune(M, 5, PruneSettings(criterion='l2'))"),
    r"api/prune settings dict": _code("regraft.prune(M, Path('out'), {'ratio': 0.2})"),
    r"api/prune seed float": _code("regraft.prune(M, Path('out'), PruneSettings(criterion='random'), seed=1.5)"),
    r"api/prune seed text": _code("regraft.prune(M, Path('out'), PruneSettings(criterion='random'), seed='x')"),
    r"api/settings ratio nan": _code("PruneSettings(ratio=math.nan)"),
    r"api/settings ratio inf": _code("PruneSettings(ratio=math.inf)"),
    r"api/settings unknown": _code("PruneSettings(ratoi=0.2)"),
    r"api/settings memory inf": _code("PruneSettings(memory=math.inf)"),
    r"api/recover nul": _code("regraft.recover(P2, Path('out'), RecoverSettings(data=Path('a\\0b.txt'), steps=1))"),
    r"api/recover model none": _code("regraft.recover(None, Path('out'), RecoverSettings(data=Path(SMALL)))"),
    r"api/evaluate nul": _code("regraft.evaluate('a\\0b')"),
    r"api/evaluate text nul": _code("regraft.evaluate(M, EvaluateSettings(text=Path('a\\0b.txt')))"),
    r"api/complete nul": _code("complete_ratings('a\\0b')"),
    r"api/complete rank$": _rates(rank=0),
    r"api/complete rank bool": _rates(rank=True),
    r"api/complete rank float": _rates(rank=2.5),
    r"api/complete rank text": _rates(rank="x"),
    r"api/complete seed": _code("complete_ratings('r.csv', None, CompletionSettings(rank=2, threshold=0.1), seed=-1)"),
    r"api/complete duplicates": _rates(duplicates="x"),
    r"api/complete held_out": _rates(held_out="x"),
    r"api/complete device": _rates(device="evil"),
    r"api/run nul": _code("regraft.run('a\\0b')"),
    r"api/run override": _code("regraft.run('recipe.yaml', 'out', overrides=['prune.calibration=\"a\\\\0b.txt\"'])"),
    r"api/read_plan": _code("read_plan(Path('a\\0b'))"),
    r"env/run latin1": _circumstances(environment={"PYTHONIOENCODING": "latin-1"}),
    r"env/run C locale": _circumstances(environment={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}),
    r"env/run POSIX": _circumstances(environment={"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}),
    r"env/run FORCE": _circumstances(environment={"FORCE_COLOR": "1"}),
    r"env/recover WORLD": _circumstances(environment={"WORLD_SIZE": "x"}),
    r"env/run CUDA": _circumstances(environment={"CUDA_VISIBLE_DEVICES": "x"}),
    r"env/run PYTHONOPT": _circumstances(environment={"PYTHONOPTIMIZE": "2"}),
    r"env/stdout full": _circumstances(setup=["onto:full 1"]),
    r"env/stdout closed": _circumstances(setup=["onto:pipe 1"]),
    r"env/stderr closed": _circumstances(setup=["onto:closed 2"]),
    r"env/stderr full": _circumstances(setup=["onto:full 2"]),
    r"env/cwd deleted": _circumstances(setup=["gone"]),
    r"env/file size limit memory": _circumstances(setup=["small_files:100000"]),
    r"env/file size limit evaluate": _circumstances(setup=["small_files:0"]),
}


def _record(folder: Path, base: Path, case: str) -> None:
    names = {"traversal": "../../../../../../etc/hostname", "proc": "/proc/self/environ", "esc in names": _ESCAPED, "nul in names": "a\0b"}
    outside = next(value for key, value in names.items() if key in case)
    edited("m/regraft.json", command="", source="", source_fingerprint="", seed=0, versions={}, files={outside: "0" * 64})(
        folder, base, case
    )


def _prior(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        value = json.loads(path.read_text(encoding="utf-8"))
        if "mean" in value:
            value["mean"] = [1e300] * len(value["mean"])
            path.write_text(json.dumps(value), encoding="utf-8")


def _in_brackets(folder: Path, base: Path) -> None:
    (folder / "[").mkdir()
    shutil.copy(base / "r.csv", folder / "[" / "x].csv")


def _recipe_folder(out: Path) -> None:
    (out / "recipe.yaml").unlink()
    (out / "recipe.yaml").mkdir()


def _fewer_scores(out: Path) -> None:
    shutil.rmtree(out / "pruned")
    for path in (out / "scores").iterdir():
        path.write_text(path.read_text(encoding="utf-8")[:300], encoding="utf-8")


def _made_with(folder: Path, base: Path, key: str, value: Any) -> None:
    plan = json.loads((base / "plan.json").read_text(encoding="utf-8"))
    plan["made_with"] = (plan.get("made_with") or {}) | {key: value}
    (folder / "p.json").write_text(json.dumps(plan), encoding="utf-8")
