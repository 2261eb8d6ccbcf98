"""The tokenizer's habits: whether a text starts with BOS, and plain ids without anything added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from regraft.errors import InputError

Bos = bool | Literal["auto"]


def bos_id(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> int | None:
    """Returns the id that every document starts with, or None.

    Args:
        tokenizer: Of the model.
        bos: Whether documents start with the beginning-of-sequence token; ``"auto"`` does as the tokenizer does by itself.

    Raises:
        InputError: BOS is asked for and the tokenizer has none.
    """
    token: Any = tokenizer.bos_token_id
    if bos is True and token is None:
        raise InputError("--bos true, but this tokenizer has no BOS token; use --bos auto or --bos false")
    if bos == "auto":
        return token if token is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [token] else None
    return token if bos else None


def plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of every text, one by one, without special tokens added."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]
