"""The elastic adapter: what it scores, what it trains, and how well its scores rank recoveries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rank_spaces import layer_space
from regraft.data.text import Corpus
from regraft.errors import InputError
from regraft.paired.candidates import Candidates
from regraft.paired.elastic import Elastic, ElasticSettings, agreement
from regraft.paired.partial_runs import PartialRuns
from regraft.paired.setup import PairedSetup
from regraft.plans import RankTrial
from regraft.settings import RecoverSettings
from regraft.training.batches import collate, make_examples, spread

Make = Callable[..., LlamaForCausalLM]
Quick = Callable[..., RecoverSettings]
Corpora = tuple[Corpus, Corpus]


@pytest.fixture
def ground(tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, make_tiny: Make) -> PairedSetup:
    model = make_tiny()
    modules = [name for slot in layer_space(model).slots for name in slot.modules]
    return PairedSetup(model, tokenizer, *repeating, modules, quick(steps=12, eval_every=12))


def test_a_score_is_the_loss_of_the_leading_parts(
    ground: PairedSetup,
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folded into the weights by hand, measured by transformers."""
    space = layer_space(ground.model)
    stored: dict[str, torch.Tensor] = {}
    put = PartialRuns.put
    monkeypatch.setattr(PartialRuns, "put", lambda self, key, progress: (stored.update(progress.tensors), put(self, key, progress))[1])
    trials = Elastic(ground, space, folder=tmp_path).measure([(6, 2), (1, 6), (4, 4)], seed=2)
    ids = collate(spread(make_examples(repeating[1], tokenizer, 24, wanted=4, seed=0), 4), 2)["input_ids"]
    for trial in trials:
        model = make_tiny()
        with torch.no_grad():
            for slot, rank in zip(space.slots, trial.ranks, strict=True):
                for name in slot.modules:
                    change = 2.0 * stored[f"{name}.B"][:, :rank].double() @ stored[f"{name}.A"][:rank].double()
                    model.get_submodule(name).weight += change.float()
            expected = float(model(input_ids=ids, labels=ids).loss)
        assert trial.loss_nats == pytest.approx(expected, abs=1e-5)
        assert trial.loss_nats < ground.first_loss() - 0.1
    assert len({trial.loss_nats for trial in trials}) == 3
    assert [trial.kind for trial in trials] == ["elastic"] * 3


@pytest.mark.slow
def test_trained_at_one_vector_alone_it_is_a_recovery(ground: PairedSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    space = layer_space(ground.model)
    monkeypatch.setattr(Elastic, "_vectors", lambda self, generator: [(4, 2)])
    score = Elastic(ground, space, ElasticSettings(fidelity=1.0, vectors=1)).measure([(4, 2)], seed=2)[0].loss_nats
    real = Candidates(ground, space).measure([(4, 2)], 1.0, 2)[0].loss_nats
    assert score == pytest.approx(real, abs=2e-5)


@pytest.mark.slow
def test_training_is_paid_once_and_kept(ground: PairedSetup, tmp_path: Path) -> None:
    space = layer_space(ground.model)
    elastic = Elastic(ground, space, ElasticSettings(fidelity=0.5, vectors=3), folder=tmp_path)
    first = elastic.measure([(4, 4), (6, 2)], seed=2)
    # A recovery: 12 steps of 4 windows, three passes each, and a look at 4 windows.
    whole = 12 * 12 + 4
    assert [trial.cost for trial in first] == pytest.approx([(6 * 3 * 12 + 4) / whole, 4 / whole])
    assert elastic.measure([(2, 6)], seed=2)[0].cost == pytest.approx(4 / whole)
    another_process = Elastic(ground, space, ElasticSettings(fidelity=0.5, vectors=3), folder=tmp_path)
    again = another_process.measure([(6, 2), (4, 4)], seed=2)
    assert [trial.cost for trial in again] == [first[1].cost, first[0].cost], "killed before they were recorded, scores cost the same"
    assert again[1].loss_nats == first[0].loss_nats
    other = Elastic(ground, space, ElasticSettings(fidelity=0.5, vectors=3), folder=tmp_path).measure([(4, 4)], seed=3)[0]
    assert other.cost > 1
    assert other.loss_nats != first[0].loss_nats


def test_the_sandwich_has_the_smallest_and_the_largest_vector(ground: PairedSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    train_step = PairedSetup.train_step
    monkeypatch.setattr(PairedSetup, "train_step", lambda self, *arguments: (seen.append(arguments[-1]), train_step(self, *arguments))[1])
    elastic = Elastic(ground, layer_space(ground.model), ElasticSettings(fidelity=0.25, vectors=4, sandwich=True))
    elastic.measure([(4, 4)], seed=0)
    assert seen == [4] * 3
    vectors = elastic._vectors(np.random.default_rng(0))
    assert vectors[:2] == [(1, 1), (6, 6)]
    assert all(elastic.space.holds(vector) for vector in vectors[2:])


def test_agreement_is_spearmans_of_the_vectors_that_have_both() -> None:
    def trials(kind: Any, losses: dict[int, float | None]) -> list[RankTrial]:
        return [RankTrial((rank,), loss, 1.0, 0.1, kind) for rank, loss in losses.items()]

    scores = trials("elastic", {1: 0.9, 2: 0.5, 3: 0.4, 4: 0.1, 5: 7.0, 6: None})
    assert agreement(scores, trials("recovery", {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.4, 6: 0.0})) == pytest.approx(1.0)
    assert agreement(scores, trials("recovery", {1: 1.4, 2: 1.5, 3: 2.0, 4: 3.0})) == pytest.approx(-1.0)
    # Ranks 1 2 3 4 against 2 1 4 3 from the lowest: 1 - 6 * 4 / (4 * 15).
    assert agreement(scores, trials("recovery", {4: 2.0, 3: 1.0, 2: 4.0, 1: 3.0})) == pytest.approx(0.6)
    with pytest.raises(InputError, match="2 rank vectors have an elastic score and a recovery"):
        agreement(scores, trials("recovery", {1: 1.4, 2: 1.5, 6: 2.0}))


def test_bad_settings_are_one_line() -> None:
    with pytest.raises(InputError, match=r"^fidelity 1\.5 is not in \(0, 1\]"):
        ElasticSettings(fidelity=1.5)
    with pytest.raises(InputError, match="needs 3 rank vectors a step or more, not 2"):
        ElasticSettings(sandwich=True)
