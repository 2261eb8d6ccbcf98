"""The vocabulary in one budget with other targets: prices by the formula; planted models in which tokens or channels are worth nothing."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from folders import byte_pair_tokenizer, text_file
from regraft.groups.discover import discover
from regraft.models.vocabulary import vocabulary_of
from regraft.pipelines.prune.priced_tokens import ranked_tokens, within_layers
from regraft.pipelines.prune.prune import prune, replay
from regraft.pipelines.prune.result import PruneResult
from regraft.surgery.cut import cut
from regraft.surgery.vocabulary import VOCABULARY

ROWS = 640


def model_whose_channels(scale: float) -> LlamaForCausalLM:
    """A model whose feed-forward network writes nothing, or much."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            mlp: Any = layer.mlp
            mlp.down_proj.weight.mul_(scale)
    return model


@pytest.mark.slow
def test_a_price_is_a_share_times_the_cost_of_two_halves_in_a_unigram_model() -> None:
    vocabulary = vocabulary_of(byte_pair_tokenizer())
    halves = {token: found for token in sorted(vocabulary.tokens) if (found := vocabulary.halves(token)) and len(set(found)) == 2}
    whole = max(halves)
    first, second = halves[whole]
    assert vocabulary.tokens[first] + vocabulary.tokens[second] == vocabulary.tokens[whole]
    needed = vocabulary.alphabet | set(vocabulary.special)
    counts = Counter({whole: 30, first: 5, second: 2, min(needed): 50})
    order, prices = ranked_tokens(vocabulary, needed, counts, ROWS)
    log_q = {token: math.log((counts[token] + 1) / (87 + ROWS)) for token in (whole, first, second)}
    want = 30 / 87 * (log_q[whole] - log_q[first] - log_q[second])
    assert prices[order.index(whole)] == pytest.approx(want, rel=1e-12)
    assert list(prices) == sorted(prices, reverse=True)
    assert sorted((*needed, *order)) == list(range(ROWS))
    there = set(needed)
    for token in order:
        there.add(token)
        assert vocabulary.with_parts(token) <= there, "every beginning of the order is closed under merges"


def pruned(model: Any, texts: list[str], tokenizer: PreTrainedTokenizerFast, **keywords: Any) -> PruneResult:
    common: dict[str, Any] = {"targets": ("ffn", "vocabulary"), "samples": 12, "seq_len": 32, "reconstruct": "none", "align": 1}
    return prune(model, tokenizer=tokenizer, calibration=texts, **(common | keywords))


def kept_of(result: PruneResult) -> dict[str, float]:
    """The share of the channels, and of the tokens, that stay."""
    rows = result.report.rows
    return {
        kind: sum(row["after"] for row in rows if row["kind"] == kind) / sum(r["before"] for r in rows if r["kind"] == kind)
        for kind in ("ffn", VOCABULARY)
    }


@pytest.mark.long
def test_what_is_worth_nothing_goes_and_what_is_left_is_exact(tmp_path: Path) -> None:
    tokenizer = byte_pair_tokenizer()
    few = random.Random(3).choices(["the cat sat", " on a mat", " and the sun", " was warm."], k=400)
    cheap_tokens = pruned(model_whose_channels(1.0), ["".join(few)], tokenizer, ratio=0.15, dry_run=True)
    assert kept_of(cheap_tokens)["ffn"] > 0.95 > 0.8 > kept_of(cheap_tokens)[VOCABULARY]
    every = [tokenizer.decode(random.Random(seed).choices(range(259, 620), k=600)) for seed in range(12)]
    model = model_whose_channels(1e-4)
    cheap_channels = pruned(model, every, tokenizer, ratio=0.15, dry_run=True)
    assert kept_of(cheap_channels)[VOCABULARY] > 0.95 > 0.8 > kept_of(cheap_channels)["ffn"]

    both = pruned(model, every, tokenizer, ratio=0.55)
    assert all(0.0 < share < 0.9 for share in kept_of(both).values())
    assert both.plan.parameters_after == both.model.num_parameters() == pytest.approx(0.45 * model.num_parameters(), rel=0.02)
    assert "tokens go, for " in "\n".join(both.notes)
    kept = next(entry.kept for entry in both.plan.cuts if entry.group == VOCABULARY)
    groups = discover(model, ("ffn",))
    inside: Any = cut(model, groups, within_layers(groups, both.plan))
    smaller: Any = both.tokenizer
    same = 0
    for text in text_file("test").read_text(encoding="utf-8").split():
        old, new = (one.encode(text, add_special_tokens=False) for one in (tokenizer, smaller))
        assert smaller.decode(new) == tokenizer.decode(old)
        if set(old) <= set(kept) and same < 40:
            assert [kept[token] for token in new] == old
            with torch.no_grad():
                want = inside(torch.tensor([old])).logits[..., list(kept)]
                assert (both.model(torch.tensor([new])).logits - want).abs().max() <= 1e-5
            same += 1
    assert same > 20
    again = replay(model, both.plan, tmp_path / "again", tokenizer=tokenizer, calibration=every)
    assert again.model is not None
    for name, tensor in both.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
