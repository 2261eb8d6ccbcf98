"""What a page is made of beside its contents: its style, its script, and Plotly, packed so that a page stays small."""

from __future__ import annotations

import base64
import gzip
from functools import cache
from importlib.resources import files
from importlib.util import find_spec


def style() -> str:
    """Returns the style sheet of every page."""
    return _own("page.css")


def script() -> str:
    """Returns the script of every page: it sorts tables, unpacks Plotly and draws the pictures."""
    return _own("page.js")


@cache
def packed_plotly() -> str | None:
    """Returns the library of Plotly as gzip in base64, about 2 MB; None where the package ``plotly`` is not installed."""
    if find_spec("plotly") is None:
        return None
    source = files("plotly") / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(source.read_bytes(), 9, mtime=0)).decode()


def _own(name: str) -> str:
    return (files("regraft.report") / name).read_text(encoding="utf-8")
