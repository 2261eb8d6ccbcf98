"""A stage that is killed and given again, however often, ends with the bytes of one that was not disturbed, and leaves nothing else.

Whole runs of a recipe are in ``tests/pipelines/test_resume.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fresh
from tiny_inputs import make_inputs

# Gives a command once undisturbed, and again for every moment, where the process kills itself when it is about to make its n-th change
# of the file system (a rename, a new folder, a removal), or when a timer rings; then gives it again until it gets through. One process
# forks for all of it, since importing takes longer than running.
DRIVER = """
import json, os, random, shutil, signal, sys, threading, time
from pathlib import Path
import torch
from regraft.cli import app
from regraft.streaming import output

torch.set_num_threads(1)
output.SHARD_BYTES = 20_000  # a tiny model streams into several shards
work, moments, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
CALLS = ("rename", "replace", "mkdir", "unlink", "rmdir")
CHANGES_WITH_TIME = ("timings.json", "search.db")

def attempt(folder, at_change=None, after_seconds=None):
    folder.mkdir(exist_ok=True)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        changes = 0
        def counted(name):
            original = getattr(os, name)
            def call(*args, **kwargs):
                nonlocal changes
                changes += 1
                if changes == at_change:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)
            return call
        for name in CALLS:
            setattr(os, name, counted(name))
        if after_seconds is not None:
            threading.Timer(after_seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        started = time.monotonic()
        code = app.run(command)
        os.write(write, json.dumps([changes, time.monotonic() - started]).encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        told = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(told) if told else None

def tree(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in CHANGES_WITH_TIME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}

def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

def different(folder):
    after = tree(folder)
    return sorted(name for name in calm.keys() | after.keys() if calm.get(name) != after.get(name))

code, (changes, seconds) = attempt(work / "calm")
assert code == 0, code
calm = tree(work / "calm")
draw = random.Random(11)
plans = [{"at_change": n} for n in sorted(draw.sample(range(1, changes), min(moments, changes - 1)))]
plans += [{"after_seconds": draw.uniform(0.1, 0.9) * seconds}]
report = []
for index, plan in enumerate(plans):
    folder = work / f"killed-{index}"
    code, _ = attempt(folder, **plan)
    stopped = names(folder)
    again, _ = attempt(folder)
    report.append({"plan": plan, "code": code, "again": again, "different": different(folder), "stopped": stopped})
    shutil.rmtree(folder)
# Killed again and again, each time at a change drawn anew, until it gets through.
codes, stopped, folder = [], set(), work / "often"
while not codes or codes[-1] != 0:
    codes.append(attempt(folder, at_change=draw.randint(2, max(3, changes // 2)) if len(codes) < 5 else None)[0])
    stopped.update(names(folder) if codes[-1] else ())
report.append({"plan": "often", "code": codes[0], "again": codes[-1], "different": different(folder), "stopped": sorted(stopped)})
print("REPORT " + json.dumps({"files": sorted(calm), "runs": report}))
"""

TEXT = "--calibration INPUTS/text.txt --samples 4 --seq-len 16"
STEPS = "--data INPUTS/text.txt --batch 2 --seq-len 16 --held-out 0.2 --dropout 0.3"
SEARCH = "--ranks 1,2,3 --budget r=2 --trials 3 --samples 2 --confirm-seeds 2 --elastic 0 --prior none"
# The command; what must be among its files; what a kill must have left behind to go on from, in at least one of the moments.
STAGES: dict[str, tuple[str, str, str]] = {
    "prune": (f"prune INPUTS/model -o out --align 1 --criterion wanda --ratio 0.2 {TEXT}", "out/model.safetensors", ""),
    "prune streamed": (
        f"prune INPUTS/model -o out --align 1 --criterion wanda --select global --reconstruct least_squares --memory 2GB {TEXT}",
        "out/model.safetensors.index.json",
        "progress.json",
    ),
    "allocate": (f"allocate INPUTS/model -o plan.json --resume {SEARCH} --steps 4 {STEPS}", "plan.json", "search.db"),
    "recover": (
        f"recover INPUTS/model -o out --resume --no-merge --rank 2 --steps 8 --eval-every 2 {STEPS}",
        "out/adapter_model.safetensors",
        "checkpoint-",
    ),
    "compress": (f"compress INPUTS/model -o out --ratio 0.2 {TEXT}", "out/model.safetensors", ""),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_inputs()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_anywhere_and_given_again_it_ends_with_the_same_bytes(inputs: Path, tmp_path: Path, stage: str) -> None:
    command, file, kept = STAGES[stage]
    moments = 2
    done = fresh.run(["-c", DRIVER, str(tmp_path), str(moments), *command.replace("INPUTS", str(inputs)).split()])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.partition("REPORT ")[2])
    assert file in report["files"]
    assert not [name for name in report["files"] if ".regraft" in name or ".before" in name]
    for run_ in report["runs"]:
        assert run_["again"] == 0, f"{run_}\n{done.stderr[-3000:]}"
        assert run_["different"] == [], run_
    killed = [run_ for run_ in report["runs"] if run_["code"] == -9]
    assert len(killed) >= moments + 1, "too few were killed to prove anything"
    # Some were stopped with something done that the next went on from, and not all before they began.
    assert any(kept in name for run_ in killed for name in run_["stopped"])
