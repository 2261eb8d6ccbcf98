"""Recovery: train a LoRA beside a pruned model's frozen weights (LLM-Pruner, arXiv 2305.11627, section 3.3).

Language modelling on text or instruction tuning on records, with the Hugging Face Trainer. The seed alone decides the order of
the data, the adapter's first values and dropout, so that a run that was killed and resumed ends with the same bytes as one that
was not, on the same machine.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging as transformers_logging

from regraft.adapters.isolation import isolated
from regraft.data.text import Corpus
from regraft.data.tokens import window_tokens
from regraft.errors import InputError, OutputError, TrainingError, did_you_mean
from regraft.models.view import fingerprint
from regraft.plans import RankPlan, from_json
from regraft.settings import TRAINING_TOKENS, RecoverSettings
from regraft.surgery.adapters import Injected, inject, merge
from regraft.training.batches import Example, Ordered, digest, make_examples, padding_token, spread
from regraft.training.callbacks import Bar, Keeper, LogRow, Pace
from regraft.training.checkpoint import Checkpoint, checkpoints, read_checkpoint
from regraft.training.optimizer import ParameterGroup, parameter_groups
from regraft.training.precision import compute_dtype, trainable_weights
from regraft.training.trainer import RecoveryTrainer, training_arguments

_NO_EFFECT_ON_THE_RESULT = frozenset({"merge", "report_to", "quiet", "data", "held_out", "ranks"})
_TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"


@dataclass(frozen=True)
class Recovered:
    """What recovery gave.

    Attributes:
        model: The recovered model: without adapter when it was merged, else with the adapter inside.
        injected: The model with its adapter, for saving it; None when it was merged.
        log: The loss log, from step 0.
        best_step: The step whose weights were kept: the one with the lowest held-out loss; 0 when training never lowered it.
        best_loss: Held-out loss there, in nats a token.
        first_loss: Held-out loss before the first step.
        trainable_parameters: How many numbers were trained.
        ranks: The rank plan that was followed, or None.
        seconds: Wall-clock time of training, over all its sittings.
        peak_memory_bytes: Of the GPU, or of this process.
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
    train: Corpus,
    held_out: Corpus,
    settings: RecoverSettings,
    *,
    seed: int,
    work: Path,
    resume: bool = False,
) -> Recovered:
    """Trains an adapter on a model, in place, and keeps the weights with the lowest held-out loss.

    Args:
        model: Of a known family, on the device where it trains. Weights in float16 are held in float32 while training, bfloat16
            ones too unless the products are bfloat16; afterwards each has its own type again.
        tokenizer: The model's.
        train: Text (packed into windows) or instruction records (padded, learned on the response).
        held_out: From elsewhere; its loss chooses the best checkpoint.
        settings: Everything that can be set.
        seed: Of the data's order, the adapter's first values and dropout. The global generators stay untouched.
        work: Folder of the checkpoints; it stays, for the caller to remove once the result is safe.
        resume: Go on from the last checkpoint in ``work``; with none there, begin.

    Raises:
        InputError: A setting does not fit the model: rank, window, tracker, device.
        DataError: There is less data than one batch.
        PlanError: The rank plan does not fit the model.
        TrainingError: The loss became NaN or infinite, or the checkpoints are of another run. The checkpoints stay.
        OutputError: A checkpoint cannot be written. The ones before stay.
    """
    device = _training_device(model)
    compute = compute_dtype(settings.precision, device)
    check_trackers(settings.report_to)
    seq_len = window_tokens(settings.seq_len, TRAINING_TOKENS, model.config, "--seq-len")
    settings = settings.model_copy(update={"seq_len": seq_len})
    ranks = read_ranks(settings.ranks)
    rows = _training_rows(train, tokenizer, settings, seed)
    looked_at = _held_out_rows(held_out, tokenizer, settings)
    identity = _identity(model, settings, ranks, seed) | {"data": digest(rows.examples), "held-out data": digest(looked_at)}
    resumed = _last_checkpoint(work, identity) if resume else None
    injected = inject(model, settings, ranks, seed)
    groups = _groups_or_nothing(injected, settings)
    _make_folder(work)
    keeper, bar = Keeper(work, identity, resumed), Bar(settings.quiet)
    with _as_it_was(model, work), trainable_weights(model, compute), isolated(seed):
        trainer = RecoveryTrainer(
            injected.module,
            training_arguments(settings, work, seed, device, compute, evaluate_first=resumed is None),
            rows,
            looked_at,
            padding_token(tokenizer),
            groups,
            (Pace(settings.eval_every, seed), keeper, bar),
        )
        _train(trainer, keeper, bar, checkpoints(work)[-1] if resumed else None)
        peak_bytes = _peak_memory_bytes(device)
        trained = injected.trainable_parameters
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
    """Returns the rank plan that the settings give, read from its file where they name one.

    Raises:
        InputError: There is no such file.
        PlanError: It holds no rank plan.
    """
    if not isinstance(ranks, Path):
        return ranks
    try:
        return from_json(RankPlan, ranks.read_bytes())
    except OSError as error:
        raise InputError(f"rank plan '{ranks}' cannot be read ({error.strerror}); give a JSON file, such as ranks.json") from None


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that the Trainer does not know or that are not installed.

    Raises:
        InputError: The message says what is known, or what to install.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise InputError(f"unknown tracker '{name}'; known: {known}{did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            library = {"azure_ml": "azureml-mlflow", "kubeflow": "kubeflow-training"}.get(name, name)
            raise InputError(f"tracker '{name}' is not installed; get it with: pip install {library}")


def _train(trainer: RecoveryTrainer, keeper: Keeper, bar: Bar, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint or from the start, and leaves the best weights in the plain, unwrapped model."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except TrainingError as error:
        raise TrainingError(f"{error}{keeper.where_the_best_is()}") from None
    finally:
        bar.close()
    keeper.put_best()
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()


def _groups_or_nothing(injected: Injected, settings: RecoverSettings) -> list[ParameterGroup]:
    """Returns the parameter groups, or takes the adapter off again where they cannot be made."""
    try:
        return parameter_groups(injected, settings)
    except InputError:
        merge(injected)
        raise


def _training_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: RecoverSettings, seed: int) -> Ordered:
    wanted = settings.steps * settings.accumulate * settings.batch
    examples = make_examples(corpus, tokenizer, settings.seq_len or TRAINING_TOKENS, wanted=wanted, seed=seed)
    return Ordered(examples, settings, seed, corpus.name)


def _held_out_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: RecoverSettings) -> list[Example]:
    """Draws with a fixed seed: runs of several seeds are judged on the same rows."""
    wanted = settings.held_out_windows
    return spread(make_examples(corpus, tokenizer, settings.seq_len or TRAINING_TOKENS, wanted=wanted, seed=0), wanted)


