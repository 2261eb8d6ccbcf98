"""What the author of a plug-in writes: the conformance suite, and a proof of the method's own formula."""

from __future__ import annotations

from regraft_example_plugin import SPREAD

from regraft.groups.discover import discover
from regraft.importance import Evidence
from regraft.testing import AdapterForm, check_adapter, check_criterion
from regraft.testing.toys import tiny_llama


def test_the_criterion_conforms() -> None:
    check_criterion(SPREAD)


def test_the_installed_adapter_conforms() -> None:
    check_adapter(AdapterForm("lora_fa"))


def test_a_channel_is_scored_by_its_formula() -> None:
    model = tiny_llama()
    groups = discover(model, ("ffn",))
    weights = [model.get_parameter(f"model.layers.0.mlp.{name}.weight").detach().double() for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = (((weight - weight.mean()) ** 2) for weight in weights)
    want = gate[5].sum() + up[5].sum() + down[:, 5].sum()
    assert abs(float(SPREAD.units(Evidence(model, groups, None))["layers.0.ffn"][5]) / float(want) - 1) < 1e-12
