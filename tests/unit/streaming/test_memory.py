"""What a run needs, and that a bound holds: by the operating system's count, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from folders import text_file, tiny_tokenizer
from regraft.errors import InputError
from regraft.streaming.memory import Task, find_room, in_words
from regraft.streaming.skeleton import open_skeleton

GB, MB = 10**9, 10**6
TAYLOR = Task(looks_at="gradients", squares=False, refits=False, windows=10, tokens=32)


def needed(skeleton, task):
    return find_room(skeleton, task, 100 * GB).working_bytes


def test_what_more_is_asked_for_needs_more(make_folder):
    skeleton = open_skeleton(make_folder("llama"))
    plain = needed(skeleton, Task("weights", False, False, 0, 0))
    assert 0 < plain < needed(skeleton, Task("channels", False, False, 8, 32)) < needed(skeleton, Task("channels", False, False, 8, 64))
    assert needed(skeleton, Task("gradients", False, False, 10, 2)) < needed(skeleton, Task("gradients", True, False, 10, 2))
    assert needed(skeleton, Task("channels", False, False, 8, 32)) < needed(skeleton, Task("channels", False, True, 8, 32))
    layer = 4 * sum(parameter.numel() for parameter in skeleton.view.layers[0].parameters())
    assert needed(skeleton, TAYLOR) > 2 * layer, "weights and gradients"


def test_what_is_left_goes_to_windows_and_states(make_folder):
    skeleton = open_skeleton(make_folder("llama"))
    need = needed(skeleton, TAYLOR)
    poor, rich = find_room(skeleton, TAYLOR, need), find_room(skeleton, TAYLOR, 4 * GB)
    assert (poor.limits.backward_windows, rich.limits.backward_windows) == (1, 8)
    assert (poor.hidden_in_memory, rich.hidden_in_memory) == (False, True)
    assert (poor.fits, rich.fits) == (False, True)
    assert rich.limits.head_rows == 97
    assert rich.hidden_bytes == 5 * 10 * 32 * 48 * 4
    with pytest.raises(InputError, match=rf"`memory={in_words(need - 1000)}` is below what one layer needs, {in_words(need)}: "):
        find_room(skeleton, TAYLOR, need - 1000)


def test_long_texts_go_to_the_disk_and_not_into_memory(make_folder):
    skeleton = open_skeleton(make_folder("llama"))
    long = Task("channels", False, False, 10**6, 64)
    room = find_room(skeleton, long, 4 * GB)
    assert not room.hidden_in_memory
    assert room.hidden_bytes == 10**6 * 64 * 48 * 4
    assert room.working_bytes == needed(skeleton, Task("channels", False, False, 8, 64))


def make_checkpoint(folder: Path) -> int:
    """Writes a Llama of 99 million random parameters in bfloat16, layer by layer; returns its bytes."""
    hidden, ffn, layers, vocabulary = 768, 2048, 14, 300
    folder.mkdir()
    LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=12, vocab_size=vocabulary,
        max_position_embeddings=128, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer(259).save_pretrained(folder)
    sizes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    sizes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    tensors = {"model.embed_tokens.weight": 0.02 * torch.randn(vocabulary, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": 0.02 * torch.randn(size) for name, size in sizes.items()}
        tensors |= {f"{prefix}.{name}.weight": torch.ones(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def peak_of(command: list[str]) -> int:
    """Returns the most resident bytes that a command had."""
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = [0]

    def sample() -> None:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                peaks.append(process.memory_info().rss)
            except psutil.Error:
                return
            time.sleep(0.01)

    thread = threading.Thread(target=sample)
    thread.start()
    _, error = child.communicate()
    thread.join()
    assert child.returncode == 0, error
    return max(peaks)


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "holds"),
    [(["--memory", "900MB", "--order", "mixed"], True), ([], False)],
    ids=["bounded", "whole"],
)
def test_the_bound_holds_by_the_count_of_the_operating_system(tmp_path, more, holds):
    """Whole, the model and its gradients take 0.8 GB in float32, beside about half a GB for the program."""
    weights = make_checkpoint(tmp_path / "model")
    assert weights > 195 * MB
    usual = [
        sys.executable,
        "-m",
        "regraft",
        "prune",
        str(tmp_path / "model"),
        "--criterion",
        "taylor",
        "--samples",
        "2",
        "--seq-len",
        "16",
        "--calibration",
        str(text_file()),
    ]
    peak = peak_of([*usual, "--select", "global", "--reconstruct", "none", *more, "-o", str(tmp_path / "out")])
    assert (peak <= 900 * MB) == holds, f"{peak:,} bytes"
