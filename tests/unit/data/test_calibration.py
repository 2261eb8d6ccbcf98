from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from regraft.data.calibration import Source, counts_of, mixed, sources_in
from regraft.data.own_text import TEMPERATURES, repeated_share, write_own_text
from regraft.errors import InputError


def test_no_text_is_the_built_in_one_and_a_file_is_itself_whatever_its_name(tmp_path: Path) -> None:
    assert sources_in(None) == (Source("built-in", 1.0),)
    odd = tmp_path / "a=0.5,b.txt"
    odd.write_text("text")
    assert sources_in(odd) == (Source(str(odd), 1.0),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "without a name"),
        ("a=0.5,b", "some of its sources"),
        ("a=0.5,b=0.2", r"add up to 0\.7"),
        ("a=1.5,b=-0.5", "'-0.5' .* not a share"),
        ("a=half,b=0.5", "'half' .* not a share"),
        ("a=nan,b=1", "'nan' .* not a share"),
        ("a=0.5,a=0.5", "'a' stands twice"),
    ],
)
def test_sources_that_make_no_sense_are_refused_in_a_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sources_in(text)


def test_shares_are_kept_and_no_source_is_without_a_window() -> None:
    assert counts_of(sources_in("a=0.98,b=0.01,c=0.01"), 10) == (8, 1, 1)
    assert counts_of(sources_in("a,b,c"), 10) in ((4, 3, 3), (3, 4, 3), (3, 3, 4))
    for samples in range(3, 60):
        assert sum(counts_of(sources_in("a=0.6,b=0.3,c=0.1"), samples)) == samples
    with pytest.raises(InputError, match="2 calibration windows are too few for 3 sources"):
        counts_of(sources_in("a,b,c"), 2)


def test_windows_keep_their_source_and_are_spread() -> None:
    parts = [torch.full((40, 3), 7), torch.full((40, 3), 9)]
    windows = mixed(("a", "b"), parts, seed=1)
    assert torch.equal(windows.tokens_NT[:, 0], torch.tensor([7, 9])[windows.source_N])
    assert 10 <= int(windows.source_N[:40].sum()) <= 30
    assert torch.equal(mixed(("a", "b"), parts, seed=1).source_N, windows.source_N)
    alone = torch.arange(12).reshape(4, 3)
    assert torch.equal(mixed(("a",), [alone], seed=1).tokens_NT, alone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_own_text_is_drawn_from_the_models_own_predictions(make_model: Callable[..., PreTrainedModel], family: str) -> None:
    model = make_model(family)
    own = write_own_text(model, None, samples=300, seq_len=2, seed=5)
    assert own.windows_NT.shape == (300, 2)
    assert torch.equal(own.windows_NT, write_own_text(model, None, samples=300, seq_len=2, seed=5).windows_NT)
    assert not torch.equal(own.windows_NT, write_own_text(model, None, samples=300, seq_len=2, seed=6).windows_NT)
    with torch.no_grad():
        likelihood = torch.log_softmax(model(input_ids=own.windows_NT[:, :1]).logits[:, 0].float(), dim=-1)
    of_written = likelihood.gather(1, own.windows_NT[:, 1:]).mean()
    of_random = likelihood.gather(1, torch.randint(0, likelihood.shape[1], (300, 1))).mean()
    entropy = (likelihood.exp() * likelihood).sum(dim=1).mean()
    assert of_written > of_random + 0.5
    assert float(of_written) == pytest.approx(float(entropy), abs=0.4)  # temperatures lie around 1
    assert min(TEMPERATURES) < 1.0 < max(TEMPERATURES)


def test_text_that_runs_in_circles_is_seen(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias[7] = 50.0
    own = write_own_text(model, None, samples=4, seq_len=24, seed=0)
    assert own.degenerate
    assert own.repeated > 0.8
    assert not write_own_text(make_model(), None, samples=4, seq_len=24, seed=0).degenerate
    assert repeated_share(torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3, 4]])) == pytest.approx(1 / 6)
