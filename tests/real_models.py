"""Where the standing real model lies, for tests that need one that nobody here trained."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest


def smollm2() -> Path:
    """Returns the folder of SmolLM2-135M-Instruct, or skips the test where nobody has made it."""
    folder = Path(os.environ.get("REGRAFT_REAL_MODEL") or Path(tempfile.gettempdir()) / "real_model" / "SmolLM2-135M-Instruct")
    if not (folder / "config.json").is_file():
        pytest.skip(f"no real model in '{folder}'; make it with scripts/real_model.py")
    return folder
