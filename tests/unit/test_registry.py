from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, cast

import pytest

from regraft import registry as registry_module
from regraft.errors import ConfigError, InputError
from regraft.registry import NamedRegistry, Registry, built_in, registry_of
from regraft.selection import SELECTORS, Selector
from regraft.settings import PruneSettings


@pytest.fixture
def shapes() -> Registry[int]:
    registry: Registry[int] = Registry("shape", group="regraft.test_shapes")
    registry.add("triangle", 3)
    registry.add("square", 4)
    return registry


def test_values_come_back_by_name(shapes: Registry[int]) -> None:
    assert shapes.get("square") == 4
    assert shapes.names() == ("square", "triangle")
    assert list(shapes) == ["square", "triangle"]
    assert "square" in shapes
    assert "circle" not in shapes


def test_the_decorator_registers_and_returns_what_it_decorates() -> None:
    registry: Registry[type] = Registry("kind", group="regraft.test_kinds")

    @registry.register("plain")
    class Plain:
        pass

    assert registry.get("plain") is Plain


def test_a_name_is_taken_once(shapes: Registry[int]) -> None:
    with pytest.raises(InputError, match="shape 'square' is registered twice"):
        shapes.add("square", 5)
    assert shapes.get("square") == 4


@pytest.mark.parametrize(("name", "hint"), [("squre", "; did you mean 'square'?"), ("zzz", "triangle")])
def test_an_unknown_name_lists_what_there_is(shapes: Registry[int], name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        shapes.get(name)
    assert str(caught.value).startswith(f"unknown shape '{name}'; known: square, triangle")
    assert str(caught.value).endswith(hint)


def test_packages_from_outside_use_the_same_door(shapes: Registry[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("tau", "math:tau", group), EntryPoint("e", "math:e", group)]

    monkeypatch.setattr(registry_module, "entry_points", points)
    assert shapes.names() == ("e", "square", "tau", "triangle")
    assert shapes.get("tau") == pytest.approx(6.283185307179586)
    assert asked == ["regraft.test_shapes"]


def test_an_outside_name_does_not_replace_a_built_in(
    shapes: Registry[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [EntryPoint("square", "math:tau", group)])
    assert shapes.get("square") == 4
    assert caplog.messages == ["shape 'square' is left out: the name is taken; update or uninstall what brings it (math:tau)"]


def test_a_broken_entry_point_is_reported_and_the_others_go_on(
    shapes: Registry[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {"gone": "no_such_package:shape", "lost": "math:no_such_name", "odd": "no such:thing"}
    points = [EntryPoint(name, value, "regraft.test_shapes") for name, value in broken.items()]
    points.append(EntryPoint("tau", "math:tau", "regraft.test_shapes"))
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    assert shapes.names() == ("square", "tau", "triangle")
    assert shapes.broken().keys() == broken.keys()
    assert len(caplog.messages) == 3
    with pytest.raises(InputError, match=r"shape 'gone' is left out: loading it raises ModuleNotFoundError: No module"):
        shapes.get("gone")
    assert "AttributeError" in shapes.broken()["lost"]
    assert shapes.get("triangle") == 3
    assert len(caplog.messages) == 3


@dataclass(frozen=True)
class Shape:
    name: str
    corners: int


OTHER = Shape("hexagon", 6)
NO_SHAPE = 7


def test_a_value_that_says_its_own_name_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: NamedRegistry[Shape] = NamedRegistry("shape", group="regraft.test_shapes", of=Shape)
    square = registry.include(Shape("square", 4))
    with pytest.raises(InputError, match="registered twice"):
        registry.include(Shape("square", 5))
    values = {"hexagon": OTHER, "heptagon": OTHER, "seven": NO_SHAPE}
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [EntryPoint(name, "x:y", group) for name in values])
    monkeypatch.setattr(EntryPoint, "load", lambda self: values[self.name])
    assert registry.names() == ("hexagon", "square")
    assert registry.get("square") is square
    assert "it calls itself 'hexagon'" in registry.broken()["heptagon"]
    assert "it is a int and not a Shape" in registry.broken()["seven"]


KINDS = ("criterion", "selector", "allocator", "adapter", "compression method", "choice of ranks", "export format")


@pytest.mark.parametrize("kind", KINDS)
def test_the_list_of_built_ins_names_every_module_that_registers_and_no_other(kind: str) -> None:
    registry = registry_of(kind)
    for name in built_in(kind):
        assert registry.get(name) is registry._values[name]
    assert set(registry._values) == set(built_in(kind))


@pytest.mark.slow
def test_names_are_listed_without_importing_a_method() -> None:
    code = (
        "import sys; from regraft.registry import listed; from regraft.settings import PruneSettings;"
        "assert 'taylor, wanda' in listed('criterion');"
        "PruneSettings(criterion='taylor', select='global'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_selector_from_outside_is_a_value_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Selector("mine", needs_curves=False, choose=lambda groups, scores, budget: {})
    with pytest.raises(ConfigError, match="unknown selector 'mine'; known: auto, gates, global, knapsack, uniform"):
        PruneSettings(select="mine")
    monkeypatch.setitem(SELECTORS._values, "mine", mine)
    assert PruneSettings(select="mine").select == "mine"
    with pytest.raises(ConfigError, match="did you mean 'knapsack'"):
        PruneSettings(select="knapsak")


def test_a_built_in_name_is_taken_before_its_module_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry_module._built_in(), "shape of a test", {"round": "math"})  # pyright: ignore[reportArgumentType]
    built_in.cache_clear()
    registry: Registry[float] = Registry("shape of a test", group="regraft.test_shapes")
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [EntryPoint("round", "math:tau", group)])
    assert registry.names() == ("round",)
    assert "the name is taken" in registry.broken()["round"]
    built_in.cache_clear()


@pytest.mark.parametrize(("field", "name", "other"), [("criterion", "removal", "depth"), ("depth", "taylor", "criterion")])
def test_names_of_another_field_are_neither_listed_nor_taken(field: str, name: str, other: str) -> None:
    with pytest.raises(ConfigError, match=f"`{other}`; use one of auto"):
        PruneSettings(**cast(Any, {field: name}))
    with pytest.raises(ConfigError, match=f"unknown criterion '{name}s'; known: ") as caught:
        PruneSettings(**cast(Any, {field: f"{name}s"}))
    assert f"{name}," not in str(caught.value).partition("known:")[2]
