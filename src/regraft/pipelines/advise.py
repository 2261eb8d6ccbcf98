"""What to do with a model so that it fits: from its config and the headers of its files alone, without loading a weight or torch."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regraft import seedling
from regraft.errors import InputError, shown
from regraft.reading import is_folder, is_whole, read_object, read_safetensors_header

CONTEXT_TOKENS = 2048
MOST_PRUNED = 0.5  # beyond half of the parameters little is left to recover
TEXT = "text.txt"  # stands for the user's own
STEP = 0.005  # shares are rounded up to these

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.\d+\.")
_EMBEDDING = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings|wpe|embed_positions)\.weight$")
_ATTENTION = re.compile(r"attn|attention")
# Bytes a parameter of GGUF types; of Q4_K_M the mean of a usual file, in which the more sensitive matrices have six bits.
_GGUF = {"Q8_0": 34 / 32, "Q6_K": 210 / 256, "Q5_K_M": 0.71, "Q4_K_M": 0.61}


@dataclass(frozen=True)
class Facts:
    """What the files of a model say of its size.

    Attributes:
        source: Name of the model.
        parameters: All parameters.
        stored_bytes: Bytes of the weights.
        prunable: Parameters in the matrices of the layers.
        least: Parameters of these that stay at the narrowest widths: one key-value head and a hundredth of the channels.
        looked_up: Parameters of an embedding that is not the output matrix too; a step of decoding reads single rows of it.
        cache_bytes: Bytes of a key-value cache of 2,048 tokens, or of the model's context, in 16 bits.
        context_tokens: That context.
    """

    source: str
    parameters: int
    stored_bytes: int
    prunable: int
    least: int
    looked_up: int
    cache_bytes: int
    context_tokens: int

    @property
    def read(self) -> int:
        """Parameters that each step of decoding reads."""
        return self.parameters - self.looked_up

    @property
    def outside(self) -> float:
        """Share of the parameters that lie outside of the layers: rows of tokens, but for a few norms."""
        return 1.0 - self.prunable / self.parameters

    @property
    def fastest(self) -> float:
        """The speed of decoding at the narrowest widths, as a multiple, where reading the weights decides it."""
        return self.read / (self.read - self.prunable + self.least)


@dataclass(frozen=True)
class Step:
    """A command to run.

    Attributes:
        command: Such as ``prune``.
        source: The model that it is given.
        settings: Its settings by name; True for a switch.
    """

    command: str
    source: str
    settings: Mapping[str, str | bool]


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        words: What and why, in a sentence.
        steps: The commands, in order.
        bytes: Bytes of the weights afterwards.
        ratio: Share of all parameters to prune.
        quantize: GGUF type; empty for none.
    """

    words: str
    steps: tuple[Step, ...]
    bytes: int
    ratio: float = 0.0
    quantize: str = ""


def facts_of(source: str) -> Facts:
    """Reads config and headers of a model folder, or of ``seedling``.

    Raises:
        InputError: It is no folder with a config and safetensors files.
    """
    folder = seedling.path() if source == "seedling" else Path(source)
    if not is_folder(folder):
        raise InputError(f"'{shown(source)}' is no folder; advice is made from the files of a model: download it, or give: seedling")
    config = read_object(folder / "config.json")
    config = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(config, dict)
    tensors = {name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in _header(file).items()}
    if not tensors:
        raise InputError(f"'{shown(source)}' has no safetensors files; convert it first, as by saving it again with transformers")
    sizes = {name: math.prod(entry["shape"]) for name, entry in tensors.items()}
    matrices = {name: size for name, size in sizes.items() if _LAYER.search(name) and len(tensors[name]["shape"]) == 2}
    heads = _number(config, "num_key_value_heads", "num_attention_heads", "n_head", "num_heads")
    least = sum(size / heads if _ATTENTION.search(name) else size / 100 for name, size in matrices.items())
    tied = bool(config.get("tie_word_embeddings", True)) or not any("lm_head" in name or "embed_out" in name for name in sizes)
    embedding = sum(size for name, size in sizes.items() if _EMBEDDING.search(name))
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    width = (
        _number(config, "head_dim")
        if config.get("head_dim")
        else _number(config, "hidden_size", "n_embd") // _number(config, "num_attention_heads", "n_head", "num_heads")
    )
    limit = config.get("max_position_embeddings") or config.get("n_positions") or CONTEXT_TOKENS
    context = min(CONTEXT_TOKENS, limit) if isinstance(limit, int) else CONTEXT_TOKENS
    stored = sum(sizes[name] * _BYTES.get(str(tensors[name]["dtype"]), 2) for name in sizes)
    cache = 2 * layers * heads * width * context * 2
    return Facts(source, sum(sizes.values()), stored, sum(matrices.values()), int(least), 0 if tied else embedding, cache, context)


