"""Settings of an export."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from regraft.settings.base import Settings


class ExportSettings(Settings):
    """Settings of writing a model."""

    quantize: str = Field(
        default="",
        description="type of the matrices in GGUF: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, Q3_K_M; default: as loaded",
    )
    importance: Path | None = Field(
        default=None, description="text whose activations weigh the errors of K quantization; default: all errors weigh alike"
    )
    architecture: str = Field(
        default="", description="GGUF architecture, such as deci, openelm or step35; default: the plainest that holds the model"
    )
    shard_size: str = Field(default="5GB", description="size of the largest weight file of the Hugging Face formats")
    check_positions: int = Field(default=64, gt=0, description="number of next-token distributions that the check compares")
