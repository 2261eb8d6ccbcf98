"""Recovery: training of an adapter on the frozen weights of a pruned model (LLM-Pruner, arXiv 2305.11627, section 3.3).

The task is language modelling on text or instruction tuning on records, with the Hugging Face Trainer. The seed alone decides the order
of the data, the adapter's initial values and dropout. So, on the same machine, a run that was killed and resumed ends with the same bytes
as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging as transformers_logging

from regraft.adapters import Evidence
from regraft.adapters.seeding import isolated
from regraft.claims import output_of
from regraft.data.labelled import Labelled
from regraft.data.text import Corpus
from regraft.data.tokens import window_tokens
from regraft.errors import InputError, OutputError, PlanError, TrainingError, did_you_mean
from regraft.models.classifier import row_limit
from regraft.models.view import fingerprint
from regraft.plans import RankPlan, from_json
from regraft.settings import TRAINING_TOKENS, RecoverSettings
from regraft.surgery.adapters import Injected, finish, inject, merge
from regraft.training.batches import Example, Ordered, RecordFormat, digest, is_blind_to_neighbours, make_examples, padding_token, spread
from regraft.training.callbacks import AfterStep, Bar, Keeper, LogRow, Pace
from regraft.training.checkpoint import Checkpoint, checkpoints, read_checkpoint
from regraft.training.distill import Distillation, Teacher, check_vocabulary, fit_projections
from regraft.training.distributed import filled, join_processes, process_count, skeleton_of
from regraft.training.four_bit import check_four_bits, in_four_bits
from regraft.training.labelled import labelled_examples
from regraft.training.optimizer import ParameterGroup, parameter_groups
from regraft.training.precision import compute_dtype, trainable_weights
from regraft.training.teacher_cache import TeacherCache
from regraft.training.trainer import LABELS, TOKENS, Reading, RecoveryTrainer, training_arguments

# Number of training batches for fitting the maps from a teacher's hidden states to the width of the student's.
_PROJECTION_BATCHES = 4
_TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"


@dataclass(frozen=True)
class Recovered:
    """Result of a recovery.

    Attributes:
        model: The recovered model: without adapter if it was merged, else with it.
        injected: The model with its adapter, for saving it; None when it was merged.
        log: The loss log, from step 0.
        best_step: The step with the lowest held-out loss, whose weights were kept; 0 if training never lowered the loss.
        best_loss: Held-out loss at the best step, in nats a token.
        first_loss: Held-out loss before the first step.
        trainable_parameters: Number of trained parameters.
        ranks: The rank plan that was used, or None.
        seconds: Wall-clock time of training, summed over interrupted runs.
        peak_memory_bytes: Peak memory of the GPU, or of this process.
    """

    model: nn.Module
    injected: Injected | None
    log: tuple[LogRow, ...]
    best_step: int
    best_loss: float
    first_loss: float
    trainable_parameters: int
    ranks: RankPlan | None
    seconds: float
    peak_memory_bytes: int


def recover(
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
    injected: Injected | None = None,
) -> Recovered:
    """Trains an adapter on a model, in place, and keeps the weights with the lowest held-out loss.

    If a launcher started several processes, all of them call this function with the same arguments, and each trains on its own batches: a
    step has ``processes`` times as many rows. Only the first process writes files.

    Args:
        model: A model of a known family or with a head for labels, on the device where it trains. Weights in float16 are held in
            float32 while training, bfloat16 ones too unless the products are bfloat16; afterwards each has its own type again.
        tokenizer: Tokenizer of the model.
        train: Text (packed into windows), instruction records (padded or packed, with loss on the response), or labelled texts.
        held_out: Held-out data, disjoint from the training data; their loss, without distillation, chooses the best checkpoint.
        settings: Settings of the recovery.
        seed: Seed of the data order, the adapter's initial values and dropout. The global generators are not changed.
        work: Folder of the checkpoints, which the caller removes once the result is saved.
        resume: Whether to continue from the last checkpoint in ``work``, if there is one.
        teacher: The model to learn from; None for the task loss alone. It is freed once its outputs are in ``settings.teacher_cache``.
        injected: The model with an adapter whose training is continued; None to put the settings' adapter on the model.

    Raises:
        InputError: A setting does not fit the model: rank, window, tracker, device.
        MissingDependencyError: Weights in 4 bits were requested, and bitsandbytes is not installed.
        ModelError: The teacher has another vocabulary.
        DataError: The data are fewer than one batch.
        PlanError: The rank plan does not fit the model.
        TrainingError: The loss became NaN or infinite, or the checkpoints belong to another run. The checkpoints are kept.
        OutputError: A checkpoint cannot be written. Earlier ones are kept.
    """
    join_processes(model.device)
    device = _training_device(model)
    compute = compute_dtype(settings.precision, device)
    check_trackers(settings.report_to)
    if teacher is not None:
        check_vocabulary(teacher, model, tokenizer)
    if settings.load_in_4bit:
        check_four_bits(model, compute)
    seq_len = window_tokens(settings.seq_len, TRAINING_TOKENS, model.config, "--seq-len", row_limit(model))
    reading = LABELS if isinstance(train, Labelled) else TOKENS
    packing = settings.packing and isinstance(train, Corpus) and bool(train.records) and is_blind_to_neighbours(model)
    settings = settings.model_copy(update={"seq_len": seq_len, "packing": packing})
    ranks = read_ranks(settings.ranks)
    rows = _training_rows(train, tokenizer, settings, seed)
    looked_at = _held_out_rows(held_out, tokenizer, settings)
    identity = _identity(model, settings, ranks, seed, teacher) | {"data": digest(rows.examples), "held-out data": digest(looked_at)}
    resumed = _last_checkpoint(work, identity) if resume else None
    padding = padding_token(tokenizer)
    evidence = _evidence(rows, settings, padding, device, reading)
    injected = injected if injected is not None else inject(model, settings, ranks, seed, evidence)
    groups = _groups_or_nothing(injected, settings)
    _make_folder(work)
    keeper, bar = Keeper(work, injected, identity, resumed, settings.patience), Bar(settings.quiet)
    with _as_it_was(model, work), trainable_weights(model, compute), _taught_in(teacher, compute), isolated(seed):
        cache = _filled_cache(teacher, rows, settings, padding, compute, bar)
        distillation = _distillation(teacher, injected, evidence, settings, compute)
        with in_four_bits(injected.model, compute) if settings.load_in_4bit else nullcontext():
            trainer = RecoveryTrainer(
                injected.module,
                training_arguments(settings, work, seed, device, compute, evaluate_first=resumed is None),
                rows,
                looked_at,
                padding,
                groups,
                (Pace(settings.eval_every, seed), AfterStep(injected), keeper, bar),
                distillation,
                cache,
                reading,
                partial(injected.adapter.penalty, injected.module),
            )
            injected = _train(trainer, keeper, bar, injected, checkpoints(work)[-1] if resumed else None)
            peak_bytes = _peak_memory_bytes(device)
        trained = injected.trainable_parameters
        finish(injected)
        result = merge(injected) if settings.merge else injected.module
    return Recovered(
        model=result.eval(),
        injected=None if settings.merge else injected,
        log=tuple(keeper.rows),
        best_step=keeper.best_step,
        best_loss=keeper.best_loss_nats,
        first_loss=keeper.first_loss_nats,
        trainable_parameters=trained,
        ranks=ranks,
        seconds=keeper.seconds,
        peak_memory_bytes=peak_bytes,
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
        return from_json(RankPlan, ranks.read_bytes())
    except PlanError as error:
        raise PlanError(f"'{ranks}' is {error}") from None
    except OSError as error:
        raise InputError(f"rank plan '{ranks}' cannot be read ({error.strerror}); give a JSON file, such as ranks.json") from None


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


def _train(trainer: RecoveryTrainer, keeper: Keeper, bar: Bar, injected: Injected, checkpoint: Path | None) -> Injected:
    """Trains, from a checkpoint or from the start, and returns the plain, unwrapped model with the best weights."""
    skeleton = skeleton_of(injected.module) if trainer.is_fsdp_enabled else None
    try:
        if checkpoint is not None and keeper.resumes_what_has_stopped:
            keeper.begin(injected.module)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except TrainingError as error:
        raise TrainingError(f"{error}{keeper.where_the_best_is()}") from None
    finally:
        bar.close()
    keeper.put_best()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    if trainer.args.activation_checkpointing:
        injected.model.activation_checkpointing_disable()
    if skeleton is None:
        return injected
    inner = next(name for name, module in injected.module.named_modules() if module is injected.model)
    assert trainer.model is not None
    whole = filled(skeleton, trainer.model)
    return dataclasses.replace(injected, module=whole, model=cast(PreTrainedModel, whole.get_submodule(inner)))


def _filled_cache(
    teacher: Teacher | None, rows: Ordered, settings: RecoverSettings, padding: int, compute: torch.dtype, bar: Bar
) -> TeacherCache | None:
    """Fills the teacher's cache on disk and frees the teacher; returns None if no cache is used."""
    if teacher is None or settings.teacher_cache is None or settings.distill == 0.0:
        return None
    if settings.distill_hidden:
        raise InputError("--distill-hidden needs the teacher's hidden states, which --teacher-cache does not keep; give one of the two")
    cache = TeacherCache(settings.teacher_cache, teacher, settings, compute)
    cache.fill(teacher, rows.wanted(), settings.batch, padding, bar.asking)
    teacher.release()
    return cache


