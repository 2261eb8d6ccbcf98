"""The sweep of learning rates: what it tries is what recoveries with these rates do, and what follows is the recovery with the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.adapters import ADAPTERS
from regraft.data.text import Corpus
from regraft.settings import RecoverSettings
from regraft.training import rates
from regraft.training.callbacks import Keeper, log_csv
from regraft.training.rates import Rate, Rates, try_rates
from regraft.training.recover import Recovered, recover

Make = Callable[..., LlamaForCausalLM]
Quick = Callable[..., RecoverSettings]
Corpora = tuple[Corpus, Corpus]


def test_it_walks_towards_the_lowest_loss() -> None:
    def walk(best: float) -> list[float]:
        return [rate.lr for rate in try_rates(1.0, lambda lr: abs(math.log(lr / best)))]

    assert walk(1.0) == [1.0, 3.0, 0.3]
    assert walk(2.9) == [1.0, 3.0, 10.0]
    assert walk(30.0) == [1.0, 3.0, 10.0]
    assert walk(0.3) == [1.0, 3.0, 0.3, 0.1]
    assert walk(0.01) == [1.0, 3.0, 0.3, 0.1]


def test_a_rate_that_diverges_is_never_the_best() -> None:
    tried = try_rates(1.0, lambda lr: math.nan if lr > 1.0 else 5.0 + lr)
    assert [rate.lr for rate in tried] == [1.0, 3.0, 0.3, 0.1]
    assert Rates(tried, 8).best == 0.1
    assert Rates(tuple(Rate(lr, math.inf) for lr in (2.0, 6.0)), 8).best == 2.0, "the adapter's own, where none trains"


@pytest.mark.long
@pytest.mark.parametrize("adapter", ["lora", "pissa", "adalora", "deep_lora"])
def test_what_is_tried_and_what_follows(
    adapter: str,
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "FEWEST_STEPS", 2)

    def done(name: str, **changed: object) -> Recovered:
        made = quick(adapter=adapter, eval_every=8, **changed).model_copy(update={"lr": changed.get("lr")})
        return recover(make_tiny(), tokenizer, *repeating, made, seed=0, work=tmp_path / name)

    swept = done("swept", steps=16)
    assert swept.rates is not None
    assert swept.rates.steps == 2
    assert swept.rates.tried[0].lr == ADAPTERS.get(adapter).defaults.lr
    for rate in swept.rates.tried if adapter != "adalora" else ():  # its ranks follow the steps of the whole recovery
        alone = done(f"alone-{rate.lr}", steps=2, lr=rate.lr)
        assert alone.log[-1].held_out_loss_nats == rate.loss, "a short run is the recovery of that length"
    best = min(swept.rates.tried, key=lambda rate: rate.loss)
    given = done("given", steps=16, lr=best.lr)
    assert given.rates is None
    assert log_csv(given.log) == log_csv(swept.log)
    for (name, one), other in zip(given.model.state_dict().items(), swept.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert not (tmp_path / "swept" / "rates").exists()


@pytest.mark.long
def test_it_needs_steps_and_can_be_left_out(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "FEWEST_STEPS", 2)
    for name, settings in (("short", quick(steps=15)), ("off", quick(steps=16, lr_sweep=False))):
        made = settings.model_copy(update={"lr": None, "eval_every": 100})
        assert recover(make_tiny(), tokenizer, *repeating, made, seed=0, work=tmp_path / name).rates is None


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_with_the_rate_that_was_found(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "FEWEST_STEPS", 2)
    made = quick(steps=16, eval_every=4).model_copy(update={"lr": None})
    undisturbed = recover(make_tiny(), tokenizer, *repeating, made, seed=0, work=tmp_path / "one")
    original = Keeper.on_evaluate

    def dies(self: Keeper, args: object, state: object, *more: object, **named: object) -> None:
        original(self, args, state, *more, **named)
        if state.global_step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "on_evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        recover(make_tiny(), tokenizer, *repeating, made, seed=0, work=tmp_path / "two")
    monkeypatch.setattr(Keeper, "on_evaluate", original)
    monkeypatch.setattr("regraft.training.recover.try_rates", lambda *given: pytest.fail("it was tried before"))
    resumed = recover(make_tiny(), tokenizer, *repeating, made, seed=0, work=tmp_path / "two", resume=True)
    assert resumed.rates == undisturbed.rates
    assert log_csv(resumed.log) == log_csv(undisturbed.log)
