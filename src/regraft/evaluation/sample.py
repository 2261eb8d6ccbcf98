"""Samples of a model's text, by greedy decoding."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.encoding import bos_id
from regraft.data.tokens import context_limit
from regraft.errors import InputError
from regraft.evaluation.inference import input_device
from regraft.models.trainable import evaluating
from regraft.reading import check_text
from regraft.settings import SampleSettings


def continue_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings | None = None) -> str:
    """Continues a prompt by greedy decoding, which is deterministic.

    Generation stops at an end-of-sequence token, after ``settings.tokens`` tokens, or at the end of the model's context.

    Args:
        model: Any causal language model; the end-of-sequence ids are those of its ``generation_config``.
        tokenizer: Tokenizer of the model.
        settings: The prompt and the largest number of tokens. An empty prompt stands for the BOS token, or for EOS without BOS.

    Returns:
        The prompt and its continuation, without special tokens.

    Raises:
        InputError: The prompt fills the context, or is empty while the tokenizer has neither BOS nor EOS.
    """
    settings = settings or SampleSettings()
    prompt = prompt_ids(tokenizer, settings.prompt)
    ids = prompt + continuation_ids(model, tokenizer, prompt, settings.tokens)
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def continuation_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: int) -> list[int]:
    """Returns what a model writes after a prompt by greedy decoding, as token ids without the prompt.

    Raises:
        InputError: The prompt fills the model's context.
    """
    limit = context_limit(model.config)
    if limit is not None and len(prompt) >= limit:
        raise InputError(f"the prompt has {len(prompt)} tokens and the model's context {limit}: nothing can follow; shorten the prompt")
    eos = _eos(model, tokenizer)
    generation = GenerationConfig(
        max_new_tokens=tokens if limit is None else min(tokens, limit - len(prompt)),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0] if eos else 0,
    )
    prompt_1L = torch.tensor([prompt]).to(input_device(model))
    stops = {} if model.generation_config is None or model.generation_config.stop_strings is None else {"tokenizer": tokenizer}
    with evaluating(model):
        ids_1L: Any = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=prompt_1L, attention_mask=torch.ones_like(prompt_1L), generation_config=generation, **stops
        )
    return ids_1L[0].tolist()[len(prompt) :]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of a prompt, with BOS as the tokenizer has it; of an empty one, BOS or else EOS.

    Raises:
        InputError: The prompt is empty and the tokenizer has neither BOS nor EOS.
    """
    first: Any = bos_id(tokenizer) if text else (tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
    ids = [] if first is None else [first]
    if text:
        check_text(text, "the prompt")
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportOperatorIssue]
    if not ids:
        raise InputError("the prompt is empty and the tokenizer has neither BOS nor EOS to start from; give a prompt")
    return ids


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that end a text, from the model's generation config or else from the tokenizer."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    found: Any = declared if declared is not None else tokenizer.eos_token_id
    match found:
        case None:
            return []
        case int():
            return [int(found)]
        case _:
            return [int(token) for token in found]
