"""What a user sees of values: each prints in one line of less than 200 characters, however large it is."""

from __future__ import annotations

from typing import Any

import pytest

import regraft
from regraft.in_short import in_short
from regraft.plans import Cut, Group, Groups, Provenance, PrunePlan, RankPlan
from regraft.settings import AllocateSettings, EvaluateSettings, LabelSettings, LoadSettings, PruneSettings, RecoverSettings, Settings

LARGE = PrunePlan(
    "f" * 16,
    "surgeon_nats(granularity=element, reduce=sum) + removal" * 3,
    "knapsack",
    "uniform",
    0.2,
    64,
    7_000_000_000,
    5_600_000_000,
    tuple(Cut(f"layers.{layer}.ffn", tuple(range(8704))) for layer in range(32)),
    {"settings": {"ratio": 0.2}},
)
RANKS = RankPlan("f" * 16, "rankadaptor", {f"model.layers.{layer}.self_attn.q_proj": 8 for layer in range(200)})
GROUPS = Groups("f", "llama", 32, 7_000_000_000, tuple(Group(f"layers.{layer}.ffn", "ffn", layer, 8704, (), 12288) for layer in range(32)))
VALUES: list[Any] = [
    LARGE,
    RANKS,
    GROUPS,
    Provenance("regraft prune " + "x" * 300, "maker/model", "f" * 16, 3, {"torch": "1"}, plan=LARGE, ranks=RANKS),
    regraft.PruneReport(7_000_000_000, 5_600_000_000, tuple({"group": str(layer)} for layer in range(99)), ("a note " * 60,)),
    regraft.CompressReport(7_000_000_000, 5_600_000_000, tuple({"projection": str(kind)} for kind in range(99)), ("a note " * 60,)),
    regraft.LabelReport("m" * 300, "d" * 300, "classification", 9, 9, tuple(map(str, range(500))), 9, {"accuracy": 0.5}),
    regraft.ExportResult("words " * 90),
    RecoverSettings(targets=tuple(f"layers.{layer}.*" for layer in range(99)), data="x" * 400, lr=1e-3, teacher="t" * 400),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_large_value_prints_in_one_short_line(value: Any) -> None:
    assert len(repr(value)) < 200
    assert "\n" not in repr(value)
    assert repr(value).startswith(f"{type(value).__name__}(")


def test_every_result_that_is_public_has_a_short_text_of_its_own() -> None:
    kinds = [value for name in dir(regraft) if isinstance(value := getattr(regraft, name), type) and not issubclass(value, Exception)]
    results = [
        kind
        for kind in kinds
        if kind.__name__.endswith(("Result", "Report", "Plan", "Settings")) or kind.__name__ in ("Loaded", "Measurement")
    ]
    assert len(results) >= 16
    for kind in results:
        assert kind.__repr__ is not object.__repr__
        assert "__create_fn__" not in kind.__repr__.__qualname__, f"{kind.__name__} prints all its fields"
        defined = next(base for base in kind.__mro__ if "__repr__" in vars(base))
        assert defined.__module__.startswith("regraft.") or kind.__name__ == "CompressedMatrixCompletion", kind


@pytest.mark.parametrize("kind", [AllocateSettings, EvaluateSettings, LabelSettings, LoadSettings, PruneSettings, RecoverSettings])
def test_settings_print_what_was_asked_for(kind: type[Settings]) -> None:
    assert repr(kind()) == str(kind()) == f"{kind.__name__}()"


def test_settings_print_neither_defaults_nor_tokens() -> None:
    assert repr(PruneSettings(ratio=0.3, shape="uniform", targets=("ffn",))) == "PruneSettings(ratio=0.3, targets=('ffn',))"
    assert repr(LoadSettings(token="hf_secret", dtype="float32")) == "LoadSettings(dtype='float32')"


def test_numbers_of_values_stand_for_them() -> None:
    assert in_short(RANKS).startswith("RankPlan(fingerprint='ffffffffffffffff', method='rankadaptor', ranks=<200 values>")
