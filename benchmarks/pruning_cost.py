"""What pruning costs and what it saves: growth of time with layers and width, and the speed of pruned models (used by ``pruning.py``).

Seconds are processor seconds, so that whatever else the machine does meanwhile counts as little as it can; models whose speed is compared
take turns, repeat by repeat.

* Speed: prefill of a prompt and decoding after it, of pruned models against the dense one, beside the ratio of multiply-accumulates.
  What of a model's time does not shrink with its widths is estimated from a *floor*, the same model with one head and one FFN channel in
  every layer; from it follows the best speed-up that cutting could give.
* Growth: seconds of discovery, scoring and cutting against the number of layers and the width, with the exponent of the fitted power.
* Discovery alone of a 32-layer model of 7B shape, in a process of its own: seconds and peak resident memory.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import common
from regraft.evaluation.size import macs_per_token
from regraft.groups.discover import discover
from regraft.groups.traced import trace
from regraft.importance import Evidence, score
from regraft.models.view import parameter_count
from regraft.plans import Groups
from regraft.selection import Budget, select
from regraft.surgery.cut import cut

PROMPT, DECODED = 128, 12
# The small model's times are short and noisy, and cheap to repeat.
SPEED_REPEATS = {"stories3M": 31, "Llama 110M, random weights": 7}
SPEED_RATIOS = (0.2, 0.4)


def llama_110m() -> PreTrainedModel:
    """110 M random parameters: speed does not depend on their values."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)  # transformers draws the weights from the global generator
    return LlamaForCausalLM(config).eval()


def pruned_by_size(model: PreTrainedModel, ratio: float, align: int) -> PreTrainedModel:
    """Cut by magnitude, the same widths in every layer: which units go makes no difference to the speed."""
    groups = discover(model)
    scores = score("l2", Evidence(model, groups, None, 0))
    budget = Budget(ratio, "uniform", tuple(range(groups.layers)), ("heads", "ffn"), align)
    return cut(model, groups, select("uniform", groups, scores, budget)).eval()


def section_speed(small: PreTrainedModel) -> None:
    path = common.RESULTS / "pruning_speed.csv"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processor seconds of one thread are all there are
    for label, make, align in (("stories3M", lambda: small, 16), ("Llama 110M, random weights", llama_110m, 64)):
        if any(row["model"] == label for row in common.read_rows(path)):
            continue
        model = make()
        pruned = {f"{ratio:.0%}": pruned_by_size(model, ratio, align) for ratio in SPEED_RATIOS}
        floor = pruned_by_size(model, _most(model), 1)  # as little work in every layer as there can be: what is left is overhead
        found = in_turns({"dense": model, "floor": floor, **pruned}, SPEED_REPEATS[label])
        for name, one in pruned.items():
            removed = 1.0 - parameter_count(one) / parameter_count(model)
            for phase in ("prefill", "decode"):
                row = {"model": label, "removed": round(removed, 4), "phase": phase} | _speed_row(phase, model, one, floor, found, name)
                common.add_row(path, row)
                print(*row.values(), flush=True)
        del pruned, floor, model
        gc.collect()
    torch.set_num_threads(threads)


