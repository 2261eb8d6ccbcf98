"""Training and held-out batches: their rows, and the order of the rows by a seed."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.adapters.seeding import derived_seed
from regraft.data.instructions import IGNORED, PromptFormat, RecordCounts, Truncation, encode_records
from regraft.data.text import Corpus
from regraft.data.tokens import encode_documents, pack, window_tokens
from regraft.errors import DataError, InputError
from regraft.models.trainable import evaluating
from regraft.settings import TRAINING_TOKENS, RecoverSettings
from regraft.training.distributed import process_count

# Number of rows that are made, as a multiple of the wanted ones, so that the drawn rows come from many documents.
_POOL = 4
MOST_STEPS = 10**6
_DOCUMENTS_AT_ONCE = 32
_RECORDS_OF_A_ROW = 8


@dataclass(frozen=True)
class Example:
    """One row of a batch.

    Attributes:
        input_ids: ``(tokens,)`` int64.
        labels: ``(tokens,)`` int64: the ids, with -100 for tokens without loss.
        position_ids: ``(tokens,)`` int64 if several records share the row: each counts from 0, and attention does not cross records.
        token_type_ids: ``(tokens,)`` int64 if an encoder marks the two texts of a row; the label is then one number.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    token_type_ids: Tensor | None = None


@dataclass(frozen=True)
class RecordFormat:
    """Conversion of records to rows.

    Attributes:
        prompt: The format of the prompt.
        truncation: Treatment of a record that is longer than a row.
        packing: Whether several records share a row (:func:`pack_records`).
        report: Called with the numbers of used, truncated and dropped records.
    """

    prompt: PromptFormat = "auto"
    truncation: Truncation = "right"
    packing: bool = False
    report: Callable[[RecordCounts], None] = lambda counts: None


def record_format(settings: RecoverSettings, report: Callable[[RecordCounts], None] = lambda counts: None) -> RecordFormat:
    """Returns how a recovery makes rows of records."""
    return RecordFormat(settings.prompt, settings.truncation, settings.packing, report)


def make_examples(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    wanted: int,
    seed: int,
    records: RecordFormat = RecordFormat(),
) -> list[Example]:
    """Makes the rows of a corpus, only as many as are useful.

    Text becomes blocks of exactly ``seq_len`` tokens, from documents one after the other with EOS between them; a text shorter than one
    block becomes one shorter row. Each instruction record becomes one row, cut to ``seq_len``, with loss on the assistant's tokens only;
    records whose answers are cut off are left out.

    Args:
        corpus: Text or records.
        tokenizer: Tokenizer of the model.
        seq_len: Longest row in tokens.
        wanted: Number of rows that will be used. From a much larger corpus, documents or records are drawn until a few times as many rows
            are made, so that a short run need not tokenise a long text.
        seed: Seed of that draw.
        records: Conversion of records to rows; text is always packed.

    Raises:
        DataError: No token with a loss is left.
        InputError: Rows of this length have no token to predict.
    """
    if seq_len < 2:
        raise InputError(f"`seq_len={seq_len}` leaves no token to predict; use at least 2")
    generator = torch.Generator().manual_seed(derived_seed(seed, "draw"))
    order: list[int] = torch.randperm(len(corpus), generator=generator).tolist()
    if corpus.records:
        drawn = tuple(corpus.records[index] for index in order[: _POOL * wanted * (_RECORDS_OF_A_ROW if records.packing else 1)])
        pairs, counts = encode_records(replace(corpus, records=drawn), tokenizer, seq_len, records.prompt, records.truncation)
        records.report(counts)
        examples = [Example(torch.tensor(ids), torch.tensor(labels)) for ids, labels in pairs]
        return pack_records(examples, seq_len) if records.packing else examples
    documents: list[list[int]] = []
    tokens = 0
    for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
        drawn = tuple(corpus.documents[index] for index in order[start : start + _DOCUMENTS_AT_ONCE])
        documents += encode_documents(replace(corpus, documents=drawn), tokenizer)
        tokens = sum(map(len, documents)) + len(documents) - 1
        if tokens >= _POOL * wanted * seq_len:
            break
    if tokens < 2:
        raise DataError(f"'{corpus.name}' holds {tokens} tokens; training and its held-out loss need at least two of each")
    separator = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
    available = tokens if separator is not None else sum(map(len, documents))
    return [Example(block, block) for block in pack(documents, min(seq_len, available), separator)]


def in_steps(
    settings: RecoverSettings, train: Corpus | Sized, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, seed: int
) -> RecoverSettings:
    """Returns settings that count steps, where the user counted passes over the data: as many steps as these take, rounded up.

    Args:
        settings: Settings of the recovery, with or without ``epochs``.
        train: The training data; each labelled text is one row.
        tokenizer: The model's tokenizer.
        model: The model, for its context length.
        seed: Seed for drawing documents.

    Raises:
        InputError: These are more steps than anybody takes.
    """
    if settings.epochs is None:
        return settings
    match train:
        case Corpus():
            seq_len = window_tokens(settings.seq_len, TRAINING_TOKENS, model.config, "seq_len")
            rows = len(make_examples(train, tokenizer, seq_len, wanted=sys.maxsize, seed=seed, records=record_format(settings)))
        case _:
            rows = len(train)
    passes = settings.epochs * rows / (settings.batch * settings.accumulate * process_count())
    if passes > MOST_STEPS:
        raise InputError(f"`epochs={settings.epochs:g}` is {passes:.3g} steps, above the limit of {MOST_STEPS:,}; give fewer, or `steps`")
    steps = math.ceil(passes)
    return settings.model_copy(update={"steps": max(1, steps), "epochs": None})


