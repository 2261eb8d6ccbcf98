"""Weights that fade: the schedules, where training starts and ends, and that nothing of the dense weights is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.models.view import ModelView
from regraft.numerics.truncation import Factors, truncation
from regraft.training.pc_lora import Fade, FadeCurve, FadeSettings, FadingLinear, fade_out, fading, fading_loss

WINDOWS = torch.randint(3, 97, (24, 12), generator=torch.Generator().manual_seed(5))
SCHEDULES: tuple[FadeCurve, ...] = ("linear", "sine", "cosine", "step")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lambda_falls_from_one_to_exactly_zero(schedule: FadeCurve) -> None:
    values = [fading(schedule, step / 20) for step in range(30)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert set(values[20:]) == {0.0}
    assert len(set(values)) >= 5


def start(weight: Tensor, rank: int = 4) -> Factors:
    mean = 0.3 * torch.ones(weight.shape[1], dtype=torch.float64)
    return truncation(weight, None, None, mean_I=mean).at(rank)


def starts(model) -> dict[str, Factors]:
    view = ModelView(model)
    return {name: start(module.weight.detach()) for name, module in view.adapted_modules().items()}


@pytest.mark.parametrize("random", [False, True])
def test_it_begins_at_the_layer_and_ends_at_the_factors(random: bool) -> None:
    base = torch.nn.Linear(8, 6)
    rows = torch.randn(5, 8)
    fade = Fade()
    generator = torch.Generator().manual_seed(0)
    layer = FadingLinear(base, start(base.weight.detach()), fade, transposed=False, random=random, generator=generator)
    torch.testing.assert_close(layer(rows), base(rows), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    fade.value = 0.0
    layer.weight_OI.fill_(torch.nan)  # nothing of it is used any more
    own = layer.factors()
    assert own.bias_O is not None
    expected = rows @ (own.left_OR @ own.right_RI).T + base.bias + own.bias_O
    torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-5)


def test_the_teacher_is_the_original_and_features_teach_the_factors(make_model) -> None:
    """With the task's weight at zero, gradients still reach B, A and c; the teacher's features do not move with the factors."""
    model = make_model("llama")
    original = model(input_ids=WINDOWS[:2], output_hidden_states=True).hidden_states[-1].detach()
    fade = Fade(value=0.0)
    generator = torch.Generator().manual_seed(0)
    made = {
        name: FadingLinear(model.get_submodule(name), own, fade, transposed=False, random=False, generator=generator)
        for name, own in starts(model).items()
    }
    for name, layer in made.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    loss = fading_loss(model, fade, WINDOWS[:2], 0.0)
    loss.backward()
    assert float(loss.detach()) > 0.0
    for name, layer in made.items():
        for parameter in layer.parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0.0, name
    fade.teaching = True
    torch.testing.assert_close(model(input_ids=WINDOWS[:2], output_hidden_states=True).hidden_states[-1].detach(), original)


@pytest.mark.long
def test_training_gets_closer_and_leaves_the_model_alone(make_model) -> None:
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = starts(model)

    def distance(factors: dict[str, Factors]) -> float:
        fade = Fade(value=0.0)
        other = make_model("llama")
        other.load_state_dict(model.state_dict())
        generator = torch.Generator().manual_seed(0)
        for name, one in factors.items():
            parent, _, last = name.rpartition(".")
            layer = FadingLinear(other.get_submodule(name), one, fade, transposed=False, random=False, generator=generator)
            setattr(other.get_submodule(parent), last, layer)
        with torch.no_grad():
            return float(fading_loss(other, fade, WINDOWS[16:], 0.0))

    settings = FadeSettings(steps=60, lr=5e-3, batch=4, task_weight=0.0)
    learnt = fade_out(model, own, WINDOWS[:16], settings)
    assert distance(learnt) < 0.95 * distance(own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {type(module).__name__ for module in model.modules()}.isdisjoint({"FadingLinear"})
    again = fade_out(model, own, WINDOWS[:16], settings)
    assert all(torch.equal(learnt[name].left_OR, again[name].left_OR) for name in learnt)
