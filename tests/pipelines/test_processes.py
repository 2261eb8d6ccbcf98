"""Recovery in two processes (gloo, CPU) beside one with twice the batch: the same curve, one writer, resumable."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fresh
from regraft.pipelines.recover import recover_model
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject
from regraft.training.checkpoint import optimizer_state, put_optimizer_state, put_tensors, trained_tensors
from regraft.training.distributed import filled, is_sharded, skeleton_of

WORLD = 2
# What `accelerate launch -m regraft recover` runs in each process, three times over: whole, stopped after step 7, and resumed.
DRIVER = """
import json, sys
from regraft.cli.app import run
from regraft.training import recover as module
arguments = sys.argv[1:]
codes = [run([*arguments, "--output", "whole"])]
original = module.Pace.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 7:
        raise KeyboardInterrupt
    original(self, args, state, control, **kwargs)
module.Pace.on_step_end = on_step_end
codes.append(run([*arguments, "--output", "stopped"]))
module.Pace.on_step_end = original
codes.append(run([*arguments, "--output", "stopped", "--resume"]))
print("CODES " + json.dumps(codes))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, its teacher and records whose answers differ in length."""
    letters = ["<unk>", "<s>", "</s>", "\n", *(chr(code) for code in range(32, 127))]
    backend = Tokenizer(WordLevel({token: index for index, token in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, seed in (("model", 1), ("teacher", 2)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), max_position_embeddings=512, bos_token_id=1, eos_token_id=2, **sizes))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    records = [{"instruction": f"Say {chr(97 + i % 26)}.", "input": "", "output": chr(97 + i % 26) * (1 + 5 * (i % 4))} for i in range(60)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    return tmp_path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launched(folder: Path, arguments: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Starts the processes as `accelerate launch` is started on each of two machines."""
    (folder / "driver.py").write_text(DRIVER)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(WORLD), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1"]
    launcher += ["--main_process_port", str(free_port()), "driver.py", *arguments]
    running = []
    for rank in range(WORLD):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(launcher, cwd=folder, env={**os.environ, **who}, **pipes))
    done = [(process, *process.communicate(timeout=280)) for process in running]
    return [subprocess.CompletedProcess(launcher, process.returncode, out, err) for process, out, err in done]


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "training_log.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.long
def test_two_processes_are_one_with_twice_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    common = {"seq_len": 200, "steps": 10, "eval_every": 5, "lr": 1e-2, "dropout": 0, "held_out": 0.2, "rank": 2}
    arguments = ["recover", "model", "--teacher", "teacher", "--data", "records.json", "--batch", "2", "--accumulate", "2", "--no-merge"]
    arguments += [part for name, value in common.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = launched(folder, arguments)
    for process in done:
        assert process.returncode == 0, process.stderr[-3000:]
        assert "CODES [0, 130, 0]" in process.stdout, process.stdout + process.stderr[-3000:]
    assert "held-out loss after" in done[0].stdout
    assert done[1].stdout.strip() == "CODES [0, 130, 0]"  # one process speaks and writes
    settings = RecoverSettings.model_validate(
        {**common, "teacher": "teacher", "data": "records.json", "batch": 4, "accumulate": 2, "merge": False}
    )
    recover_model("model", folder / "alone", settings)
    both, alone = curve(folder / "whole"), curve(folder / "alone")
    assert [row["step"] for row in both] == [row["step"] for row in alone] == ["0", "5", "10"]
    for mine, other in zip(both, alone, strict=True):
        for name in ("train_loss_nats", "held_out_loss_nats"):
            assert float(mine[name] or 0) == pytest.approx(float(other[name] or 0), abs=1e-4)
    weights = [load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "alone")]
    assert max(float(value.abs().max()) for name, value in weights[0].items() if "lora_B" in name) > 1e-2
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)
    for name in ("adapter_model.safetensors", "training_log.csv", "adapter_config.json"):
        assert (folder / "whole" / name).read_bytes() == (folder / "stopped" / name).read_bytes()
    assert not [entry for entry in folder.iterdir() if entry.name.endswith(".regraft")]


SHARDED = """
import sys
sys.path[:0] = {paths!r}
from test_processes import sharded_process
sharded_process({port})
"""


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, max_position_embeddings=64, **sizes)).eval()


def some_steps(module: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int, rank: int) -> None:
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 31, (WORLD, 2, 12), generator=generator)
        module(input_ids=ids[rank], labels=ids[rank]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded_process(port: int) -> None:
    """FSDP2 by torch's own fully_shard (accelerate shards on accelerators only): our parts around it hold on gloo."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))

    def sharded() -> tuple[torch.nn.Module, torch.nn.Module, torch.optim.Optimizer]:
        injected = inject(tiny(), RecoverSettings(rank=2, dropout=0.0), None, 0)
        skeleton = skeleton_of(injected.module)
        for layer in injected.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(injected.module, mesh=mesh)
        return injected.module, skeleton, torch.optim.AdamW([p for p in injected.module.parameters() if p.requires_grad], lr=1e-2)

    module, skeleton, optimizer = sharded()
    assert is_sharded(module)
    some_steps(module, optimizer, 2, rank)
    kept, state = trained_tensors(module), optimizer_state(optimizer)
    some_steps(module, optimizer, 2, rank)
    again, _, other = sharded()
    put_tensors(again, kept)
    put_optimizer_state(other, state)
    some_steps(again, other, 2, rank)
    whole, resumed = trained_tensors(module), trained_tensors(again)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    plain = filled(skeleton, module)
    assert not is_sharded(plain)
    ids = torch.arange(24).reshape(2, 12) % 31
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, module(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    if rank == 0:
        alone = inject(tiny(), RecoverSettings(rank=2, dropout=0.0), None, 0)
        trained = [p for p in alone.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for step in (0, 1, 0, 1):
            both = torch.randint(0, 31, (WORLD, 2, 12), generator=torch.Generator().manual_seed(step)).flatten(0, 1)
            alone.module(input_ids=both, labels=both).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in trained_tensors(alone.module).items():
            torch.testing.assert_close(whole[name], value, rtol=1e-3, atol=1e-5)
        print("THE SAME")
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_weights_are_kept_put_back_and_made_whole(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])], port=free_port()))
    running = [fresh.Process([str(script)], env=os.environ | {"RANK": str(rank)}) for rank in range(WORLD)]
    done = [process.communicate(timeout=200) for process in running]
    assert [process.wait() for process in running] == [0, 0], done[0][1][-2000:] + done[1][1][-2000:]
    assert "THE SAME" in done[0][0]
