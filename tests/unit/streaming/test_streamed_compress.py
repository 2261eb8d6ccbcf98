"""Compression layer by layer: the same moments, plan and weights as in memory, and moments that another ratio or method takes up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from regraft.compression import gather, saved_moments
from regraft.compression.gather import in_parts
from regraft.errors import InputError, OutputError
from regraft.models.load import load
from regraft.models.provenance import read_provenance
from regraft.models.view import ModelView
from regraft.pipelines.compress import compress, prepare, streamed
from regraft.pipelines.compress.prepare import projections_of
from regraft.settings import CompressSettings
from regraft.streaming import output
from regraft.streaming.hidden import InMemory, OnDisk
from regraft.streaming.memory import MomentsRoom, Room
from regraft.streaming.moments import streamed_moments
from regraft.streaming.passes import Limits
from regraft.streaming.skeleton import open_skeleton

WINDOWS = torch.randint(3, 90, (35, 10), generator=torch.Generator().manual_seed(8))


def room(*, rows: int, windows: int, part_bytes: int) -> MomentsRoom:
    return MomentsRoom(Room(Limits(windows, rows, 5), False, 0, 0, 0, 0), part_bytes)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5 * float(other.abs().max()))


@pytest.mark.long
@pytest.mark.parametrize(("family", "tight"), [("llama", True), ("gpt2", False)])
def test_moments_are_those_of_the_model_in_memory(make_folder, tmp_path: Path, family: str, tight: bool) -> None:
    """With one projection at a time and blocks of the vocabulary too: the drawn tokens and the groups are the same."""
    folder = make_folder(family)
    model = load(folder).model
    view = ModelView(model)
    modules = projections_of(view)
    skeleton = open_skeleton(folder)
    small = room(rows=13, windows=1, part_bytes=1) if tight else room(rows=200, windows=8, part_bytes=10**9)
    shape = (*WINDOWS.shape, skeleton.head_shape[1])

    def hidden() -> Any:
        return OnDisk(tmp_path / "hidden", shape) if tight else InMemory(shape)

    wanted = {one.name: one for one in gather(model, modules, WINDOWS, "gradients", transposed=view.family.transposed, seed=3)}
    found = {one.name: one for one in streamed_moments(skeleton, list(modules), WINDOWS, "gradients", hidden, small, seed=3)}
    forward = {one.name: one for one in streamed_moments(skeleton, list(modules), WINDOWS, "inputs", hidden, small)}
    assert found.keys() == forward.keys() == wanted.keys()
    for name, one in wanted.items():
        assert torch.equal(found[name].weight_OI, one.weight_OI)
        for other in (found[name], forward[name]):
            assert other.seen().count == one.seen().count == WINDOWS.numel()
            close(other.seen().covariance_DD, one.seen().covariance_DD)
            close(other.seen().magnitude_D, one.seen().magnitude_D)
        assert forward[name].gradients is None
        assert found[name].felt().count == WINDOWS.numel()
        close(found[name].felt().second_DD, one.felt().second_DD)
    parts = list(in_parts(modules, "gradients", view.family.transposed, 1))
    assert all(len(part) == 1 for part in parts)


@pytest.mark.long
@pytest.mark.parametrize(("method", "layout", "dtype"), [("fisher", "plain", "float32"), ("svd_llm", "pifa", "bfloat16")])
def test_it_writes_what_is_written_in_memory(
    make_folder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, layout: str, dtype: str
) -> None:
    monkeypatch.setattr(output, "SHARD_BYTES", 60_000)
    monkeypatch.setattr("regraft.streaming.factored_output.SHARD_BYTES", 60_000)
    folder = make_folder("llama-bias", getattr(torch, dtype))
    common: dict[str, Any] = {"method": method, "layout": layout, "calibration": text, "samples": 20, "seq_len": 16, "ratio": 0.3}
    compress(folder, tmp_path / "whole", CompressSettings(**common))
    result = compress(folder, tmp_path / "streamed", CompressSettings(**common, memory="2GB"))
    assert result.model is None
    first, second = read_provenance(tmp_path / "whole"), read_provenance(tmp_path / "streamed")
    assert first is not None
    assert second is not None
    assert first.factors is not None
    assert second.factors is not None
    assert second.factors.ranks() == first.factors.ranks()
    assert second.factors.parameters_after == first.factors.parameters_after
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    assert not (tmp_path / "streamed" / streamed.WORK).exists()
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "streamed"))
    assert type(one) is type(other)
    with torch.no_grad():
        torch.testing.assert_close(other(WINDOWS).logits, one(WINDOWS).logits, rtol=0.05, atol=0.05 if dtype == "bfloat16" else 1e-3)
    stored = [load_file(path) for path in (tmp_path / "streamed").glob("*.safetensors")]
    names = {name for tensors in stored for name in tensors}
    assert names == set(load_file(tmp_path / "whole" / "model.safetensors"))
    again = compress(folder, tmp_path / "again", CompressSettings(**common, memory="2GB"), plan=result.plan)
    assert again.plan.ranks() == result.plan.ranks()


@pytest.mark.long
def test_moments_are_saved_and_taken_up(make_folder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another ratio and another method compute none again, whether the model is in memory or not; other text or another model does."""
    folder = make_folder("llama")
    cache = tmp_path / "cache"
    asked: list[int] = []
    whole_gather, streamed_gather = prepare.gather, streamed.streamed_moments

    def counted(model: Any, modules: Any, *rest: Any, **named: Any) -> Any:
        asked.append(len(modules))
        return whole_gather(model, modules, *rest, **named)

    def counted_streamed(skeleton: Any, names: Any, *rest: Any, **named: Any) -> Any:
        asked.append(len(names))
        return streamed_gather(skeleton, names, *rest, **named)

    monkeypatch.setattr(prepare, "gather", counted)
    monkeypatch.setattr(streamed, "streamed_moments", counted_streamed)

    def plan_of(source: Path, **rest: Any) -> Any:
        settings = CompressSettings(**{"calibration": text, "samples": 20, "seq_len": 16, "cache": cache} | rest)
        return compress(source, None, settings, dry_run=True).plan

    fresh = plan_of(folder, cache=None, method="bolaco", ratio=0.4)
    asked.clear()
    plan_of(folder, method="svd_llm")
    assert asked == [21]
    assert plan_of(folder, method="bolaco", ratio=0.4).ranks() == fresh.ranks()
    assert asked == [21]
    plan_of(folder, method="bolaco", memory="2GB")
    assert asked == [21]
    plan_of(folder, method="fisher", memory="2GB")  # gradients were not there
    assert asked == [21, 21]
    predicted = plan_of(folder, method="fisher", ratio=0.4).predicted_nats
    assert asked == [21, 21]
    assert predicted == pytest.approx(plan_of(folder, cache=None, method="fisher", ratio=0.4).predicted_nats, rel=1e-3)
    asked.clear()
    plan_of(folder, method="svd_llm", samples=10)
    plan_of(make_folder("llama-bias"), method="svd_llm")
    assert asked == [21, 21]
    asked.clear()
    for path in cache.rglob("*down_proj.inputs.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    assert plan_of(folder, method="bolaco", ratio=0.4).ranks() == fresh.ranks()
    assert asked == [3]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file; name a folder"):
        plan_of(folder, method="svd_llm", cache=tmp_path / "file")
    assert saved_moments.VERSION == 1


@pytest.mark.slow
def test_what_does_not_go_within_a_limit_is_refused(make_folder, text: Path) -> None:
    folder = make_folder("llama")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"mix": True}, "mix takes the whole model"),
        ({"dense": True}, "dense takes the whole model"),
        ({"ranks": "bayes"}, "ranks bayes takes the whole model"),
        ({"prices": "measured"}, "prices measured takes"),
        ({"method": "pc_lora"}, "method pc_lora takes"),
        ({"memory": "100KB"}, r"`memory=100KB` is below what one layer needs, .*use `memory=\d+"),
    ]
    for changes, words in refused:
        settings = CompressSettings(**{"calibration": text, "samples": 4, "seq_len": 16, "memory": "2GB"} | changes)
        with pytest.raises(InputError, match=words):
            compress(folder, None, settings, dry_run=True)
    with pytest.raises(InputError, match="say with `output` where it goes"):
        compress(folder, None, CompressSettings(memory="2GB"))
    with pytest.raises(InputError, match="`memory` is for models that are not loaded yet"):
        compress(load(folder).model, None, CompressSettings(memory="2GB"), dry_run=True)
