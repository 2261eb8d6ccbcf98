"""Basic encoding: the BOS token of a document, and ids without special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from regraft.errors import InputError

Bos = bool | Literal["auto"]


def bos_id(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> int | None:
    """Returns the id of the BOS token at the start of every document, or None.

    Args:
        tokenizer: Tokenizer of the model.
        bos: Whether documents start with the beginning-of-sequence token; ``"auto"`` follows the tokenizer's own behaviour.

    Raises:
        InputError: BOS is requested and the tokenizer has none.
    """
    token: Any = tokenizer.bos_token_id
    if bos is True and token is None:
        raise InputError("`bos=True` needs a BOS token, which this tokenizer lacks; use `bos=auto` or `bos=False`")
    if bos == "auto":
        return token if token is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [token] else None
    return token if bos else None


def plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of each text, without added special tokens."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]
