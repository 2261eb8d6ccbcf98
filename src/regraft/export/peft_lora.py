"""A plain LoRA that stock PEFT and stricter servers load: one zero-padded rank, alpha equal to it, the scale inside B."""

from __future__ import annotations

from pathlib import Path

from regraft.adapters.plain_lora import task_type_of, write_plain_lora
from regraft.errors import InputError
from regraft.export.contract import EXPORTERS, AdapterFormat, Exportable, Holding


def write(adapter: Exportable, folder: Path) -> str:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        adapter: An adapter that changes at least one module.
        folder: An empty folder.

    Raises:
        InputError: Nothing is adapted.
    """
    if not adapter.factors:
        raise InputError("the adapter changes no module (all were trimmed away), so there is nothing to export; train it again")
    task = task_type_of(adapter.model)
    rank = write_plain_lora(adapter.factors, adapter.modules, adapter.names, folder, adapter.base, task, adapter.head)
    return f"a plain LoRA of rank {rank} on {len(adapter.factors)} modules"


EXPORTERS.add(
    "peft-lora",
    AdapterFormat(
        "an adapter as a plain LoRA, without its base",
        (
            Holding(
                "PEFT, and servers that load its adapters",
                "all",
                "the base's layers",
                "float32",
                "one rank for all modules, filled up with zeros",
                "run",
            ),
        ),
        write,
    ),
)
