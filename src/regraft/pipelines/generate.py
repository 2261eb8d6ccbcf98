"""Text from a model, piece by piece as it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from regraft.data.tokens import context_limit
from regraft.errors import InputError, ModelError, shown
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.load import load as load_model
from regraft.reading import check_text, list_in
from regraft.settings import LoadSettings
from regraft.surgery.adapter_folder import is_adapter, load_adapted

LEAST_TEMPERATURE = 1e-4  # below it, the likeliest token each time: predictions divided by less are no numbers any more

Message = Mapping[str, str]
Show = Callable[[str], None]


def opened(source: str, load: LoadSettings) -> Loaded:
    """Loads what is to write: a model, or an adapter on its base.

    Raises:
        RegraftError: It cannot be loaded.
    """
    return load_adapted(Path(source), load) if is_adapter(source) else load_model(source, load)


def prompt_ids(loaded: Loaded, prompt: str | Sequence[Message], *, plain: bool = False) -> list[int]:
    """Returns the token ids of a prompt.

    Args:
        loaded: The model.
        prompt: A text, or the messages of a conversation (``role`` and ``content``) that the model is to go on with.
        plain: Whether a text is continued as it stands, although the model has a chat template.

    Raises:
        InputError: The prompt is empty, the model has no chat template for messages, or its template refuses them.
    """
    tokenizer = require_tokenizer(loaded)
    has_template = bool(tokenizer.chat_template)
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("the prompt is empty; give some text")
        check_text(prompt, "the prompt")
        if plain or not has_template:
            return list(tokenizer(prompt, verbose=False).input_ids)
        prompt = [{"role": "user", "content": prompt}]
    for message in prompt:
        check_text(str(message.get("content")), "a message")
    if not has_template:
        raise InputError(f"'{loaded.source}' has no chat template, so that it cannot converse; continue a text with: regraft generate")
    try:
        found: Any = tokenizer.apply_chat_template(
            [dict(message) for message in prompt], add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates raise what they like
        raise InputError(f"the chat template refuses the conversation: {error}; leave the system message out, or use `plain`") from None
    return list(found["input_ids"])


def generate(
    loaded: Loaded,
    ids: Sequence[int],
    *,
    tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    show: Show = lambda piece: None,
) -> str:
    """Returns what the model writes after a prompt, without special tokens.

    Args:
        loaded: The model.
        ids: Token ids of the prompt.
        tokens: Largest number of new tokens; an end-of-sequence token or the end of the context ends earlier.
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn.
        seed: Seed for drawing tokens.
        show: Called with each piece of text when it is complete.

    Raises:
        InputError: The prompt fills the context, or the temperature is negative or no number.
        ModelError: The model predicts no numbers.
    """
    tokenizer, model = require_tokenizer(loaded), loaded.model
    limit = context_limit(model.config)
    if not 0 <= temperature < math.inf:
        raise InputError(f"a temperature of {temperature} is negative or no number; use 0 for the likeliest token, or about 0.7")
    if limit is not None and len(ids) >= limit:
        raise InputError(f"the prompt has {len(ids)} tokens and the model's context {limit}: nothing can follow; shorten it")
    declared: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = declared if declared is not None else tokenizer.eos_token_id
    first_end = next(iter(list_in(ends)), ends)
    config = GenerationConfig(
        max_new_tokens=tokens if limit is None else min(tokens, limit - len(ids)),
        do_sample=temperature >= LEAST_TEMPERATURE,
        num_beams=1,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_end or 0,
        **({"temperature": temperature, "top_k": 0} if temperature >= LEAST_TEMPERATURE else {}),
    )
    prompt = torch.tensor([list(ids)], device=model.device)
    written = _Written(tokenizer, show)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        generate_with: Any = model.generate
        generate_with(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            streamer=written,
            logits_processor=LogitsProcessorList([_Numbers(loaded.source, len(ids))]),
        )
    return written.text


class _Numbers(LogitsProcessor):
    """Refuses predictions that are no numbers: the likeliest of them is any token, and none can be drawn."""

    def __init__(self, source: str, prompt_tokens: int) -> None:
        self._source, self._prompt_tokens = source, prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(dim=-1).isfinite().all():  # a NaN is the largest; single tokens may be ruled out by minus infinity
            place = input_ids.shape[1] - self._prompt_tokens + 1
            raise ModelError(
                f"'{shown(self._source)}' predicts no numbers for token {place} after the prompt (NaN or infinite logits); "
                "use `dtype=float32`, or check the model with: regraft evaluate"
            )
        return scores


class _Written(TextStreamer):
    """Hands pieces on and keeps the whole."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.show = "", show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.show(text)
