"""Recovery from a folder to a folder, through the Python API and the command line."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.cli.app import load_command, run
from regraft.errors import ConfigError, DataError, InputError, ModelError, OutputError, RegraftError, TrainingError
from regraft.models.load import load
from regraft.models.provenance import read_provenance, versions
from regraft.models.save import save
from regraft.pipelines import recover as pipeline
from regraft.pipelines.recover import recover_model
from regraft.plans import Provenance
from regraft.progress import Step
from regraft.settings import LoadSettings, RecoverSettings
from regraft.surgery.adapter_folder import load_adapted

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def folder(tmp_path: Path, make_tiny: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder that regraft made."""
    provenance = Provenance("regraft prune dense", "dense", "0123", 7, versions(), settings={"prune": {"ratio": 0.2}})
    save(make_tiny(), tokenizer, tmp_path / "pruned", provenance, "# pruned\n")
    return tmp_path / "pruned"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A text that repeats."""
    path = tmp_path / "data.txt"
    path.write_text("<|endoftext|>".join(["abcdefgh" * 12] * 12))
    return path


@pytest.fixture
def settings(quick: Callable[..., RecoverSettings], data: Path) -> Callable[..., RecoverSettings]:
    def make(**given: Any) -> RecoverSettings:
        return quick(**{"data": data, "held_out": 0.2, "dropout": 0.1} | given)

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.slow
def test_a_merged_model_loads_in_plain_transformers(folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path) -> None:
    output = tmp_path / "out" / "recovered"
    result = recover_model(folder, output, settings(), seed=3, command="regraft recover pruned")
    stock = AutoModelForCausalLM.from_pretrained(output)
    assert type(stock) is LlamaForCausalLM
    assert stock.config.use_cache
    torch.testing.assert_close(logits(stock), logits(result.recovered.model), rtol=0, atol=0)
    assert float((logits(stock) - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max()) > 0.1
    assert AutoTokenizer.from_pretrained(output)("abc")["input_ids"] == AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]
    assert names(output.parent) == ["recovered"]
    assert not [name for name in names(output) if "adapter" in name or name.endswith((".pt", ".pth", ".bin"))]
    provenance = read_provenance(output)
    assert provenance is not None
    assert provenance == result.provenance
    assert (provenance.command, provenance.seed, provenance.source) == ("regraft recover pruned", 3, str(folder))
    assert provenance.source_fingerprint == load(folder).fingerprint
    assert provenance.settings["recover"]["lr"] == 0.01
    assert [parent["command"] for parent in provenance.parents] == ["regraft prune dense"]
    log = (output / "training_log.csv").read_text().splitlines()
    assert log[0] == "step,lr,train_loss_nats,held_out_loss_nats"
    assert len(log) == 1 + len(result.recovered.log) == 6
    card = (output / "README.md").read_text()
    assert f"{result.recovered.first_loss:.4f} to {result.recovered.best_loss:.4f} nats" in card
    assert json.loads((output / "timings.json").read_text())["seconds"] == pytest.approx(result.recovered.seconds, abs=1e-3)
    load(output)  # checks the checksums


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_kept_adapter_loads_in_plain_peft(folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path) -> None:
    result = recover_model(folder, tmp_path / "adapter", settings(merge=False), seed=3)
    assert names(tmp_path / "adapter") == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "regraft.json",
        "timings.json",
        "training_log.csv",
    ]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(stock), logits(result.recovered.model), rtol=0, atol=0)
    merged = recover_model(folder, tmp_path / "merged", settings(), seed=3)
    assert float((logits(merged.recovered.model) - logits(stock)).abs().max()) <= 1e-5
    provenance = read_provenance(tmp_path / "adapter")
    assert provenance is not None
    assert list(provenance.files) == ["adapter_model.safetensors"]
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_nothing_is_written_without_an_output(folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path) -> None:
    before = names(tmp_path)
    result = recover_model(str(folder), None, settings(steps=5))
    assert result.provenance is None
    assert names(tmp_path) == before


@pytest.mark.slow
def test_each_step_is_told_with_its_losses_unless_quiet(folder: Path, settings: Callable[..., RecoverSettings]) -> None:
    lines: list[str] = []
    recover_model(folder, None, settings(lr=None, steps=64, eval_every=32, quiet=False), say=lines.append)
    steps = [line for line in lines if isinstance(line, Step)]
    tried = {line.doing for line in steps if line.doing.startswith("trying the learning rate ")}
    assert len(tried) >= 2  # a short recovery for each rate comes first
    own = [line for line in steps if line.doing == "training"]
    assert {(line.done, line.total) for line in own} == {(step, 64) for step in range(65)}
    assert "held-out" in own[-1].found
    assert "train" in own[-1].found

    told = len(lines)
    recover_model(folder, None, settings(quiet=True), say=lines.append)
    assert len(lines) == told


@pytest.mark.slow
def test_half_precision_is_kept_on_disk(folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path) -> None:
    recover_model(folder, tmp_path / "out", settings(steps=5), load=LoadSettings(dtype="float16"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"data": "nowhere.txt"}, DataError, "'nowhere.txt' does not exist"),
        ({"seq_len": 600}, InputError, "`seq_len=600` exceeds the model's context of 512"),
        ({"batch": 999}, DataError, "fewer than one batch of 999"),
        ({"rank": 17}, InputError, "rank 17 exceeds the limit 16"),
        ({"adapter": "lorra"}, InputError, "unknown adapter 'lorra'"),
        ({"ranks": "nowhere.json"}, InputError, "rank plan 'nowhere.json' cannot be read"),
        ({"report_to": ("neptune",)}, InputError, "tracker 'neptune' is not installed"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    folder: Path,
    settings: Callable[..., RecoverSettings],
    tmp_path: Path,
    given: dict[str, Any],
    error: type[RegraftError],
    said: str,
) -> None:
    before = names(tmp_path)
    with pytest.raises(error, match=said) as raised:
        recover_model(folder, tmp_path / "new" / "folders" / "out", settings(**given))
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == before


@pytest.mark.slow
def test_a_loss_that_explodes_leaves_only_the_checkpoints(
    folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="lower `lr`"):
        recover_model(folder, tmp_path / "out", settings(lr=1e35, warmup=0.0, max_grad_norm=1e30))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.regraft").exists()  # it exploded before the first checkpoint


def test_what_exists_is_not_overwritten(folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputError, match=r"output '.*out' exists"):
        recover_model(folder, tmp_path / "out", settings())
    assert names(tmp_path / "out") == ["mine"]
    with pytest.raises(ModelError, match="there is no folder"):
        recover_model(tmp_path / "nothing", tmp_path / "other", settings())
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_a_full_disk_while_saving_keeps_the_checkpoints(
    folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save", full)
        with pytest.raises(OutputError, match="the disk is full"):
            recover_model(folder, tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()
    assert names(tmp_path / ".out.regraft" / "work") == ["checkpoint-20"]
    with pytest.raises(OutputError, match=r"stopped after step 20; go on with `resume=True`, or remove '.*\.out\.regraft'"):
        recover_model(folder, tmp_path / "out", settings())
    recover_model(folder, tmp_path / "out", settings(), resume=True)
    assert not (tmp_path / ".out.regraft").exists()
    load(tmp_path / "out")


@pytest.mark.slow
def test_what_was_finished_before_a_kill_is_success(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process dies between the last rename and the removal of its checkpoints."""
    ways = [
        "--steps",
        "4",
        "--batch",
        "2",
        "--seq-len",
        "16",
        "--eval-every",
        "2",
        "--held-out",
        "0.2",
        "--held-out-windows",
        "2",
        "--rank",
        "2",
        "--device",
        "cpu",
    ]
    output = tmp_path / "out"

    def recovering(*more: str) -> int:
        return run(["recover", str(folder), "--output", str(output), "--data", str(data), *ways, *more])

    def left(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "remove", left)
        assert recovering("--resume") == 130
    aside = tmp_path / ".out.regraft"
    assert names(aside / "work") == ["checkpoint-4"]
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    for other in (["--seed", "1"], ["--lr", "0.5"], []):  # what is finished is not what these ask for, or they do not ask to go on
        capsys.readouterr()
        assert recovering(*other, *(["--resume"] if other else [])) == 2
        assert "exists" in capsys.readouterr().err
        assert aside.is_dir()
    for _ in range(2):
        assert recovering("--resume") == 0
        assert "was finished before" in " ".join(capsys.readouterr().out.split())
        assert not aside.exists()
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    weights = output / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert recovering("--resume") == 2, "what is damaged is not finished"
    assert "exists" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("given", [{}, {"merge": False}, {"merge": False, "adapter": "nola"}], ids=["model", "lora", "nola"])
