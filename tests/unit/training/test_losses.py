from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from regraft.training.losses import mean_loss, predicted_tokens


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