def _distillation(
    teacher: Teacher | None, injected: Injected, evidence: Evidence, settings: RecoverSettings, compute: torch.dtype
) -> Distillation | None:
    """Returns the distillation loss, or None without a teacher or with shares of zero."""
    if teacher is None or (settings.distill == 0.0 and settings.distill_hidden == 0.0):
        return None
    projections: tuple[Tensor, ...] = ()
    if settings.distill_hidden:
        batches = evidence.batches(_PROJECTION_BATCHES)
        projections = fit_projections(injected.model, teacher.present(), batches, compute)
    return Distillation(injected.model, teacher.model, settings, compute, projections)


@contextmanager
def _taught_in(teacher: Teacher | None, compute: torch.dtype) -> Iterator[None]:
    """Holds the teacher's weights in the dtype of its computations inside the block."""
    if teacher is None:
        yield
        return
    with trainable_weights(teacher.present(), compute):
        yield


def _groups_or_nothing(injected: Injected, settings: RecoverSettings) -> list[ParameterGroup]:
    """Returns the parameter groups; removes the adapter if they cannot be made."""
    try:
        return parameter_groups(injected, settings)
    except InputError:
        merge(injected)
        raise


def _training_rows(corpus: Corpus | Labelled, tokenizer: PreTrainedTokenizerBase, settings: RecoverSettings, seed: int) -> Ordered:
    processes = process_count()
    wanted = settings.steps * settings.accumulate * settings.batch * processes
    seq_len = settings.seq_len or TRAINING_TOKENS
    if isinstance(corpus, Labelled):
        return Ordered(labelled_examples(corpus, tokenizer, seq_len), settings, seed, corpus.name, processes)
    examples = make_examples(corpus, tokenizer, seq_len, wanted=wanted, seed=seed, records=RecordFormat(packing=settings.packing))
    return Ordered(examples, settings, seed, corpus.name, processes)