@torch.inference_mode()
def in_turns(models: Mapping[str, PreTrainedModel], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Returns, by model and phase, the processor seconds of each repeat; one more beforehand warms up."""
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(repeat))
            prefill, decode = _timed(model, ids)
            if repeat:
                found[name]["prefill"].append(prefill)
                found[name]["decode"].append(decode)
    return found


def _timed(model: PreTrainedModel, ids_BL: Tensor) -> tuple[float, float]:
    """Returns the seconds of reading a prompt, and of each token generated greedily after it with a cache."""
    began = time.process_time()
    out = model(input_ids=ids_BL, use_cache=True)
    filled = time.process_time()
    for _ in range(DECODED):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return filled - began, (time.process_time() - filled) / DECODED


def _most(model: PreTrainedModel) -> float:
    """Nearly all that can go: one head and one FFN channel stay in every layer."""
    groups = discover(model)
    return 0.999 * sum((group.units - 1) * group.unit_parameters for group in groups.groups) / groups.parameters


def _speed_row(
    phase: str,
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    floor: PreTrainedModel,
    found: Mapping[str, Mapping[str, list[float]]],
    name: str,
) -> dict[str, Any]:
    context = PROMPT // 2 if phase == "prefill" else PROMPT + DECODED // 2
    seconds = {key: statistics.median(times[phase]) for key, times in found.items()}
    work, less, least = (macs_per_token(model, context) for model in (dense, pruned, floor))
    # Overhead: what is left of the floor's time when its own operations are taken off at the dense model's pace.
    pace = (seconds["dense"] - seconds["floor"]) / (work - least)
    overhead = max(0.0, seconds["floor"] - pace * least)
    speedup, operations = seconds["dense"] / seconds[name], work / less
    return {
        "dense_ms": round(1e3 * seconds["dense"], 3),
        "pruned_ms": round(1e3 * seconds[name], 3),
        "floor_ms": round(1e3 * seconds["floor"], 3),
        "speedup": round(speedup, 3),
        "operations": round(operations, 3),
        "kept": round(speedup / operations, 3),
        "overhead_share": round(overhead / seconds["dense"], 3),
        "possible": round(seconds["dense"] / (overhead + (seconds["dense"] - overhead) * less / work), 3),
        "repeats": len(found[name][phase]),
    }


# ---- growth -----------------------------------------------------------------------------------------------------------------------

GROWTH = (1, 2, 4, 8)
GROWTH_LAYERS, GROWTH_HIDDEN = 4, 64
STAYING = {"layers": 128, "width": 4}
"""While the layers grow this is the width, and the other way round."""
REPEATS, ENOUGH_SECONDS = 5, 3.0
"""A stage is repeated so often, or until so much time is spent."""


def grown(layers: int, hidden: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def stages(model: PreTrainedModel, groups: Groups) -> dict[str, Callable[[], Any]]:
    windows = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))
    plain = score("l2", Evidence(model, groups, None, 0))
    plan = select("uniform", groups, plain, Budget(0.2, "per-layer", tuple(range(groups.layers)), ("heads", "ffn"), 1))
    return {
        "discovery, from the family's table": lambda: discover(model),
        "discovery, traced": lambda: trace(model),
        "scoring, Taylor": lambda: score("taylor", Evidence(model, groups, windows, 0)),
        "scoring, surgeon": lambda: score("surgeon", Evidence(model, groups, windows, 0)),
        "cutting": lambda: cut(model, groups, plan),
    }


def section_growth() -> None:
    path = common.RESULTS / "pruning_growth.csv"
    for series, factor in product(("layers", "width"), GROWTH):
        layers = GROWTH_LAYERS * factor if series == "layers" else STAYING["width"]
        hidden = GROWTH_HIDDEN * factor if series == "width" else STAYING["layers"]
        model = grown(layers, hidden)
        groups = discover(model)
        for name, stage in stages(model, groups).items():
            row = {"stage": name, "against": series, "factor": factor, "layers": layers, "hidden": hidden, "parameters": groups.parameters}
            if any(all(old[key] == str(value) for key, value in row.items()) for old in common.read_rows(path)):
                continue
            seconds: list[float] = []
            while len(seconds) < REPEATS and sum(seconds) < ENOUGH_SECONDS:
                began = time.process_time()
                stage()
                seconds.append(time.process_time() - began)
            row |= {"cpu_seconds": round(statistics.median(seconds), 5), "repeats": len(seconds)}
            common.add_row(path, row)
            print(*row.values(), flush=True)
    found = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True).stdout
    common.write_rows(common.RESULTS / "pruning_discovery.csv", [json.loads(found)])


def discover_7b() -> dict[str, Any]:
    """Discovery of the 7B shape by following its computation: nothing of it is ever in memory."""
    before = _peak_mebibytes()
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    began, used = time.perf_counter(), time.process_time()
    groups = trace(config)
    return {
        "parameters": groups.parameters,
        "groups": len(groups.groups),
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - used, 2),
        "peak_mebibytes": round(_peak_mebibytes()),
        "imports_mebibytes": round(before),
    }


def _peak_mebibytes() -> float:
    """Returns this process's peak memory, on Linux as VmHWM, because ``ru_maxrss`` there starts from the parent's peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) / 2**10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    print(json.dumps(discover_7b()))
