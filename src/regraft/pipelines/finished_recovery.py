"""The folder that a recovery was saved to, read again as the result that it was saved from."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regraft.adapters import ADAPTERS
from regraft.errors import OutputError, shown
from regraft.models.classifier import load_classifier
from regraft.models.load import load as load_model
from regraft.plans import Provenance
from regraft.reading import read_bytes, read_object, real_number, whole_number
from regraft.settings import LoadSettings, RecoverSettings
from regraft.surgery.adapter_files import is_master
from regraft.surgery.adapter_folder import attached, is_adapter, load_master
from regraft.surgery.adapters import Injected, whole
from regraft.training.callbacks import LogRow
from regraft.training.recover import Recovered

LOSS_LOG = "training_log.csv"
TIMINGS = "timings.json"
TRAINED = "trainable_parameters"  # key of the record


def read_finished(
    folder: Path, record: Provenance, settings: RecoverSettings, load: LoadSettings, classes: Sequence[str] | None
) -> Recovered:
    """Reads a model, or an adapter on its base, with the losses of its training.

    Args:
        folder: What a recovery was saved to.
        record: Its record.
        settings: The settings of that recovery.
        load: How it is loaded.
        classes: Names of the classes of a model for labels, empty for regression; None for a language model.

    Raises:
        OutputError: The loss log is missing or damaged.
        ModelError: The model, the adapter or its base cannot be loaded.
    """
    rows = _read_log(folder / LOSS_LOG)
    measured = [(row.held_out_loss_nats, row.step) for row in rows if row.held_out_loss_nats is not None]
    if not measured:
        raise OutputError(f"'{folder / LOSS_LOG}' holds no held-out loss; remove '{folder}' and recover again")
    best_loss, best_step = min(measured)
    injected: Injected | None = None
    if is_master(folder):
        _, injected = load_master(folder, load)
    elif is_adapter(folder):
        base, adapted = attached(folder, load)
        injected = Injected(adapted, base.model, whole(ADAPTERS.get(settings.adapter)), frozenset())
    model = injected.module if injected is not None else _loaded(folder, load, classes)
    timings = read_object(folder / TIMINGS, OutputError) if (folder / TIMINGS).is_file() else {}
    return Recovered(
        model=model,
        injected=injected,
        log=rows,
        best_step=best_step,
        best_loss=best_loss,
        first_loss=measured[0][0],
        trainable_parameters=whole_number(record.settings.get(TRAINED, 0), TRAINED, 0, 10**15, OutputError),
        ranks=record.ranks,
        seconds=real_number(timings.get("seconds", 0.0), f"'{folder / TIMINGS}': seconds", -1.0, 1e12, OutputError),
        peak_memory_bytes=whole_number(
            timings.get("peak_memory_bytes", 0), f"'{folder / TIMINGS}': peak_memory_bytes", 0, 10**15, OutputError
        ),
    )


def _loaded(folder: Path, load: LoadSettings, classes: Sequence[str] | None) -> Any:
    return (load_model(folder, load) if classes is None else load_classifier(folder, classes, load)).model


def _read_log(path: Path) -> tuple[LogRow, ...]:
    """Reads the loss log that :func:`regraft.training.callbacks.log_csv` wrote; the times are not in it."""
    try:
        rows = csv.DictReader(io.StringIO(read_bytes(path, OutputError).decode("utf-8")))
        numbers = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
        return tuple(LogRow(int(row["step"] or 0), row["lr"], row["train_loss_nats"], row["held_out_loss_nats"], 0.0) for row in numbers)
    except (ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        raise OutputError(f"'{path}' is damaged ({shown(error, 100)}); remove the output and recover again") from None