def test_what_is_finished_is_read_again(
    folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path, given: dict[str, Any]
) -> None:
    first = recover_model(folder, tmp_path / "out", settings(**given), seed=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = recover_model(folder, tmp_path / "out", settings(**given), seed=3, resume=True)
    assert again.finished_before
    assert not first.finished_before
    assert "finished before" in repr(again)
    torch.testing.assert_close(logits(again.model), logits(first.model), rtol=0, atol=1e-6)
    losses = [(done.best_step, done.best_loss, done.first_loss, done.trainable_parameters) for done in (first.recovered, again.recovered)]
    assert losses[0] == losses[1]
    again.save_pretrained(tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    weights = next(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "copy" / weights).read_bytes() == before[weights]
    with pytest.raises(OutputError, match="exists"):
        recover_model(folder, tmp_path / "out", settings(**given, lr=0.5), seed=3, resume=True)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_lora_in_a_folder_is_trained_on(folder: Path, settings: Callable[..., RecoverSettings], tmp_path: Path) -> None:
    first = recover_model(folder, tmp_path / "a", settings(merge=False, dropout=0.0), seed=3)
    more = RecoverSettings(
        **settings().model_dump(include={"data", "held_out", "steps", "batch", "seq_len", "eval_every", "lr", "quiet", "held_out_windows"})
    )
    result = recover_model(tmp_path / "a", tmp_path / "b", more, seed=3)
    assert result.recovered.first_loss == pytest.approx(first.recovered.best_loss, abs=1e-5)
    assert result.recovered.best_loss < result.recovered.first_loss
    base, record = load(folder), read_provenance(tmp_path / "b")
    assert record is not None
    assert record.settings["base"]["fingerprint"] == base.fingerprint == record.source_fingerprint
    assert record.settings["continued"]["adapter"] == str(tmp_path / "a")
    torch.testing.assert_close(logits(load_adapted(tmp_path / "b", LoadSettings()).model), logits(result.model), rtol=0, atol=1e-6)
    assert recover_model(tmp_path / "a", tmp_path / "b", more, seed=3, resume=True).finished_before
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="`base`"):
        recover_model(tmp_path / "a", tmp_path / "c", more)
    assert recover_model(tmp_path / "a", None, more, base=str(tmp_path / "elsewhere")).recovered.first_loss < 4
    recover_model(tmp_path / "elsewhere", tmp_path / "nola", settings(merge=False, adapter="nola"))
    with pytest.raises(ModelError, match=r"fold it in first with `regraft export .*nola --to merged --base else --output DIR`"):
        recover_model(tmp_path / "nola", tmp_path / "c", more, base="else")


# Runs in a process of its own, which forks before any tensor is computed: each child is killed at one moment of its run.
KILLED = """
import os, signal, sys, types
from pathlib import Path
from transformers import logging
from regraft.pipelines.recover import recover_model
from regraft.settings import RecoverSettings
from regraft.training import callbacks, checkpoint, recover as training
import regraft.pipelines.recover as pipeline

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after_step(step):
    def arm():
        original = callbacks.Pace.on_step_end
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                die()
            original(self, args, state, control, **kwargs)
        callbacks.Pace.on_step_end = on_step_end
    return arm

def within_checkpoint(step):
    def arm():
        original, count = checkpoint.save_file, []
        def save_file(tensors, path):
            if f"checkpoint-{step}" in str(path) and "optimizer" in str(path):
                Path(path).write_bytes(b"half")
                die()
            original(tensors, path)
        checkpoint.save_file = save_file
    return arm

def before_older_checkpoints_are_removed():
    checkpoint.shutil = types.SimpleNamespace(rmtree=die)

def while_saving():
    pipeline.log_csv = die

folder, data, output = sys.argv[1:4]
settings = RecoverSettings(data=data, held_out=0.2, rank=4, lr=1e-2, steps=20, batch=4, seq_len=24, eval_every=5,
                           held_out_windows=4, dropout=0.3)
moments = [after_step(3), after_step(7), within_checkpoint(10), before_older_checkpoints_are_removed, while_saving]
for arm in moments:
    child = os.fork()
    if child == 0:
        arm()
        recover_model(folder, output, settings, seed=3, resume=True)
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert not os.path.exists(output)
    print(arm.__name__, sorted(os.listdir(Path(output).parent / ".out.regraft" / "work")))
recover_model(folder, output, settings, seed=3, resume=True)
"""


@pytest.mark.long
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(
    folder: Path, settings: Callable[..., RecoverSettings], data: Path, tmp_path: Path
) -> None:
    undisturbed = tmp_path / "first" / "out"
    recover_model(folder, undisturbed, settings(dropout=0.3), seed=3, resume=True)
    killed = tmp_path / "second" / "out"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(data), str(killed)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "arm []",
        "arm ['checkpoint-5']",
        "arm ['.checkpoint-10.regraft', 'checkpoint-5']",
        "before_older_checkpoints_are_removed ['checkpoint-10', 'checkpoint-5']",
        "while_saving ['checkpoint-20']",
    ]
    contents = [{path.name: path.read_bytes() for path in run.iterdir() if path.name != "timings.json"} for run in (undisturbed, killed)]
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []
    assert names(killed.parent) == ["out"]


