"""Export of adapters and models in formats of other programs, found by name in :data:`EXPORTERS`."""

from regraft.export.contract import EXPORTERS, AdapterFormat, Exportable, Exporter, ModelFormat, Parity, Written

__all__ = [
    "EXPORTERS",
    "AdapterFormat",
    "Exportable",
    "Exporter",
    "ModelFormat",
    "Parity",
    "Written",
]
