"""What a model computes on a few tokens, to be compared with what it computes after it was merged, saved and loaded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.data.tokens import context_limit
from regraft.errors import OutputError
from regraft.models.classifier import row_limit
from regraft.models.precision import float32_on_cpu

WINDOWS, TOKENS = 4, 32
TEXTS = 2  # windows of text at most
# Root of the mean squared difference, as a share of the spread of the logits. A weight that is merged in float32 and stored in 16 bits is
# rounded once; a change that was lost or applied twice is far above.
LARGEST_SHARE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Probe:
    """Token ids and what a model made of them.

    Attributes:
        ids_NT: Token ids, int64 (windows, tokens).
        logits_NL: The logits of every window, flat, float32 (windows, numbers).
        largest_share: The difference that rounding explains, as a share of the spread of the logits.
    """

    ids_NT: Tensor
    logits_NL: Tensor
    largest_share: float


def probe(model: nn.Module, also: Sequence[int] = (), texts: Sequence[Sequence[int]] = ()) -> Probe:
    """Returns what a model computes on tokens that are drawn from its whole vocabulary, the same every time, and on text.

    Args:
        model: A model with embeddings and logits, with or without an adapter; it is left in evaluation mode.
        also: Token ids that have to be among those drawn.
        texts: Token ids of texts, of which the first two that are not empty count: as many ids as a window has, and shorter ones repeated.
    """
    inner: Any = model
    rows = int(inner.config.get_text_config().vocab_size)
    limits = [limit for limit in (row_limit(model), context_limit(inner.config)) if limit]
    length = min([TOKENS, *limits])
    drawn = torch.randint(rows, (WINDOWS, length), generator=torch.Generator().manual_seed(11))
    places = drawn.view(-1)[: len(also)]
    places.copy_(torch.tensor(list(also[: len(places)]), dtype=torch.int64))
    windows = [(list(text) * length)[:length] for text in texts if len(text) > 0][:TEXTS]
    ids = torch.cat([drawn, torch.tensor(windows, dtype=torch.int64)]) if windows else drawn
    return Probe(ids, logits_of(model, ids), share_by_rounding(model))


def share_by_rounding(model: nn.Module) -> float:
    """Returns the difference that the rounding of a model's weights explains: that of its coarsest dtype."""
    shares = (LARGEST_SHARE.get(parameter.dtype, 0.0) for parameter in model.parameters())
    return max(shares, default=LARGEST_SHARE[torch.float32])


@torch.no_grad()
def logits_of(model: nn.Module, ids_NT: Tensor) -> Tensor:
    """Returns the logits of each window, flat, in float32: of every token, or of labels where the model has a head for them."""
    device = next(model.parameters()).device
    model.eval()
    with float32_on_cpu(model):
        return torch.stack([model(input_ids=ids.to(device)).logits.float().cpu().view(-1) for ids in ids_NT.split(1)])


def refuse_other(before: Probe, after: nn.Module, what: str, remedy: str) -> None:
    """Refuses a model that does not compute what was computed before.

    Args:
        before: What it has to compute.
        after: The model that was merged, or loaded again.
        what: What was done with it, for the message.
        remedy: What the user can do.

    Raises:
        OutputError: The two differ by more than rounding.
    """
    if not bool(torch.isfinite(before.logits_NL).all()):
        raise OutputError(f"{what} gives NaN or infinity, as it did before; nothing was written: train it again, or use another adapter")
    found = logits_of(after, before.ids_NT)
    if found.shape == before.logits_NL.shape:
        spread = float(before.logits_NL.std()) or 1.0
        share = float((found - before.logits_NL).square().mean().sqrt()) / spread
        limit = max(before.largest_share, share_by_rounding(after))  # weights in float32 may have been stored in 16 bits
        if share <= limit:
            return
        how = f"its logits differ by {share:.2g} of their spread, above {limit:g}"
    else:
        how = f"it gives {found[0].numel():,} numbers a window, not {before.logits_NL[0].numel():,}"
    raise OutputError(f"{what} is not what was trained: {how}; nothing was written: {remedy}")
