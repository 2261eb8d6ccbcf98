"""The model card of seedling: card.md, filled in with figures and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("card.md")
_ROWS = ("seedling", "5-gram", "unigram", "xz -9e", "gzip -9")


def card(held_out: dict[str, Any], parameters: int) -> str:
    """Returns the model card as Markdown.

    Args:
        held_out: What held_out.json says.
        parameters: Parameters of the model, tied ones once.
    """
    measured, training = held_out["measured"], held_out["training"]
    return _TEMPLATE.read_text(encoding="utf-8").format(
        parameters=parameters,
        rows="\n".join(_row(name, measured[name]) for name in _ROWS),
        train_documents=training["documents"],
        train_bytes=training["document_bytes"],
        train_tokens=training["document_tokens"],
        epochs=training["tokens_seen"] / training["document_tokens"],
        minutes=training["seconds"] / 60,
        precision="bf16 autocast over fp32 weights" if training["bf16_autocast"] else "fp32",
        **{key: held_out["split"][key] for key in ("rule", "test", "validation")},
        **{key: measured[key] for key in ("documents", "text_bytes", "tokens_scored", "stride_tokens")},
        **{key: value for key, value in training.items() if key not in ("documents", "seconds")},
        **held_out["versions"],
        **held_out["machine"],
    )


def _row(name: str, figure: dict[str, float | None]) -> str:
    loss = figure["loss_nats_per_token"]
    shown = "-" if loss is None else f"{loss:.3f}"
    bits = f"{figure['bits_per_byte']:.3f}"
    return f"| **{name}** | **{shown}** | **{bits}** |" if name == "seedling" else f"| {name} | {shown} | {bits} |"
