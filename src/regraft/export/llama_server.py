"""Serves one GGUF file with llama.cpp until its standard input is closed; run by path, in a process of its own.

llama.cpp ends its process when a file breaks its assumptions, so it never runs in ours. This file imports nothing but
``xllamacpp``, so that it starts in less than a second. Its argument is one JSON object: see :class:`regraft.export.llama_cpp.Runtime`.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any


def main() -> None:
    """Loads the file, prints the address as one JSON line, and waits."""
    xllamacpp: Any = import_module("xllamacpp")  # an extension without types
    wanted = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = wanted["file"]
    params.n_ctx = wanted["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted["threads"]
    params.warmup = False
    params.fit_params = False
    params.n_gpu_layers = 0
    params.ui = False
    params.verbosity = 1
    params.cache_ram_mib = 0
    params.sampling.seed = 0
    if wanted["exact"]:  # keys, values and attention in float32, as they are in the model that is compared
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
