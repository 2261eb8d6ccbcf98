"""Training beside weights in four bits: it is training beside what those four bits stand for, and nothing of it stays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.data.text import Corpus
from regraft.errors import InputError, MissingDependencyError
from regraft.pipelines.recover import recover_model
from regraft.settings import RecoverSettings
from regraft.training.four_bit import check_four_bits
from regraft.training.recover import recover

Make = Callable[..., LlamaForCausalLM]
Quick = Callable[..., RecoverSettings]
Corpora = tuple[Corpus, Corpus]

# The sixteen values of NF4, from the appendix of the paper.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
    0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def rounded(weight: Tensor) -> Tensor:
    """Blocks of 64 over their largest value, each number to the nearest of the sixteen; the scales stay as they are."""
    blocks = weight.flatten().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * scale).reshape(weight.shape)


@pytest.mark.parametrize("adapter", ["lora", "mora"])
def test_it_learns_what_beside_the_rounded_weights_is_learnt(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path, adapter: str
) -> None:
    library = pytest.importorskip("bitsandbytes", reason="the extra bnb is not installed")
    settings = quick(steps=6, eval_every=6, adapter=adapter)
    model, before = make_tiny(), weights(make_tiny())
    seen: list[type[nn.Module]] = []
    cast(nn.Module, model.model.layers[0].mlp).register_forward_pre_hook(
        lambda mlp, _: seen.extend(type(part) for part in mlp.modules() if isinstance(part, library.nn.Linear4bit))
    )
    four = recover(
        model, tokenizer, *repeating, settings.model_copy(update={"load_in_4bit": True}), seed=0, work=tmp_path / "four"
    )  # fmt: skip
    assert seen  # not a run that left the switch aside
    assert not any(isinstance(module, library.nn.Linear4bit) for module in model.modules())
    by_hand = make_tiny()
    held = [name for name in before if ".layers." in name and before[name].ndim == 2]
    for name in held:
        packed, state = library.functional.quantize_4bit(before[name], quant_type="nf4", compress_statistics=True)
        stands_for = library.functional.dequantize_4bit(packed, state)
        # The quantised scales move every value by a share of its own; beyond that it is the paper's rounding.
        assert float((stands_for - rounded(before[name])).norm() / before[name].norm()) < 0.02
        by_hand.get_parameter(name).data.copy_(stands_for)
    start = weights(by_hand)
    hand = recover(by_hand, tokenizer, *repeating, settings, seed=0, work=tmp_path / "hand")
    full = recover(make_tiny(), tokenizer, *repeating, settings, seed=0, work=tmp_path / "full")
    assert four.first_loss == pytest.approx(hand.first_loss, abs=1e-5)
    assert four.first_loss != pytest.approx(full.first_loss, abs=1e-4)
    after = {name: weights(done.model) for name, done in {"four": four, "hand": hand}.items()}
    for name in held:
        learnt = after["hand"][name] - start[name]
        torch.testing.assert_close(after["four"][name] - before[name], learnt, rtol=1e-2, atol=1e-2 * float(learnt.abs().max()))


def test_without_the_library_it_is_one_line(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    settings = quick(load_in_4bit=True)
    with pytest.raises(MissingDependencyError, match=r"^bitsandbytes is not installed; get it with: pip install 'regraft\[bnb\]'$"):
        recover(make_tiny(), tokenizer, *repeating, settings, seed=0, work=tmp_path / "work")
    with pytest.raises(MissingDependencyError):
        recover_model("seedling", tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == []


def test_what_it_cannot_hold_is_refused(make_tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)  # there, and of no use
    with pytest.raises(InputError, match=r"bitsandbytes does not work on cpu here .*; leave out `load_in_4bit`$"):
        check_four_bits(make_tiny(), torch.float32)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match=r"finds no nn\.Linear in the layers of GPT2LMHeadModel"):
        check_four_bits(gpt2, torch.float32)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP shards them"):
        check_four_bits(make_tiny(), torch.float32)
