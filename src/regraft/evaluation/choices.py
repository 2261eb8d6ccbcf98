"""Questions with choices: the model's likelihood of each choice after the prompt.

As lm-evaluation-harness scores them: a choice is tokenized together with its prompt, its log-likelihood is the sum over its tokens, ``acc``
takes the highest sum and ``acc_norm`` the highest sum per character of the choice. A prompt that exceeds the context loses its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.encoding import bos_id, plain_ids
from regraft.data.tokens import context_limit
from regraft.errors import DataError, ModelError
from regraft.evaluation.inference import input_device
from regraft.evaluation.loss import batches_of, check_vocabulary, inputs_of, most_tokens_on
from regraft.evaluation.questions import Task
from regraft.evaluation.scores import score_of
from regraft.evaluation.sequences import TokenSequence, Window
from regraft.models.trainable import evaluating
from regraft.plans import TaskScore
from regraft.progress import SayCount


def score_choices(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, *, progress: SayCount | None = None
) -> tuple[TaskScore, TaskScore]:
    """Answers questions with choices.

    Args:
        model: Any causal language model. Its mode is restored.
        tokenizer: Tokenizer of the model.
        task: Questions with choices.
        progress: Called with the number of finished choices and of all choices.

    Returns:
        ``acc`` and ``acc_norm``.

    Raises:
        DataError: A choice is longer than the model's context, or has no tokens.
        ModelError: A likelihood is not finite, or the tokenizer has tokens that the model lacks.
    """
    pairs = [(item.prompt, choice) for item in task.items for choice in item.choices]
    windows = _windows(pairs, tokenizer, context_limit(model.config), task.name)
    check_vocabulary(model, [TokenSequence(window.ids, 1, 0) for window in windows])
    nats = iter(choice_nats(model, windows, progress))
    right: list[float] = []
    right_by_length: list[float] = []
    for item in task.items:
        likelihoods = [-next(nats) for _ in item.choices]
        # The characters of a choice without the space before it, as lm-evaluation-harness counts.
        by_length = [value / len(choice[1:]) for value, choice in zip(likelihoods, item.choices, strict=True)]
        right.append(float(likelihoods.index(max(likelihoods)) == item.right))
        right_by_length.append(float(by_length.index(max(by_length)) == item.right))
    return score_of(task, "acc", right), score_of(task, "acc_norm", right_by_length)


def choice_nats(model: PreTrainedModel, windows: Sequence[Window], progress: SayCount | None = None) -> list[float]:
    """Returns the negative log-likelihood of the scored tokens of each window, in nats, summed in float64.

    Raises:
        ModelError: A value is not finite.
    """
    device = input_device(model)
    order = {id(window): index for index, window in enumerate(windows)}
    found = [0.0] * len(windows)
    done = 0
    with evaluating(model):
        for batch in batches_of(windows, most_tokens_on(device, model), None):
            ids_BL, targets_BL = inputs_of(batch)
            logits_BLV = model(input_ids=ids_BL.to(device), use_cache=False).logits
            for row, window in enumerate(batch):
                first, last = window.first_scored - window.start, len(window)
                targets_N = targets_BL[row, first:last].to(logits_BLV.device)
                nats = F.cross_entropy(logits_BLV[row, first:last].float(), targets_N, reduction="none").double().sum()
                if not torch.isfinite(nats):
                    raise ModelError(f"the likelihood of {type(model).__name__} is {nats.item()}; try `dtype=float32`")
                found[order[id(window)]] = nats.item()
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
    return found


def _windows(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, limit: int | None, task: str) -> list[Window]:
    """Returns one window for each prompt and choice; the tokens of the choice are scored."""
    first = bos_id(tokenizer)
    start = [] if first is None else [first]
    wholes = plain_ids([prompt + choice for prompt, choice in pairs], tokenizer)
    distinct = list(dict.fromkeys(prompt for prompt, _ in pairs))
    prompts = dict(zip(distinct, plain_ids(distinct, tokenizer), strict=True))
    windows: list[Window] = []
    for (prompt, choice), whole in zip(pairs, wholes, strict=True):
        before = len(start) + len(prompts[prompt])
        ids = (*start, *whole)
        if before == 0 or before >= len(ids):
            raise DataError(f"'{task}': nothing is left to score of the choice '{choice.strip()[:40]}'; give the question more text")
        if limit is not None and len(ids) - 1 > limit:
            ids = ids[-limit - 1 :]
            before -= len(start) + len(whole) - len(ids)
            if before < 1:
                raise DataError(f"'{task}': the choice '{choice.strip()[:40]}' is longer than the model's context of {limit}; shorten it")
        windows.append(Window(ids, 0, len(ids) - 1, before - 1))
    return windows
