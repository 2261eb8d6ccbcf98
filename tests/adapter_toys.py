"""Every built-in adapter in every form, for the checks of :mod:`regraft.testing` and for tests of single adapters."""

from __future__ import annotations

from regraft.testing.adapters import AdapterForm as Form
from regraft.testing.adapters import scramble
from regraft.testing.toys import FULL_NAMES, LAYERS, Toy, batch, evidence, logits, toy

__all__ = ["FORMS", "FULL_NAMES", "LAYERS", "Form", "Toy", "batch", "evidence", "logits", "scramble", "toy"]

FORMS: dict[str, Form] = {
    "deep_lora": Form("deep_lora", start=1e-9),
    "deep_lora-frozen": Form("deep_lora", ("gamma=0", "depth=2", "epsilon=0.01"), start=1e-4),
    "deep_lora-narrow": Form("deep_lora", ("form=narrow",), start=1e-9),
    "deep_lora-full": Form("deep_lora", ("form=full",), start=1e-9, exports=False),
    "nola": Form("nola", ("bases=16",)),
    "nola-4bit": Form("nola", ("bases=70", "bits=4")),
    "lora_xs": Form("lora_xs", start=1e-3),
    "diagonal": Form("diagonal"),
    "block_lora": Form("block_lora", ("blocks=3",)),
    "block_lora-auto": Form("block_lora"),
    "mora-sharing": Form("mora", ("form=sharing",)),
    "mora-rotation": Form("mora", exports=False),
    "lora": Form("lora"),
    "rslora": Form("rslora"),
    "dora": Form("dora", exports=False),
    "olora": Form("olora"),
    "pissa": Form("pissa"),
    "eva": Form("eva", ("batches=2",), layers=("linear", "conv1d")),
    "adalora": Form("adalora", layers=("linear", "conv1d")),
}
