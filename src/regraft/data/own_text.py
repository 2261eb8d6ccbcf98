"""Calibration text that the dense model writes itself, so that it covers what the model knows even without suitable text at hand.

A base model begins at a random token (LLM-QAT, arXiv 2305.17888, section 3.1); a model with a chat template also continues the opening of a
user's turn, and so writes the question and the answer (Magpie, arXiv 2406.08464). Windows take turns at several temperatures. Sampling
runs in batches with the model's cache, and its generator is given, so that the same seed writes the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.errors import ModelError

TEMPERATURES = (0.7, 1.0, 1.3)
# Four tokens in a row that stood in the same window before: prose has a few per cent, a text that runs in circles most of them.
MOST_REPEATED = 0.5
_RUN = 4
_BATCH_WINDOWS = 64
_HERE = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class OwnText:
    """Windows of text that a model wrote.

    Attributes:
        windows_NT: Token ids, int64 (windows, tokens).
        repeated: Share of four-token sequences that occurred earlier in the same window.
        degenerate: Whether this share is too high for calibration.
    """

    windows_NT: Tensor
    repeated: float
    degenerate: bool


@torch.no_grad()
def write_own_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, samples: int, seq_len: int, seed: int) -> OwnText:
    """Lets a model write windows of text.

    Args:
        model: The model, in evaluation mode; left as it is.
        tokenizer: Source of the chat template and the special tokens; None: every window begins at a random token.
        samples: How many windows.
        seq_len: Tokens of each, the first ones included.
        seed: Seed for everything that is drawn.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    openings = _openings(model, tokenizer, samples, generator)
    rows: list[Tensor] = []
    for first in range(0, samples, _BATCH_WINDOWS):
        batch = range(first, min(first + _BATCH_WINDOWS, samples))
        heat = torch.tensor([TEMPERATURES[index % len(TEMPERATURES)] for index in batch], device=model.device)
        rows.append(_continued(model, [openings[index] for index in batch], heat, seq_len, generator))
    written = torch.cat(rows).cpu()
    written = written[torch.randperm(len(written), generator=torch.Generator().manual_seed(seed))]
    repeated = repeated_share(written)
    return OwnText(written, repeated, repeated > MOST_REPEATED)


def repeated_share(windows_NT: Tensor) -> float:
    """Returns the share of runs of four tokens that stood before in the same window.

    >>> repeated_share(torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2]])), repeated_share(torch.arange(8)[None])
    (0.6, 0.0)
    """
    again, total = 0, 0
    for window in windows_NT.tolist():
        runs = [tuple(window[start : start + _RUN]) for start in range(len(window) - _RUN + 1)]
        again += len(runs) - len(set(runs))
        total += len(runs)
    return again / max(1, total)


def _openings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, samples: int, generator: torch.Generator) -> list[Tensor]:
    """Returns the first tokens of each window: every second one opens a user's turn where there is a chat template."""
    device = model.device
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    vocabulary = min(model.config.get_text_config().vocab_size, len(tokenizer) if tokenizer is not None else 1 << 62)
    plain = torch.tensor([token for token in range(vocabulary) if token not in special], device=device)
    start = [tokenizer.bos_token_id] if tokenizer is not None and _writes_bos(tokenizer) else []
    turn = _turn_opening(tokenizer)
    found: list[Tensor] = []
    for index in range(samples):
        drawn = plain[torch.randint(len(plain), (1,), generator=generator, device=device)]
        chat = turn is not None and index % 2 == 1
        found.append(torch.tensor(turn, device=device) if chat else torch.cat([torch.tensor(start, device=device).long(), drawn]))
    return found


def _writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _turn_opening(tokenizer: PreTrainedTokenizerBase | None) -> list[int] | None:
    """Returns what stands before a user's words, or None without a chat template."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": _HERE}], tokenize=False))
    before, found, _ = text.partition(_HERE)
    return tokenizer(before, add_special_tokens=False).input_ids or None if found else None


def _continued(model: PreTrainedModel, openings: Sequence[Tensor], heat_B: Tensor, seq_len: int, generator: torch.Generator) -> Tensor:
    """Samples each row on to ``seq_len`` tokens.

    All rows go through the model together, because a step costs as much for one row as for many: as long as an opening lasts, its own
    tokens take the place of the sampled ones.
    """
    shortest = min(seq_len, *(len(opening) for opening in openings))
    longest = max(len(opening) for opening in openings)
    given_BT = torch.stack([functional.pad(opening, (0, longest - len(opening)), value=-1) for opening in openings])
    ids_BT = given_BT[:, :shortest]
    step_BT, cache = ids_BT, None
    while (length := ids_BT.shape[1]) < seq_len:
        output = model(input_ids=step_BT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        if not bool(output.logits[:, -1].isfinite().all()):
            raise ModelError("the model's predictions are no numbers, so that it cannot write text; look at its weights and its config")
        chances_BV = functional.softmax(output.logits[:, -1].float() / heat_B[:, None], dim=-1)
        step_BT = torch.multinomial(chances_BV, 1, generator=generator)
        if length < longest:
            next_B1 = given_BT[:, length : length + 1]
            step_BT = torch.where(next_B1 < 0, step_BT, next_B1)
        ids_BT = torch.cat([ids_BT, step_BT], dim=1)
    return ids_BT