def for_bytes(facts: Facts, limit_bytes: int, *, running: bool) -> Advice:
    """Returns the first of these that fits: nothing, 16 bits, 8, 6, 5 and 4 bits, then pruning with 4 bits, from the mildest on.

    Args:
        facts: The model.
        limit_bytes: The most that is allowed.
        running: Whether the limit is for memory while the model runs, with its cache, or for the file.

    Raises:
        InputError: Nothing reaches it.
    """
    spare = facts.cache_bytes + facts.stored_bytes // 20 if running else 0
    room = limit_bytes - spare
    goal = f"{in_megabytes(limit_bytes)}" + (
        f", of which {in_megabytes(spare)} are a cache of {facts.context_tokens} tokens and room" if spare else ""
    )
    if facts.stored_bytes <= room:
        return Advice(
            f"It fits as it is: {in_megabytes(facts.stored_bytes)} of {goal}.", (Step("generate", facts.source, {}),), facts.stored_bytes
        )
    if 2 * facts.parameters <= room:
        step = Step("export", facts.source, {"to": "hf", "dtype": "bfloat16", "output": "smaller"})
        return Advice(f"Store it in 16 bits: {in_megabytes(2 * facts.parameters)} of {goal}.", (step,), 2 * facts.parameters)
    for name, width in _GGUF.items():
        size = int(width * facts.parameters)
        if size <= room:
            step = Step("export", facts.source, {"to": "gguf", "quantize": name, "output": name.lower()})
            return Advice(f"Store it as {name}, about {in_megabytes(size)} of {goal}.", (step,), size, quantize=name)
    name, width = "Q4_K_M", _GGUF["Q4_K_M"]
    ratio = _up(1 - room / (width * facts.parameters))
    most = min(MOST_PRUNED, (facts.prunable - facts.least) / facts.parameters)
    if ratio > most:
        reached = int(width * facts.parameters * (1 - most)) + spare
        raise InputError(
            f"{in_megabytes(limit_bytes)} is less than pruning and quantizing reach: '{shown(facts.source)}' becomes about "
            f"{in_megabytes(reached)} at a ratio of {most:.2f} in {name}; allow more, or start from a smaller model"
        )
    size = int(width * facts.parameters * (1 - ratio))
    export = Step("export", "recovered", {"to": "gguf", "quantize": name, "output": name.lower()})
    words = f"Prune {ratio:.1%}, recover, and store it as {name}: about {in_megabytes(size)} of {goal}."
    return Advice(words, (*_pruning(facts.source, ratio), export), size, ratio, name)


def in_megabytes(count_bytes: float) -> str:
    """Returns a number of bytes in megabytes, with two digits that count where it is small.

    >>> in_megabytes(538_060_032), in_megabytes(657_664), in_megabytes(9_950_000)
    ('538 MB', '0.66 MB', '9.9 MB')
    """
    megabytes = count_bytes / 1e6
    return f"{megabytes:,.0f} MB" if megabytes >= 10 else f"{megabytes:.2g} MB"


def for_speed(facts: Facts, times: float) -> Advice:
    """Returns how much to prune for a speed of decoding, as a multiple of today's.

    A step of decoding one sequence reads every weight once and computes little, so that its time goes with the bytes. It holds for weights
    that are larger than the caches of the processor; a measurement decides.

    Raises:
        InputError: No width reaches it.
    """
    if not math.isfinite(times) or times <= 1:
        raise InputError(f"`speed={times:g}` is no gain; give a multiple above 1, such as 1.3x")
    ratio = _up(facts.read * (1 - 1 / times) / facts.parameters)
    most = min(MOST_PRUNED, (facts.prunable - facts.least) / facts.parameters)
    if ratio > most:
        limit = 1 / (1 - most * facts.parameters / facts.read)
        raise InputError(
            f"`speed={times:g}` is reached by no width: '{shown(facts.source)}' decodes at most about {limit:.2f} times as fast when "
            f"{most:.0%} of its parameters are pruned; take at most {math.floor(100 * limit) / 100:g}x, or quantize (`size`)"
        )
    size = int(facts.stored_bytes * (1 - ratio))
    words = f"Prune {ratio:.1%} with equal layers, so that {times:g} times fewer bytes are read a token; then measure, as caches differ."
    measuring = Step("evaluate", "recovered", {"speed": True, "text": TEXT})
    return Advice(words, (*_pruning(facts.source, ratio), measuring), size, ratio)


def times_in(text: str) -> float:
    """Returns a multiple such as ``1.3x``.

    Raises:
        InputError: It is none.

    >>> times_in("1.3x"), times_in("2")
    (1.3, 2.0)
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)[xX]?", text.strip())
    if found is None:
        raise InputError(f"`speed` '{shown(text)}' is no multiple; write 1.3x")
    return float(found[1])


def least_minutes(facts: Facts, tokens: int) -> float:
    """Returns the least minutes to train on so many tokens here: six operations a parameter and token, at the rate of a product."""
    matrix = np.ones((768, 768), dtype=np.float32)
    seconds: list[float] = []
    for _ in range(4):
        start = time.perf_counter()
        np.matmul(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return 6 * facts.parameters * tokens / (2 * 768**3 / min(seconds[1:])) / 60


def _pruning(source: str, ratio: float) -> tuple[Step, Step]:
    pruning = Step("prune", source, {"ratio": f"{ratio:g}", "calibration": TEXT, "output": "pruned"})
    return pruning, Step("recover", "pruned", {"data": TEXT, "output": "recovered", "merge": True})


def _up(ratio: float) -> float:
    return round(math.ceil(round(ratio / STEP, 6)) * STEP, 4)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the header of a safetensors file: name to type and shape.

    Raises:
        InputError: It is none.
    """
    header, _, _ = read_safetensors_header(file)
    for entry in header.values():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(isinstance(side, int) and 0 <= side < 1 << 40 for side in shape) or "dtype" not in entry:
            raise InputError(f"'{shown(file)}' has a damaged header; download it again")
    return header


def _number(config: Mapping[str, Any], *names: str) -> int:
    """Returns the first of some entries of a config that is a positive whole number.

    Raises:
        InputError: There is none.
    """
    for name in names:
        value = config.get(name)
        if is_whole(value, 1, math.inf):
            return value
    raise InputError(f"config.json has none of {', '.join(names)}; advice is for decoders of attention and feed-forward layers")