def _training_device(model: PreTrainedModel) -> torch.device:
    """Returns the device of the model, if the Trainer can use it.

    Raises:
        InputError: It is a GPU other than the first, which is the one the Trainer takes.
    """
    device = model.device
    if device.type == "cuda" and device.index not in (None, 0):
        raise InputError(
            f"training runs on the first visible GPU, not on --device {device}; "
            f"set CUDA_VISIBLE_DEVICES={device.index} and use --device cuda"
        )
    return device


def _identity(model: PreTrainedModel, settings: RecoverSettings, ranks: RankPlan | None, seed: int) -> dict[str, str]:
    """Returns what a run is of, apart from its data: whatever would change its result."""
    plain = settings.model_dump(mode="json", exclude=set(_NO_EFFECT_ON_THE_RESULT))
    return {
        "model": fingerprint(model),
        "seed": str(seed),
        "ranks": str(ranks.ranks) if ranks else "none",
        **{name.replace("_", "-"): str(value) for name, value in plain.items()},
    }


def _last_checkpoint(work: Path, identity: Mapping[str, str]) -> Checkpoint | None:
    """Reads the last checkpoint, if there is one and it is of the same run.

    Raises:
        TrainingError: It is damaged, or of another run.
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
    """Puts back what the Trainer changes beside the weights, and gives TensorBoard a folder that outlives the checkpoints.

    The Trainer sets the config's ``use_cache``, which would be saved with the model, and the verbosity of transformers.
    """
    verbosity, use_cache = transformers_logging.get_verbosity(), getattr(model.config, "use_cache", None)
    chosen = os.environ.get(_TENSORBOARD_FOLDER)
    beside = work.name.removeprefix(".").removesuffix(".work")
    os.environ[_TENSORBOARD_FOLDER] = chosen or str(work.with_name(f"{beside}.tensorboard"))
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
