"""What is merged and saved is what was trained, also where an adapted embedding or head shares its weight with the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from folders import provenance
from regraft.models.load import load
from regraft.models.save import save
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject, merge
from slicing import ids


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("adapter", ["lora", "rslora", "pissa", "olora", "nola"])
def test_merged_and_saved_computes_what_was_trained(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, adapter: str, target: str
) -> None:
    model = make_model("llama", tie_word_embeddings=True).eval()
    x = ids(model)
    before = model(x).logits.detach().clone()
    injected = inject(model, RecoverSettings(adapter=adapter, rank=2, targets=(target,)), None, seed=1)
    injected.module.eval()
    torch.testing.assert_close(injected.model(x).logits.detach(), before, atol=2e-4, rtol=1e-3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in injected.module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    trained = injected.model(x).logits.detach().clone()
    assert not torch.allclose(trained, before, atol=1e-3)
    merged = merge(injected).eval()
    torch.testing.assert_close(merged(x).logits.detach(), trained, atol=2e-4, rtol=1e-3)
    save(merged, None, tmp_path / "out", provenance(), "# card")
    torch.testing.assert_close(load(tmp_path / "out").model(x).logits.detach(), trained, atol=2e-4, rtol=1e-3)
