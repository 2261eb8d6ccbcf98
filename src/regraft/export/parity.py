"""Comparison of next-token distributions of a runtime with those of the model in memory; an export that differs is refused."""

from __future__ import annotations

import copy
import math
import random
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.tokens import context_limit
from regraft.errors import InputError, OutputError
from regraft.export.contract import Parity

TIE_NATS = 1e-3
LARGEST_NATS = 1e-2  # of a file in float32
POSSIBLE_NATS = 20.0  # tokens more than this below the likeliest are left out: float32 rounds their tiny probabilities
WINDOW_TOKENS = 512
ENTRIES = 1_500_000  # probabilities that are asked for in all
# What a correct file in 16 bits, 8, 6 to 4 and 3 bits stays far below; a wrong tensor lies far above.
DIVERGENCE_NATS = {16: 0.02, 8: 0.05, 4: 0.5, 3: 1.0}
CHARACTERS = 10_000

# Full-width signs are meant.
_POOLS = (
    "def f(x): return x ** 2\nfor (int i = 0; i < n; ++i) { a[i] += b[i]; }\n<div class='x'>&amp;</div> {\"key\": [1, 2.5e-3, null]}",
    "The quick brown fox didn't jump; they'll SHOUT 'HELLO' (world-wide)! We've 12345.67 times.",
    "naïve café Ärger über Łódź İstanbul façade coöperate",
    "日本語の文章です。 中文字符测试，你好！ 한국어 문장",  # noqa: RUF001
    "Привет мир مرحبا بالعالم שלום नमस्ते สวัสดี",
    "🙂 👩‍👩‍👧 🇩🇪 ✅ ½ Ⅻ ﬁ ∑ → €",
    " \t\n\n  \r\n   \u00a0",
)


def mixed_text(special: Sequence[str], characters: int = CHARACTERS, form: str = "") -> str:
    """Returns a text of code, prose, accents, scripts, emoji, runs of spaces and special tokens, the same every time.

    Args:
        special: Special tokens to insert.
        characters: Length of the text.
        form: Unicode normal form of the text; empty for none.
    """
    generator, parts, length = random.Random(20), list[str](), 0
    while length < characters:
        pool = generator.choice(_POOLS)
        start = generator.randrange(len(pool))
        part = pool[start : start + generator.randint(1, 60)]
        if special and generator.random() < 0.05:
            part = generator.choice(special)
        elif generator.random() < 0.1:
            part = " " * generator.randint(1, 9) + part
        parts.append(part)
        length += len(part)
    text = "".join(parts)[:characters]
    return unicodedata.normalize(form, text) if form else text  # pyright: ignore[reportArgumentType]


def refuse_other_ids(ours: Sequence[int], theirs: Sequence[int], tokenizer: PreTrainedTokenizerBase, runtime: str) -> None:
    """Refuses a tokenizer that encodes a text otherwise than ours.

    Raises:
        OutputError: The ids differ; the message shows where first.
    """
    if list(ours) == list(theirs):
        return
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    mine, other = (tokenizer.convert_ids_to_tokens(list(ids[place : place + 4])) for ids in (ours, theirs))
    raise OutputError(
        f"the tokenizer in {runtime} differs from the model's: at token {place} of {len(ours)} it gives {other}, not {mine}; "
        "the export is refused, as the model would read other text: export with `to=hf`, or `check=None` if that does not matter"
    )


def sampled(model: PreTrainedModel, text_ids: Sequence[int], positions: int, context: int | None = None) -> tuple[list[int], list[int]]:
    """Returns the window of a text that is compared, and the lengths of the prompts within it.

    Args:
        model: The model.
        text_ids: Token ids of the text.
        positions: Number of prompts.
        context: Context length of the exported model, in tokens; by default the config's.

    Raises:
        InputError: The text is too short.
    """
    limit = context or context_limit(model.config) or WINDOW_TOKENS
    ids = list(text_ids)[: min(WINDOW_TOKENS, limit)]
    embedding: Any = model.get_input_embeddings()
    count = max(8, min(positions, ENTRIES // embedding.weight.shape[0]))
    if len(ids) < 3:
        raise InputError(f"the text of the check has {len(ids)} tokens, fewer than 3; give a longer one")
    count = min(count, len(ids) - 1)
    lengths = sorted({1 + round(step * (len(ids) - 2) / max(1, count - 1)) for step in range(count)})
    return ids, lengths


def our_log_probabilities(model: PreTrainedModel, ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Returns the model's log-probabilities of the token after each prompt within a window, computed in float32.

    Returns:
        Natural logarithms, (len(lengths), vocabulary), float64.
    """
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    with torch.no_grad():
        logits = exact(input_ids=torch.tensor([list(ids)], device=exact.device)).logits[0]
    return logits[[length - 1 for length in lengths]].double().cpu().log_softmax(-1)


def compare(ours: Tensor, theirs: Tensor, targets: Sequence[int], runtime: str, characters: int = 0) -> Parity:
    """Compares two sets of distributions.

    Args:
        ours: Log-probabilities, (positions, vocabulary), float64.
        theirs: Log-probabilities of the runtime in the same shape; NaN where it gives none.
        targets: The token that follows at each position.
        runtime: Name of the other program.
        characters: See :class:`Parity`.
    """
    best = ours.max(-1, keepdim=True).values
    known = theirs.isfinite() & (ours > best - POSSIBLE_NATS)
    difference = torch.where(known, (ours - theirs).abs(), 0.0)
    likeliest = torch.where(theirs.isfinite(), theirs, -torch.inf).argmax(-1, keepdim=True)
    agree = (ours.gather(-1, likeliest) >= best - TIE_NATS).squeeze(-1)
    divergence = torch.where(known, ours.exp() * (ours - torch.where(known, theirs, 0.0)), 0.0).sum(-1)
    places = torch.tensor(list(targets))[:, None]
    mine, other = ours.gather(-1, places).squeeze(-1), theirs.gather(-1, places).squeeze(-1)
    both = other.isfinite()
    return Parity(
        runtime=runtime,
        positions=len(targets),
        largest=float(difference.max()),
        mean=float(difference.sum() / known.sum().clamp(min=1)),
        agreement=float(agree.double().mean()),
        divergence=max(0.0, float(divergence.mean())),
        perplexity=math.exp(-float(mine[both].mean())) if bool(both.any()) else math.nan,
        theirs=math.exp(-float(other[both].mean())) if bool(both.any()) else math.nan,
        characters=characters,
    )


def refuse_difference(parity: Parity, bits: float) -> Parity:
    """Refuses an export that does not compute what the model computes; returns the comparison where it does.

    Args:
        parity: The comparison.
        bits: Bits of the stored weights; from 32 on the two must agree except for rounding.

    Raises:
        OutputError: They differ.
    """
    if bits >= 32:
        wrong = parity.agreement < 1.0 or not parity.largest <= LARGEST_NATS
        limit = f"100 % and {LARGEST_NATS:g} nats"
    else:
        most = next(DIVERGENCE_NATS[size] for size in (16, 8, 4, 3) if bits >= size or size == 3)
        wrong = not parity.divergence <= most
        limit = f"a divergence of {most:g} nats"
    if wrong:
        raise OutputError(
            f"the exported model is not the same: {parity.words()}; the limit is {limit}: nothing was written; "
            "export with `to=hf`, or `check=None` to keep the file all the same"
        )
    return parity
