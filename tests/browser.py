"""A page in headless Chromium, where it is installed (Debian's package ``chromium``)."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; Debian's package: apt install chromium")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=8000", "--enable-logging=stderr"),
)


def opened(page: Path, *flags: str) -> tuple[str, list[str]]:
    """Opens a page.

    Args:
        page: An HTML file.
        flags: More flags; ``--screenshot=FILE`` makes a picture.

    Returns:
        What the page has become after its scripts ran, and what it wrote to the console.
    """
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="regraft-chromium-") as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", *flags, page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)
