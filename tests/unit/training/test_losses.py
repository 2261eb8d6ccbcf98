from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from regraft.training.losses import divergence, divergence_of_top, in_pieces, mean_loss, predicted_tokens


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows, tokens, ignored in ((3, 9, 0), (1, 5, 2), (2, 7, 6)):
        ids = torch.randint(3, 90, (rows, tokens), generator=generator)
        labels = ids.clone()
        labels[:, :ignored] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def test_every_predicted_token_counts_once(make_tiny: Callable[..., LlamaForCausalLM]) -> None:
    model = make_tiny().double()
    total, count = 0.0, 0
    for batch in batches():
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits
        for row in range(len(logits)):
            for position in range(1, logits.shape[1]):
                label = int(batch["labels"][row, position])
                if label != -100:
                    total -= float(logits[row, position - 1].log_softmax(0)[label])
                    count += 1
    assert count == sum(predicted_tokens(batch["labels"]) for batch in batches()) == 24 + 3 + 2
    assert abs(mean_loss(model, batches(), torch.device("cpu")) - total / count) < 1e-6


def test_mode_is_put_back_and_no_gradient_is_left(make_tiny: Callable[..., LlamaForCausalLM]) -> None:
    for training in (True, False):
        model = make_tiny().train(training)
        mean_loss(model, batches(), torch.device("cpu"))
        assert model.training is training
        assert all(parameter.grad is None for parameter in model.parameters())


def logits(rows: int = 11, vocabulary: int = 29) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = 3.0 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return made[0].requires_grad_(), made[1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergence_is_that_of_the_definition(temperature: float) -> None:
    student, teacher = logits()
    p, q = (x / temperature for x in (teacher, student))
    p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (p, q))
    expected = temperature**2 * (p * (p / q).log()).sum()
    found = divergence(student, teacher, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient, temperature * (q - p), rtol=1e-9, atol=1e-12)
    assert divergence(teacher, teacher, temperature).abs() < 1e-12


@pytest.mark.parametrize("kept", [1, 5, 28, 29])
def test_the_likeliest_tokens_and_the_rest_as_one_outcome(kept: int) -> None:
    student, teacher = logits()
    top = (teacher / 2.0).log_softmax(-1).topk(kept)
    p, q = ((x / 2.0).softmax(-1) for x in (teacher, student))
    merged = []
    for share in (p, q):
        chosen = share.gather(-1, top.indices)
        merged.append(torch.cat([chosen, 1.0 - chosen.sum(-1, keepdim=True)], -1)[:, : kept + (kept < 29)])
    expected = 4.0 * (merged[0] * (merged[0] / merged[1]).log()).sum()
    found = divergence_of_top(student, top.values, top.indices, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    whole = divergence(student, teacher, 2.0)
    assert found <= whole + 1e-9
    if kept >= 28:  # one token alone is the rest
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=0)
    else:
        assert found < whole
    (gradient,) = torch.autograd.grad(found, student)
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ahead, behind = (divergence_of_top(student.detach() + step * direction, top.values, top.indices, 2.0) for step in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


def test_mass_outside_the_likeliest_tokens_costs() -> None:
    """A student that puts its mass elsewhere is told so; renormalising over the likeliest tokens would call it perfect."""
    teacher = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    top = teacher.log_softmax(-1).topk(2)
    astray = teacher.clone()
    astray[0, 2] = 9.0
    assert divergence_of_top(teacher, top.values, top.indices, 1.0).abs() < 1e-12
    assert divergence_of_top(astray, top.values, top.indices, 1.0) > 3.0


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_pieces_give_the_loss_and_the_gradient_of_the_whole(rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(29, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 29, (11,), generator=generator)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(3.0 * expected, hidden)
    most = 0

    def loss_of(part: torch.Tensor, piece: slice) -> torch.Tensor:
        nonlocal most
        most = max(most, len(part))
        return torch.nn.functional.cross_entropy(part @ head.T, targets[piece], reduction="sum")

    found = in_pieces(hidden, loss_of, rows)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(3.0 * found, hidden)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    assert most == min(rows, 11)
    with torch.no_grad():
        assert in_pieces(hidden, loss_of, rows).item() == pytest.approx(expected.item(), rel=1e-6)
