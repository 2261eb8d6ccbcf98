"""Recovery: training of an adapter on the frozen weights of a pruned model (LLM-Pruner, arXiv 2305.11627, section 3.3).

The task is language modelling on text or instruction tuning on records, with the Hugging Face Trainer, in three steps with a value each: a
checked :class:`~regraft.training.job.Job`, a :class:`Trained` adapter, a :class:`Recovered` model. The seed alone decides the order of the
data, the adapter's initial values and dropout. So, on the same machine, a run that was killed and resumed ends with the same bytes as an
uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from regraft.adapters import Evidence
from regraft.adapters.seeding import isolated
from regraft.atomic import write_text
from regraft.claims import output_of
from regraft.compat import stop_recomputing
from regraft.data.labelled import Labelled
from regraft.data.text import Corpus
from regraft.errors import InputError, OutputError, TrainingError
from regraft.plans import RankPlan
from regraft.platforms import peak_memory_bytes
from regraft.progress import Say, Step, say_nothing
from regraft.reading import read_object
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import Injected, inject, merge
from regraft.surgery.adapters import finish as finish_adapter
from regraft.surgery.probe import TEXTS, Probe, probe
from regraft.training.callbacks import AfterStep, Keeper, LogRow, Pace, Told
from regraft.training.checkpoint import checkpoints, put_tensors, trained_tensors
from regraft.training.distill import Distillation, Teacher, fit_projections
from regraft.training.distributed import filled, is_main, skeleton_of
from regraft.training.four_bit import in_four_bits
from regraft.training.job import DataCounts, Job, prepare
from regraft.training.optimizer import ParameterGroup, parameter_groups
from regraft.training.precision import trainable_weights
from regraft.training.rates import Rate, Rates, shortened, steps_of_a_sweep, try_rates
from regraft.training.teacher_cache import TeacherCache
from regraft.training.trainer import RecoveryTrainer

# Number of training batches for fitting the maps from a teacher's hidden states to the width of the student's.
_PROJECTION_BATCHES = 4
_TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"
RATES = "rates.json"  # in the work folder: the learning rates that were tried


@dataclass(frozen=True)
class Trained:
    """A job after training, its adapter still inside the model.

    Attributes:
        injected: The model with its adapter, which holds the weights with the lowest held-out loss.
        log: The loss log, from step 0.
        best_step: The step whose weights were kept; 0 when training never lowered the held-out loss.
        best_loss: Held-out loss there, in nats a token.
        first_loss: Held-out loss before the first step.
        seconds: Wall-clock time of training, over all its sittings.
        peak_memory_bytes: Peak memory of the GPU, or of this process.
        rates: The learning rates that were tried before; None where there was no sweep.
    """

    injected: Injected
    log: tuple[LogRow, ...]
    best_step: int
    best_loss: float
    first_loss: float
    seconds: float
    peak_memory_bytes: int
    rates: Rates | None = None


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
        data: What became of the rows of the training data.
        rates: The learning rates that were tried before; None where there was no sweep.
        trained: What the model computed on a few tokens before the adapter was merged; None in a process that saves nothing.
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
    data: DataCounts = field(default_factory=DataCounts)
    rates: Rates | None = None
    trained: Probe | None = None


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
    say: Say = say_nothing,
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
        say: Called with each step of training, and with the rows that the teacher has processed.

    Raises:
        InputError: A setting does not fit the model: rank, window, tracker, device.
        MissingDependencyError: Weights in 4 bits were requested, and bitsandbytes is not installed.
        ModelError: The teacher has another vocabulary.
        DataError: The data are fewer than one batch.
        PlanError: The rank plan does not fit the model.
        TrainingError: The loss became NaN or infinite, or the checkpoints belong to another run. The checkpoints are kept.
        OutputError: A checkpoint cannot be written. Earlier ones are kept.
    """
    job = prepare(model, tokenizer, train, held_out, settings, seed=seed, work=work, resume=resume, teacher=teacher)
    return finish(job, train_adapter(job, injected, say))


def train_adapter(job: Job, injected: Injected | None = None, say: Say = say_nothing) -> Trained:
    """Trains the adapter of a job on its model, in place, and puts the weights with the lowest held-out loss into it.

    Args:
        job: Everything that was checked.
        injected: The model with an adapter whose training is continued; None to put the settings' adapter on the model.
        say: Called with each step of training.

    Raises:
        InputError: The rank or a target does not fit the model.
        PlanError: The rank plan does not fit the model.
        TrainingError: The loss became NaN or infinite. The checkpoints stay.
        OutputError: A checkpoint cannot be written. The ones before stay.
    """
    settings, model, compute = job.settings, job.model, job.compute
    evidence = job.evidence()
    injected = injected if injected is not None else inject(model, settings, job.ranks, job.seed, evidence)
    groups = _groups_or_nothing(injected, settings)
    _make_folder(job.work)
    keeper = Keeper(job.work, injected, job.identity, job.resumed, settings.patience)
    with _as_it_was(model, job.work), trainable_weights(model, compute), _taught_in(job.teacher, compute), isolated(job.seed):
        cache = _filled_cache(job, say)
        distillation = _distillation(job, injected, evidence)
        with in_four_bits(injected.model, compute) if settings.load_in_4bit else nullcontext():
            rates = _swept(job, injected, say, distillation, cache)
            if rates is not None:
                groups = parameter_groups(injected, settings.model_copy(update={"lr": rates.best}))
            callbacks = (Pace(settings.eval_every, job.seed), AfterStep(injected), keeper, Told(say))
            trainer = RecoveryTrainer(job, injected, groups, callbacks, distillation, cache)
            injected = _with_best_weights(trainer, keeper, injected, checkpoints(job.work)[-1] if job.resumed else None)
            peak_bytes = _peak_memory_bytes(model.device)
    return Trained(
        injected=injected,
        log=tuple(keeper.rows),
        best_step=keeper.best_step,
        best_loss=keeper.best_loss_nats,
        first_loss=keeper.first_loss_nats,
        seconds=keeper.seconds,
        peak_memory_bytes=peak_bytes,
        rates=rates,
    )


