"""Ways out: adapters and models in the forms that other programs read, found by name in :data:`EXPORTERS`."""

from regraft.export import peft_lora
from regraft.export.contract import EXPORTERS, Exportable, Exporter

__all__ = ["EXPORTERS", "Exportable", "Exporter", "peft_lora"]