def command(*arguments: str) -> None:
    load_command("recover").main(args=list(arguments), standalone_mode=False)


@pytest.mark.long
def test_the_command_line_takes_both_forms_of_merge(folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", str(data), "--held-out", "0.2", "--steps", "5", "--batch", "4", "--seq-len", "24", "--rank", "4"]
    command(str(folder), "--output", str(tmp_path / "a"), *common, "--merge", "--lr", "0.01", "--seed", "3")
    printed = capsys.readouterr()
    assert printed.err == ""
    for word in ("held-out loss before", "held-out loss after", "best step", "trained parameters", "peak memory", "saved to"):
        assert word in printed.out
    command(str(folder), "--output", str(tmp_path / "b"), *common, "--no-merge")
    command(str(folder), "--output", str(tmp_path / "c"), *common)
    assert (tmp_path / "a" / "model.safetensors").is_file()
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "c" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_resumed_command_is_recorded_as_the_command_itself(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [str(folder), "--output", str(tmp_path / "out"), "--data", str(data), "--held-out", "0.2", "--steps", "2"]
    given += ["--batch", "4", "--seq-len", "24", "--resume"]
    monkeypatch.setattr(sys, "argv", ["regraft", "recover", *given])
    command(*given)
    provenance = read_provenance(tmp_path / "out")
    assert provenance is not None
    assert provenance.command == shlex.join(["regraft", "recover", *given[:-1]])


def test_the_command_line_lists_all_that_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        command(str(folder), "--output", str(tmp_path / "a"), "--rank", "0", "--lr", "nan", "--schedule", "cosin")
    assert len(raised.value.problems) == 3
    assert any(problem.startswith("--schedule") and "did you mean 'cosine'" in problem for problem in raised.value.problems)
    with pytest.raises(ConfigError, match="either ranks or alpha"):
        command(str(folder), "--output", str(tmp_path / "a"), "--ranks", "plan.json", "--alpha", "3")