def finish(job: Job, trained: Trained) -> Recovered:
    """Makes the adapter what is kept (trimmed or quantised, where its options say so) and folds it in, unless it is to stay beside."""
    injected, keep = trained.injected, not job.settings.merge
    count = injected.trainable_parameters
    # In the types of training: what an adapter in float32 is folded into is rounded once, at the end.
    with trainable_weights(injected.model, job.compute), isolated(job.seed):
        finish_adapter(injected)
        texts = [row.input_ids.tolist() for row in job.held_out[:TEXTS]]
        computed = probe(injected.module, texts=texts) if is_main() else None
        model = injected.module if keep else merge(injected)
    return Recovered(
        model=model.eval(),
        injected=injected if keep else None,
        log=trained.log,
        best_step=trained.best_step,
        best_loss=trained.best_loss,
        first_loss=trained.first_loss,
        trainable_parameters=count,
        ranks=job.ranks,
        seconds=trained.seconds,
        peak_memory_bytes=trained.peak_memory_bytes,
        data=job.data,
        rates=trained.rates,
        trained=computed,
    )


def _swept(job: Job, injected: Injected, say: Say, distillation: Distillation | None, cache: TeacherCache | None) -> Rates | None:
    """Tries learning rates, and leaves the adapter as it was; a resumed run reads what it tried before its first checkpoint.

    Each short run begins with the same values and draws, so that only the rate differs.
    """
    steps, kept = steps_of_a_sweep(job), job.work / RATES
    if not steps:
        return None
    if job.resumed is not None and kept.is_file():
        values = read_object(kept, TrainingError)
        return Rates(tuple(Rate(**rate) for rate in values["tried"]), values["steps"])
    first, state = trained_tensors(injected.module), injected.adapter.state(injected.module)
    state = {name: tensor.clone() for name, tensor in state.items()}

    def loss_of(lr: float) -> float:
        short = shortened(job, lr, steps)
        _make_folder(short.work)
        keeper = Keeper(short.work, injected, job.identity, None)
        groups = parameter_groups(injected, short.settings)
        with isolated(job.seed):
            told = Told(say, f"trying the learning rate {lr:g}")
            callbacks = (Pace(steps, job.seed), AfterStep(injected), keeper, told)
            trainer = RecoveryTrainer(short, injected, groups, callbacks, distillation, cache)
            try:
                _with_best_weights(trainer, keeper, injected, None)
            except TrainingError:
                if not keeper.rows:  # not the rate, but the model
                    raise
                return math.inf
            finally:
                injected.module.zero_grad(set_to_none=True)
                put_tensors(injected.module, first)
                injected.adapter.put_state(injected.module, state)
        return keeper.rows[-1].held_out_loss_nats or math.inf

    rates = Rates(try_rates(injected.adapter.defaults.lr, loss_of), steps)
    shutil.rmtree(job.work / "rates", ignore_errors=True)
    write_text(kept, json.dumps(dataclasses.asdict(rates), indent=1) + "\n")
    return rates


def _with_best_weights(trainer: RecoveryTrainer, keeper: Keeper, injected: Injected, checkpoint: Path | None) -> Injected:
    """Trains, from a checkpoint or from the start, and returns the plain, unwrapped model with the best weights."""
    skeleton = skeleton_of(injected.module) if trainer.is_fsdp_enabled else None
    try:
        if checkpoint is not None and keeper.resumes_what_has_stopped:
            keeper.begin(injected.module)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except TrainingError as error:
        raise TrainingError(f"{error}{keeper.where_the_best_is()}") from None
    keeper.put_best()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    stop_recomputing(trainer.args, injected.model)
    if skeleton is None:
        return injected
    inner = next(name for name, module in injected.module.named_modules() if module is injected.model)
    assert trainer.model is not None
    whole = filled(skeleton, trainer.model)
    return dataclasses.replace(injected, module=whole, model=cast(PreTrainedModel, whole.get_submodule(inner)))


def _filled_cache(job: Job, say: Say) -> TeacherCache | None:
    """Fills the teacher's cache on disk and frees the teacher; returns None if no cache is used."""
    teacher, settings = job.teacher, job.settings
    if teacher is None or settings.teacher_cache is None or settings.distill == 0.0:
        return None
    if settings.distill_hidden:
        raise InputError("`distill_hidden` needs the teacher's hidden states, which `teacher_cache` does not keep; give one of the two")
    cache = TeacherCache(settings.teacher_cache, teacher, settings, job.compute)
    asked = "asking the teacher"
    cache.fill(teacher, job.rows.wanted(), settings.batch, job.padding, lambda done, rows: say(Step(asked, done, rows)))
    teacher.release()
    return cache


def _distillation(job: Job, injected: Injected, evidence: Evidence) -> Distillation | None:
    """Returns the loss with a teacher, or None where there is none or nothing is asked of it."""
    teacher, settings = job.teacher, job.settings
    if teacher is None or (settings.distill == 0.0 and settings.distill_hidden == 0.0):
        return None
    projections: tuple[Tensor, ...] = ()
    if settings.distill_hidden:
        batches = evidence.batches(_PROJECTION_BATCHES)
        projections = fit_projections(injected.model, teacher.present(), batches, job.compute)
    return Distillation(injected.model, teacher.model, settings, job.compute, projections)


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


def _make_folder(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write '{work}': {error.strerror}; choose another `output`") from None


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
    return peak_memory_bytes()
