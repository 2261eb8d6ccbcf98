"""Tasks that are answered in words: exact match, and the share of repeated 4-grams."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.tokens import context_limit
from regraft.errors import DataError
from regraft.evaluation.questions import Task
from regraft.evaluation.sample import continuation_ids, prompt_ids
from regraft.evaluation.scores import score_of
from regraft.plans import TaskScore
from regraft.progress import SayCount

GRAM = 4


def score_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, answer_tokens: int, *, progress: SayCount | None = None
) -> tuple[TaskScore, ...]:
    """Answers each prompt by greedy decoding.

    An answer ends at a line's end or after ``answer_tokens`` tokens. It matches if it equals a right answer but for case, spaces at its
    ends and repeated, and a full stop at its end. A prompt that exceeds the context loses its beginning.

    Returns:
        ``exact_match``, where the items have answers, and ``repeated_4grams``: the share of an answer's 4-grams of tokens that stood in it
        before.

    Raises:
        DataError: The answers leave no room for a prompt in the model's context.
    """
    limit = context_limit(model.config)
    if limit is not None and answer_tokens >= limit:
        raise DataError(f"`answer_tokens={answer_tokens}` fills the model's context of {limit} tokens; take fewer")
    matches: list[float] = []
    repeats: list[float] = []
    for index, item in enumerate(task.items):
        prompt = prompt_ids(tokenizer, item.prompt)
        if limit is not None:
            prompt = prompt[answer_tokens - limit :]
        ids = continuation_ids(model, tokenizer, prompt, answer_tokens)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        if item.answers:
            matches.append(float(_plain(text.strip().partition("\n")[0]) in map(_plain, item.answers)))
        repeats.append(repeated_share(ids))
        if progress is not None:
            progress(index + 1, len(task.items))
    found = (score_of(task, "exact_match", matches),) if matches else ()
    return (*found, score_of(task, f"repeated_{GRAM}grams", repeats, higher_is_better=False))


def repeated_share(ids: Sequence[int]) -> float:
    """Returns the share of 4-grams that stood in the sequence before; zero for a sequence without a 4-gram.

    >>> repeated_share([1, 2, 3, 4, 5]), repeated_share([7] * 11)
    (0.0, 0.875)
    """
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
