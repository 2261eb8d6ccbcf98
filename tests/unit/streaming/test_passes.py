"""Gradients and hidden states taken layer by layer, against autograd on the whole model in float64."""

from __future__ import annotations

import pytest
import torch

from regraft.errors import InputError
from regraft.models.load import load
from regraft.streaming.hidden import InMemory, OnDisk
from regraft.streaming.passes import Limits, StreamedPasses
from regraft.streaming.skeleton import open_skeleton

WINDOWS = torch.randint(3, 97, (11, 16), generator=torch.Generator().manual_seed(5))
TIGHT = Limits(backward_windows=2, head_rows=30, head_tokens=4)
ROOMY = Limits(backward_windows=8, head_rows=97, head_tokens=64)


def dense_gradients(model):
    """Mean gradient and mean squared gradient over windows, in float64, from a loss written out by hand."""
    model = model.double()
    first, second = {}, {}
    for window in WINDOWS:
        logits = model(window[None]).logits[0, :-1]
        loss = -torch.log_softmax(logits, dim=-1)[torch.arange(len(window) - 1), window[1:]].mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            first[name] = first.get(name, 0) + gradient / len(WINDOWS)
            second[name] = second.get(name, 0) + gradient**2 / len(WINDOWS)
    return first, second


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-5 * float(want.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("limits", [TIGHT, ROOMY], ids=["tight", "roomy"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("squares", [True, False], ids=["squares", "plain"])
def test_gradients_are_exact(make_folder, tmp_path, limits, tied, squares):
    folder = make_folder("llama", tie_word_embeddings=tied)
    skeleton = open_skeleton(folder)
    groups = skeleton.groups()
    first, second = dense_gradients(load(folder).model)
    shape = (*WINDOWS.shape, 48)
    passes = StreamedPasses(skeleton, WINDOWS, lambda: OnDisk(tmp_path / "hidden", shape), limits)
    seen: set[str] = set()
    for found in passes.gradients(groups, squares=squares):
        names = {member.parameter for group in found.groups for member in group.members}
        assert set(found.first) == names
        assert set(found.second) == (names if squares else set())
        for name in names:
            close(found.first[name], first[name])
            if squares:
                close(found.second[name], second[name])
            assert not dict(skeleton.view.model.named_parameters())[name].isnan().any(), "weights are there beside the gradients"
        seen |= names
    assert len(seen) == 3 * 7
    assert not (tmp_path / "hidden").exists()
    assert all(parameter.grad is None for parameter in skeleton.view.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-bias", "mistral-window", "qwen2", "qwen3"])
def test_gradients_are_exact_for_every_family(make_folder, name):
    folder = make_folder(name)
    skeleton = open_skeleton(folder)
    first, _ = dense_gradients(load(folder).model)
    passes = StreamedPasses(skeleton, WINDOWS, lambda: InMemory((*WINDOWS.shape, 48)), TIGHT)
    for found in passes.gradients(skeleton.groups(), squares=False):
        for parameter, gradient in found.first.items():
            close(gradient, first[parameter])


@pytest.mark.slow
def test_half_precision_is_computed_in_single(make_folder):
    folder = make_folder("llama", torch.bfloat16)
    skeleton = open_skeleton(folder)
    first, _ = dense_gradients(load(folder).model.float())
    passes = StreamedPasses(skeleton, WINDOWS, lambda: InMemory((*WINDOWS.shape, 48)), ROOMY)
    for found in passes.gradients(skeleton.groups(), squares=False):
        for parameter, gradient in found.first.items():
            assert gradient.dtype == torch.float32
            close(gradient, first[parameter])


def test_a_walk_goes_through_what_the_model_goes_through(make_folder):
    folder = make_folder("mistral-window")
    with torch.no_grad():
        wanted = load(folder).model(WINDOWS, output_hidden_states=True).hidden_states
    hidden = InMemory((*WINDOWS.shape, 48))
    walk = StreamedPasses(open_skeleton(folder), WINDOWS, lambda: hidden, ROOMY).walk()
    for layer in walk.layers():
        torch.testing.assert_close(hidden.get(0, 0, 11), wanted[layer], rtol=1e-4, atol=1e-5)
        walk.look(layer)
        walk.advance(layer)


def test_one_token_is_nothing_to_predict(make_folder):
    skeleton = open_skeleton(make_folder("llama"))
    passes = StreamedPasses(skeleton, WINDOWS[:, :1], lambda: InMemory((11, 1, 48)), ROOMY)
    with pytest.raises(InputError, match="at least 2"):
        next(passes.gradients(skeleton.groups(), squares=False))
