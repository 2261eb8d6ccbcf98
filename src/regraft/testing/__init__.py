"""The conformance suite for authors of methods: one function for each kind, to be called from a test of your own.

Each check builds a tiny model or a planted problem, runs the method, and raises :class:`NonconformingError` with what is wrong. The
built-in methods go through the same checks. Whether a method is a good one no check can know: prove its formula beside it.

Example:
    >>> from regraft.importance import CRITERIA
    >>> from regraft.testing import check_criterion
    >>> check_criterion(CRITERIA.get("l2"))
"""

from regraft.testing.adapters import AdapterForm, check_adapter
from regraft.testing.allocators import check_allocator
from regraft.testing.compressors import Watched, check_compressor
from regraft.testing.criteria import check_criterion
from regraft.testing.exporters import check_exporter
from regraft.testing.planted import World, space_of
from regraft.testing.require import NonconformingError
from regraft.testing.selectors import check_selector

__all__ = [
    "AdapterForm",
    "NonconformingError",
    "Watched",
    "World",
    "check_adapter",
    "check_allocator",
    "check_compressor",
    "check_criterion",
    "check_exporter",
    "check_selector",
    "space_of",
]
