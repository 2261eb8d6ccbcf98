"""Layers called one by one give what the model gives, also where they read tokens, and keys and values of layers before them."""

from __future__ import annotations

import copy

import pytest
import torch

from families_grid import OTHERS
from regraft.errors import ModelError
from regraft.models.layerwise import Layerwise
from regraft.models.view import ModelView
from regraft.streaming.passes import refuse_further_inputs
from zeroing import random_model

WINDOWS = torch.randint(3, 97, (4, 10), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_every_batch_has_its_own_embeddings_and_shared_keys_and_trials_leave_none_behind() -> None:
    model = random_model(*OTHERS["Gemma 3n"])
    view = ModelView(model)
    walk = Layerwise(view, WINDOWS, batch=2)
    want = torch.cat([model(ids, use_cache=False).logits for ids in walk.batches])
    hidden = [walk.first]
    for layer in range(6):
        hidden.append(walk.run(layer, hidden[-1]))
    assert (torch.cat(list(walk.logits(hidden[-1]))) - want).abs().max() <= 1e-5
    # Layer 3 hands its keys and values to layer 5; a trial with another layer 2 changes them.
    other = copy.deepcopy(view.layers[2])
    other.mlp.down_proj.weight.mul_(-3.0)
    changed = walk.run(2, hidden[2], other)
    for layer in (3, 4, 5):
        changed = walk.run(layer, changed)
    assert (changed[0] - hidden[6][0]).abs().max() > 1e-3, "the trial does something"
    again = walk.run(5, walk.run(4, hidden[4]))
    assert all(torch.equal(one, other) for one, other in zip(again, hidden[6], strict=True))


def test_layers_that_read_more_than_hidden_states_are_not_streamed() -> None:
    view = ModelView(random_model(*OTHERS["Gemma 3n"]))
    with pytest.raises(ModelError, match="read more than the hidden states"):
        refuse_further_inputs(view, WINDOWS)
    refuse_further_inputs(ModelView(random_model(*OTHERS["Arcee"])), WINDOWS)
