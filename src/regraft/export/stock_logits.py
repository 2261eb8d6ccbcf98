"""Logits of a model folder in transformers alone; run by path, in a process of its own, with one JSON object as argument.

It imports nothing of ours, so that a folder is loaded as anybody would load it: by a stock class, or by the code in the folder.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Loads the folder in float32 and writes the logits of one window, (tokens, vocabulary)."""
    wanted = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(
        wanted["folder"], dtype=torch.float32, trust_remote_code=True, local_files_only=True, use_safetensors=True
    )
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([wanted["ids"]])).logits[0].float()
    save_file({"logits": logits.contiguous()}, wanted["output"])


if __name__ == "__main__":
    main()
