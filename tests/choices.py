"""What has to be the same of two plans that were made from numbers which differ by rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from regraft.plans import PrunePlan


def assert_same_choice(got: PrunePlan, want: PrunePlan) -> None:
    """Everything but the importance that went is equal; that is near."""
    assert replace(got, removed={}) == replace(want, removed={})
    assert got.removed.keys() == want.removed.keys()
    for name, removed in want.removed.items():
        assert got.removed[name].units == removed.units
        assert got.removed[name].importance == pytest.approx(removed.importance, rel=1e-3, abs=1e-12), name
