"""Job of a recovery: every setting resolved and checked, the rows in their order, and the checkpoint to go on from.

A job is made before anything is changed: :func:`prepare` leaves the model as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from regraft.adapters import Evidence
from regraft.data.instructions import RecordCounts
from regraft.data.labelled import Labelled
from regraft.data.text import Corpus, Skipped
from regraft.data.tokens import window_tokens
from regraft.errors import InputError, PlanError, TrainingError, did_you_mean, shown
from regraft.models.classifier import row_limit
from regraft.models.view import fingerprint
from regraft.plans import RankPlan, from_json
from regraft.reading import read_bytes, real_number, whole_number
from regraft.settings import TRAINING_TOKENS, RecoverSettings
from regraft.training.batches import (
    Example,
    Ordered,
    collate,
    digest,
    is_blind_to_neighbours,
    make_examples,
    padding_token,
    record_format,
    spread,
)
from regraft.training.checkpoint import Checkpoint, checkpoints, read_checkpoint
from regraft.training.distill import Teacher, check_vocabulary
from regraft.training.distributed import join_processes, process_count
from regraft.training.four_bit import check_four_bits
from regraft.training.labelled import collate_labelled, labelled_examples, summed_label_loss, summed_labelled
from regraft.training.losses import summed_loss
from regraft.training.precision import compute_dtype

Batch = dict[str, Tensor]
SummedLoss = Callable[[nn.Module, Batch], Tensor]
"""A function from a module and a batch to the loss, summed over all predictions."""


# A larger share of records that are dropped or cut is a warning.
WARN_SHARE = 0.01


@dataclass(frozen=True)
class Reading:
    """Treatment of one kind of rows: their batches and losses.

    Attributes:
        collate: Function from rows and the padding token to a batch.
        summed: Function from a model and batches to the summed held-out loss and the number of predictions.
        objective: The training loss; None for the model's own loss.
    """

    collate: Callable[[Sequence[Example], int], Batch]
    summed: Callable[[nn.Module, Iterable[Batch], torch.device], tuple[float, int]]
    objective: SummedLoss | None = None


TOKENS = Reading(collate, summed_loss)
LABELS = Reading(collate_labelled, summed_labelled, summed_label_loss)


@dataclass(frozen=True)
class DataCounts:
    """Counts of the rows of training data.

    Attributes:
        records: Counts of instruction records; None for text and labels.
        skipped: Rows that could not be read.
    """

    records: RecordCounts | None = None
    skipped: Skipped = field(default_factory=Skipped)

    def lines(self) -> tuple[str, ...]:
        """Returns what a user should know of the data, a line each; a loss above 1 % is a warning."""
        found: list[str] = []
        if self.records is not None:
            found.append(str(self.records))
            if self.records.share_lost > WARN_SHARE:
                found.append(
                    f"warning: {self.records.share_lost:.1%} of the records were dropped or cut; raise `seq_len`, or choose `truncation`"
                )
        if self.skipped.rows:
            found.append(
                f"warning: {self.skipped.rows:,} rows could not be read and were skipped, such as: {'; '.join(self.skipped.first)}"
            )
        return tuple(found)


@dataclass(frozen=True)
class Job:
    """A recovery that is ready to begin.

    Attributes:
        model: The model to recover, still without an adapter.
        settings: Settings of the recovery; windows and packing are those that this model and these data allow.
        seed: Seed of the data's order, the adapter's first values and dropout.
        work: Folder of the checkpoints.
        ranks: The rank plan that is followed, or None.
        compute: Type of the matrix products of a forward pass.
        reading: How rows become batches and a loss.
        rows: The training rows in their order.
        held_out: The rows whose loss chooses the best checkpoint.
        padding: Token that fills up shorter rows.
        teacher: The model to learn from, or None.
        identity: Whatever would change the result, by name; checkpoints carry it.
        resumed: The checkpoint to go on from, or None.
        data: What became of the rows of the training data.
    """

    model: PreTrainedModel
    settings: RecoverSettings
    seed: int
    work: Path
    ranks: RankPlan | None
    compute: torch.dtype
    reading: Reading
    rows: Ordered
    held_out: Sequence[Example]
    padding: int
    teacher: Teacher | None
    identity: Mapping[str, str]
    resumed: Checkpoint | None
    data: DataCounts

    def evidence(self) -> Evidence:
        """Returns the rows of the first steps, of all passes and processes, from which some adapters compute their first values."""
        settings, device = self.settings, self.model.device
        batch, passes = settings.batch, settings.accumulate * process_count()

        def batches(count: int) -> list[Batch]:
            starts = range(0, min(count * passes * batch, len(self.rows)), batch)
            drawn = [self.reading.collate([self.rows[start + index] for index in range(batch)], self.padding) for start in starts]
            return [{name: tensor.to(device) for name, tensor in tensors.items()} for tensors in drawn]

        return Evidence(batches)


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Corpus | Labelled,
    held_out: Corpus | Labelled,
    settings: RecoverSettings,
    *,
    seed: int,
    work: Path,
    resume: bool = False,
    teacher: Teacher | None = None,
) -> Job:
    """Checks everything that a recovery needs and draws its rows; see :func:`regraft.training.recover.recover` for the arguments.

    Raises:
        InputError: A setting does not fit the model: window, tracker, device.
        MissingDependencyError: Weights in 4 bits were asked for, and bitsandbytes is not installed.
        ModelError: The teacher has another vocabulary.
        DataError: There is less data than one batch.
        PlanError: The file of ranks holds no rank plan.
        TrainingError: The checkpoints are of another run.
    """
    join_processes(model.device)
    compute = compute_dtype(settings.precision, _training_device(model))
    check_trackers(settings.report_to)
    if teacher is not None:
        check_vocabulary(teacher, model, tokenizer)
    if settings.load_in_4bit:
        check_four_bits(model, compute)
    seq_len = window_tokens(settings.seq_len, TRAINING_TOKENS, model.config, "seq_len", row_limit(model))
    packing = settings.packing and bool(train.records) and is_blind_to_neighbours(model)
    settings = settings.model_copy(update={"seq_len": seq_len, "packing": packing})
    ranks = read_ranks(settings.ranks)
    counts: list[RecordCounts] = []
    rows = _training_rows(train, tokenizer, settings, seed, counts.append)
    looked_at = _held_out_rows(held_out, tokenizer, settings)
    identity = _identity(model, settings, ranks, seed, teacher) | {"data": digest(rows.examples), "held-out data": digest(looked_at)}
    return Job(
        model=model,
        settings=settings,
        seed=seed,
        work=work,
        ranks=ranks,
        compute=compute,
        reading=LABELS if isinstance(train, Labelled) else TOKENS,
        rows=rows,
        held_out=looked_at,
        padding=padding_token(tokenizer),
        teacher=teacher,
        identity=identity,
        resumed=_last_checkpoint(work, identity) if resume else None,
        data=DataCounts(counts[0] if counts else None, train.skipped),
    )


def read_ranks(ranks: Path | RankPlan | None) -> RankPlan | None:
    """Returns the rank plan of the settings, read from its file if they name one.

    Raises:
        InputError: The file cannot be read.
        PlanError: The file holds no rank plan.
    """
    if not isinstance(ranks, Path):
        return ranks
    try:
        content = read_bytes(ranks, InputError)
    except InputError as error:
        raise InputError(f"rank plan '{shown(ranks)}' cannot be read ({error}); give a JSON file, such as ranks.json") from None
    try:
        plan = from_json(RankPlan, content)
    except PlanError as error:
        raise PlanError(f"'{shown(ranks)}' is {error}") from None
    real_number(plan.alpha_per_rank, f"'{shown(ranks)}': alpha_per_rank", 0.0, 1e6, PlanError)
    for name, rank in plan.ranks.items():
        whole_number(rank, f"'{shown(ranks)}': the rank of '{shown(name)}'", 1, 10**6, PlanError)
    return plan


def check_made_for(plan: Path | RankPlan | None, model: str) -> None:
    """Refuses a rank plan that was made for another model; one with an empty fingerprint is for any.

    Args:
        plan: The plan as it was read; None for no plan.
        model: Fingerprint of the model that is trained.

    Raises:
        PlanError: The fingerprints differ.
    """
    if isinstance(plan, RankPlan) and plan.fingerprint not in ("", model):
        raise PlanError(
            f"the rank plan is for the model with the fingerprint {shown(plan.fingerprint, 40)}, this one has {model}; plan ranks for this "
            'model, load it with the `dtype` of then, or empty the plan\'s "fingerprint" to use it all the same'
        )


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that the Trainer does not know or that are not installed.

    Raises:
        InputError: A tracker is unknown or not installed; the message gives the known ones or the package to install.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise InputError(f"unknown tracker '{name}'; known: {known}{did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            library = {"azure_ml": "azureml-mlflow", "kubeflow": "kubeflow-training"}.get(name, name)
            raise InputError(f"tracker '{name}' is not installed; get it with: pip install {library}")


def _training_rows(
    corpus: Corpus | Labelled,
    tokenizer: PreTrainedTokenizerBase,
    settings: RecoverSettings,
    seed: int,
    report: Callable[[RecordCounts], None],
) -> Ordered:
    processes = process_count()
    wanted = settings.steps * settings.accumulate * settings.batch * processes
    seq_len = settings.seq_len or TRAINING_TOKENS
    match corpus:
        case Labelled():
            examples = labelled_examples(corpus, tokenizer, seq_len)
        case Corpus():
            examples = make_examples(corpus, tokenizer, seq_len, wanted=wanted, seed=seed, records=record_format(settings, report))
    return Ordered(examples, settings, seed, corpus.name, processes)


def _held_out_rows(corpus: Corpus | Labelled, tokenizer: PreTrainedTokenizerBase, settings: RecoverSettings) -> list[Example]:
    """Returns the held-out rows, drawn with a fixed seed, so that runs of all seeds use the same rows. Labelled rows are all used."""
    wanted, seq_len = settings.held_out_windows, settings.seq_len or TRAINING_TOKENS
    match corpus:
        case Labelled():
            return labelled_examples(corpus, tokenizer, seq_len)
        case Corpus():
            form = replace(record_format(settings), packing=False)
            return spread(make_examples(corpus, tokenizer, seq_len, wanted=wanted, seed=0, records=form), wanted)


def _training_device(model: PreTrainedModel) -> torch.device:
    """Returns the device of the model, if the Trainer can use it.

    Raises:
        InputError: The model is on another GPU than the one that the Trainer uses (the first, or the one assigned to this process).
    """
    device = model.device
    if device.type == "cuda" and device.index not in (None, int(os.environ.get("LOCAL_RANK", "0"))):
        raise InputError(
            f"training runs on the first visible GPU, not on `device={device}`; "
            f"set CUDA_VISIBLE_DEVICES={device.index} and use `device=cuda`"
        )
    return device


def _identity(
    model: PreTrainedModel, settings: RecoverSettings, ranks: RankPlan | None, seed: int, teacher: Teacher | None
) -> dict[str, str]:
    """Returns the inputs that would change the result of a run, other than its data."""
    return {
        "model": fingerprint(model),
        "seed": str(seed),
        "ranks": str(ranks.ranks) if ranks else "none",
        "processes": str(process_count()),
        "teacher": teacher.fingerprint if teacher else "none",
        "teacher-cache": "none" if settings.teacher_cache is None else "some",
        **{name.replace("_", "-"): str(value) for name, value in settings.decisive().items()},
    }


def _last_checkpoint(work: Path, identity: Mapping[str, str]) -> Checkpoint | None:
    """Returns the last checkpoint of this run, or None without one.

    Raises:
        TrainingError: The checkpoint is damaged, or belongs to another run.
    """
    found = checkpoints(work)
    if not found:
        return None
    checkpoint = read_checkpoint(found[-1])
    before = checkpoint.progress["identity"]
    for name in identity:
        if before.get(name) != identity[name]:
            raise TrainingError(
                f"the checkpoints in '{work}' are of another run: {name} was {before.get(name)} and is {identity[name]}; "
                "repeat the run's own settings, or remove that folder to begin anew"
            )
    return checkpoint
