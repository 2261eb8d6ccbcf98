"""PC-LoRA of an encoder: ranks, the dense weights gone from memory and file, a folder that loads with its own code, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel

from folders import tiny_tokenizer
from regraft.errors import InputError, ModelError, PlanError
from regraft.models.encoders import encoder_linears, load_encoder, pooled, sentence_vectors
from regraft.models.live import Loaded
from regraft.models.uneven.factored_regraft import FactoredLinear
from regraft.models.view import parameter_count
from regraft.numerics.truncation import truncation
from regraft.pipelines.compress import compress
from regraft.plans import RankPlan
from regraft.settings import CompressSettings
from regraft.training.pc_lora import Fade, FadingLinear, encoder_fading_loss

TEXTS = [f"{number} foxes jump over {number * 7} lazy dogs" for number in range(40)]
FEW: dict[str, Any] = {"method": "pc_lora", "samples": 40, "fade_steps": 8, "fade_batch": 4, "ratio": 0.3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    (tmp_path / "encoder" / "1_Pooling" / "config.json").write_text("{}")
    return tmp_path / "encoder"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "pifa"])
def test_the_dense_weights_are_gone_and_the_folder_is_the_model(folder: Path, tmp_path: Path, layout: str) -> None:
    loaded = load_encoder(folder)
    dense = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    result = compress(loaded, tmp_path / "out", CompressSettings(**FEW, layout=layout), calibration=TEXTS)
    assert result.model is not None
    assert all(torch.equal(value, dense[name]) for name, value in loaded.model.state_dict().items())
    before, after = parameter_count(loaded.model), parameter_count(result.model)
    assert (before, after) == (result.plan.parameters_before, result.plan.parameters_after)
    assert before - after >= 0.3 * before
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for entry in result.plan.factorings:
        assert isinstance(result.model.get_submodule(entry.module), FactoredLinear)
        assert stored[f"{entry.module}.weight"].numel() == 0
        assert not hasattr(result.model.get_submodule(entry.module), "weight_OI")
    again = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ours = load_encoder(tmp_path / "out").model
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        wanted = result.model(ids).last_hidden_state
        assert torch.equal(again(ids).last_hidden_state, wanted)
        assert torch.equal(ours(ids).last_hidden_state, wanted)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        BertModel.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    with pytest.raises(ModelError, match="is factored already"):
        compress(tmp_path / "out", None, CompressSettings(**FEW), calibration=TEXTS)


@pytest.mark.slow
def test_ranks_come_from_a_rank_plan(folder: Path) -> None:
    names = list(encoder_linears(load_encoder(folder).model))
    assert len(names) == 2 * 6
    ranks = RankPlan("any", "by hand", {names[3]: 5, names[0]: 7, names[1]: 0})
    result = compress(folder, None, CompressSettings(**FEW), calibration=TEXTS, plan=ranks)
    assert result.plan.ranks() == {names[0]: 7, names[3]: 5}
    assert result.model is not None
    assert parameter_count(result.model) == result.plan.parameters_after
    for wrong, words in (({"nothing": 3}, "names 'nothing'"), ({names[0]: 31}, "lower it"), ({names[0]: 0}, "gives no layer a rank")):
        with pytest.raises(PlanError, match=words):
            compress(folder, None, CompressSettings(**FEW), calibration=TEXTS, plan=RankPlan("any", "by hand", wrong), dry_run=True)
    with pytest.raises(InputError, match="mix is for causal language models"):
        compress(folder, None, CompressSettings(**FEW, mix=True), calibration=TEXTS)
    with pytest.raises(InputError, match="a rank plan is for method pc_lora, not for svd"):
        compress(folder, None, CompressSettings(method="svd"), calibration=TEXTS, plan=ranks)


def test_the_loss_counts_no_padding_and_its_gradient_reaches_the_factors(folder: Path) -> None:
    model, fade = load_encoder(folder).model, Fade()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() == 2 else 1.0)
    name, module = list(encoder_linears(model).items())[-1]
    start = truncation(module.weight.detach(), None, None).at(4)

    layer = FadingLinear(module, start, fade, transposed=False, random=False, generator=torch.Generator())
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
    short = {"input_ids": torch.randint(3, 60, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    padded = {"input_ids": torch.cat([short["input_ids"], torch.full((3, 4), 9)], 1)}
    padded["attention_mask"] = torch.cat([short["attention_mask"], torch.zeros(3, 4, dtype=torch.int64)], 1)
    fade.value = 1.0
    assert float(encoder_fading_loss(model, fade, short, 0.5).detach()) < 1e-10
    fade.value = 0.0
    one, other = encoder_fading_loss(model, fade, short, 0.5), encoder_fading_loss(model, fade, padded, 0.5)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert float(one.detach()) > 1e-6
    for weight in (0.0, 1.0):
        for gradient in torch.autograd.grad(encoder_fading_loss(model, fade, short, weight), [layer.expand, layer.reduce]):
            assert float(gradient.abs().max()) > 0


def test_sentence_vectors_do_not_depend_on_the_batch(folder: Path) -> None:
    loaded = load_encoder(folder)
    assert isinstance(loaded, Loaded)
    found = sentence_vectors(loaded.model, loaded.tokenizer, TEXTS[:9], batch=4)
    for row, text in zip(found, TEXTS, strict=False):
        assert loaded.tokenizer is not None
        ids = loaded.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            alone = pooled(loaded.model(ids).last_hidden_state, torch.ones_like(ids))[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
