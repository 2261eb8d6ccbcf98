"""Logits of saved models in a fresh process, which knows of them what is in their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

import fresh

PROGRAM = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import regraft
ids = load_file(sys.argv[2])["ids"]
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found[name] = model(ids, use_cache=False).logits.contiguous()
save_file(found, sys.argv[3])
"""


def logits_in_a_fresh_process(folders: Mapping[str, str], ids: Tensor, work: Path) -> dict[str, Tensor]:
    """Returns the logits of the model in each folder.

    Args:
        folders: Folders by names.
        ids: Tokens, int64 (rows, tokens).
        work: A folder for two files.
    """
    save_file({"ids": ids}, work / "ids.safetensors")
    done = fresh.run(["-c", PROGRAM, json.dumps(dict(folders)), str(work / "ids.safetensors"), str(work / "out.safetensors")])
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(work / "out.safetensors")