def pack_records(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """Packs short rows into rows of at most ``seq_len`` tokens, each with its own positions and no attention to its neighbours.

    It is best fit in the given order: a row goes into the fullest packed row that still has room. Nothing is cut or repeated. Positions
    that start again at 0 mark the limits of attention for transformers (its masks and its flash attention read them);
    :func:`regraft.training.batches.is_blind_to_neighbours` checks that a model respects them. The first token of each record has no label,
    so that no record predicts the start of the next one.

    Args:
        examples: Rows of at most ``seq_len`` tokens each.
        seq_len: Longest row in tokens.
    """
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        length = len(example.input_ids)
        fitting = [(left, index) for index, left in enumerate(room) if left >= length]
        if fitting:
            _, index = min(fitting)
            bins[index].append(example)
            room[index] -= length
        else:
            bins.append([example])
            room.append(seq_len - length)
    return [_joined(members) for members in bins]


def _joined(members: Sequence[Example]) -> Example:
    labels = [torch.cat([torch.tensor([IGNORED]), member.labels[1:]]) for member in members]
    positions = [torch.arange(len(member.input_ids)) for member in members]
    return Example(torch.cat([member.input_ids for member in members]), torch.cat(labels), torch.cat(positions))


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Returns at most ``count`` evenly spaced examples, always the same ones."""
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]


def collate(examples: Sequence[Example], padding: int) -> dict[str, Tensor]:
    """Joins rows into a batch, padded on the right to the longest row.

    Args:
        examples: The rows.
        padding: Token for the padding, which has label -100 and attention 0.

    Returns:
        ``input_ids``, ``labels`` and, if rows were padded, ``attention_mask``, each ``(rows, tokens)`` int64. Packed rows have
        ``position_ids`` in place of a mask: the padding counts from 0 like one more record, and has no labels.
    """
    longest = max(len(example.input_ids) for example in examples)
    if any(example.position_ids is not None for example in examples):
        return _collate_packed(examples, longest, padding)
    if all(len(example.input_ids) == longest for example in examples):
        return {
            "input_ids": torch.stack([example.input_ids for example in examples]),
            "labels": torch.stack([example.labels for example in examples]),
        }
    shape = (len(examples), longest)
    input_ids, labels = torch.full(shape, padding), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def _collate_packed(examples: Sequence[Example], longest: int, padding: int) -> dict[str, Tensor]:
    shape = (len(examples), longest)
    batch = {"input_ids": torch.full(shape, padding), "labels": torch.full(shape, IGNORED)}
    batch["position_ids"] = torch.arange(longest).repeat(len(examples), 1)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = example.input_ids
        batch["labels"][row, :length] = example.labels
        if example.position_ids is not None:
            batch["position_ids"][row, :length] = example.position_ids
            batch["position_ids"][row, length:] = torch.arange(longest - length)
    return batch


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the padding token of rows; padding is always masked, so that any token serves if the tokenizer has none."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(token, int)), 0)


def shuffled(count: int, wanted: int, seed: int) -> list[int]:
    """Returns ``wanted`` indices below ``count``: consecutive random permutations, each from its own seed."""
    order: list[int] = []
    epoch = 0
    while len(order) < wanted:
        generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
        order += torch.randperm(count, generator=generator).tolist()
        epoch += 1
    return order[:wanted]


@final
class Ordered(Dataset[Example]):
    """Examples in the order of training, repeated as often as the steps need.

    Args:
        examples: The rows.
        settings: Steps, batch and accumulation.
        seed: Seed of the order.
        name: Name of the data, for the error message.
        processes: Number of processes that train together. Each has its own batches, so that a step has this many times as many rows.

    Raises:
        DataError: The rows are fewer than one batch.
    """

    def __init__(self, examples: Sequence[Example], settings: RecoverSettings, seed: int, name: str, processes: int = 1) -> None:
        if len(examples) < settings.batch * processes:
            together = f"{settings.batch}" if processes == 1 else f"{settings.batch} in each of {processes} processes"
            raise DataError(
                f"'{name}' gives {len(examples)} training windows of up to {settings.seq_len} tokens, fewer than one batch of "
                f"{together}; give more data, or lower `batch` or `seq_len`"
            )
        self.examples = examples
        self.order = shuffled(len(examples), settings.steps * settings.accumulate * settings.batch * processes, seed)

    def wanted(self) -> list[Example]:
        """Returns all rows in the order of training; with few data, rows occur several times."""
        return [self.examples[index] for index in self.order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:
        return self.examples[self.order[index]]


def digest(examples: Sequence[Example]) -> str:
    """Returns a short hash of the tokens and labels of all rows."""
    found = hashlib.sha256()
    for example in examples:
        found.update(example.input_ids.numpy().tobytes())
        found.update(example.labels.numpy().tobytes())
        if example.position_ids is not None:
            found.update(example.position_ids.numpy().tobytes())
    return found.hexdigest()[:16]


def is_blind_to_neighbours(model: PreTrainedModel) -> bool:
    """Returns whether a model gives two records in one row, separated only by their positions, the same outputs as separate rows.

    This is tested on eight tokens, because models differ in whether they accept positions and derive the attention mask from them.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = torch.tensor([3, 1, 2, 0, 2, 0, 3, 1], device=model.device)
    positions = torch.cat([torch.arange(4), torch.arange(4)]).to(model.device)
    with evaluating(model):
        together = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0, 4:].float()
        alone = model(input_ids=ids[None, 4:], use_cache=False).logits[0].float()
    return torch.allclose(together, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max()))