def _held_out_rows(corpus: Corpus | Labelled, tokenizer: PreTrainedTokenizerBase, settings: RecoverSettings) -> list[Example]:
    """Returns the held-out rows, drawn with a fixed seed, so that runs of all seeds use the same rows. Labelled rows are all used."""
    wanted = settings.held_out_windows
    if isinstance(corpus, Labelled):
        return labelled_examples(corpus, tokenizer, settings.seq_len or TRAINING_TOKENS)
    return spread(make_examples(corpus, tokenizer, settings.seq_len or TRAINING_TOKENS, wanted=wanted, seed=0), wanted)


def _training_device(model: PreTrainedModel) -> torch.device:
    """Returns the device of the model, if the Trainer can use it.

    Raises:
        InputError: The model is on another GPU than the one that the Trainer uses (the first, or the one assigned to this process).
    """
    device = model.device
    if device.type == "cuda" and device.index not in (None, int(os.environ.get("LOCAL_RANK", "0"))):
        raise InputError(
            f"training runs on the first visible GPU, not on --device {device}; "
            f"set CUDA_VISIBLE_DEVICES={device.index} and use --device cuda"
        )
    return device


def _evidence(rows: Ordered, settings: RecoverSettings, padding: int, device: torch.device, reading: Reading) -> Evidence:
    """Returns the batches of the first training steps, over all passes and processes, for adapters that start from data."""
    batch, passes = settings.batch, settings.accumulate * process_count()

    def batches(count: int) -> list[dict[str, Tensor]]:
        starts = range(0, min(count * passes * batch, len(rows)), batch)
        drawn = [reading.collate([rows[start + index] for index in range(batch)], padding) for start in starts]
        return [{name: tensor.to(device) for name, tensor in tensors.items()} for tensors in drawn]

    return Evidence(batches)


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


def _make_folder(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write '{work}': {error.strerror}; choose another --output") from None


@contextmanager
def _as_it_was(model: PreTrainedModel, work: Path) -> Iterator[None]:
    """Restores the settings that the Trainer changes, and gives TensorBoard a folder that is not removed with the checkpoints.

    The Trainer changes the config's ``use_cache``, which would be saved with the model, and the verbosity of transformers.
    """
    verbosity, use_cache = transformers_logging.get_verbosity(), getattr(model.config, "use_cache", None)
    chosen = os.environ.get(_TENSORBOARD_FOLDER)
    output = output_of(work)
    os.environ[_TENSORBOARD_FOLDER] = chosen or str(output.with_name(f"{output.name}.tensorboard"))
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if use_cache is not None:
            model.config.use_cache = use_cache
        if chosen is None:
            del os.environ[_TENSORBOARD_FOLDER]


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
