"""Adapters of every method as plain LoRA: stock PEFT loads them with equal logits; our own masters it refuses loudly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from folders import tiny_tokenizer
from regraft.adapters import Evidence
from regraft.adapters.peft_backed import layers_of
from regraft.cli.app import run
from regraft.errors import InputError
from regraft.plans import RankPlan
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import Injected, finish, inject, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(24).reshape(2, 12) % 97
EXPORTED = {
    "deep_lora": (),
    "deep_lora-trimmed": ("trim=0.3",),
    "nola": ("bases=12",),
    "lora_xs": (),
    "mora": ("form=sharing",),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def in_stock_peft(folder: Path, adapter: str) -> torch.Tensor:
    """Logits of the base in a folder with an adapter beside it, as PEFT alone loads both."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / adapter)))


def evidence() -> Evidence:
    return Evidence(lambda count: [{"input_ids": IDS + index, "labels": IDS + index} for index in range(min(count, 2))])


@pytest.fixture
def base(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        make_model(family).save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def saved(folder: Path, base: Path, name: str, ranks: dict[str, int] | None = None, size: float = 0.3, **settings: Any) -> torch.Tensor:
    """Puts an adapter with random values on a base, saves it, and returns the logits."""
    options = EXPORTED.get(name, ())
    values = {"adapter": name.split("-")[0], "adapter_options": options, "rank": 4, "dropout": 0.0, "steps": 10} | settings
    model = AutoModelForCausalLM.from_pretrained(base)
    plan = RankPlan("any", "test", ranks) if ranks else None
    injected = inject(model, RecoverSettings.model_validate(values), plan, 3, evidence())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in injected.module.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    injected.adapter.finish(injected.module)
    adapted = logits(injected.module)
    folder.mkdir()
    save_adapter(injected, folder, str(base))
    return adapted


def with_adalora(base: Path) -> Injected:
    settings = RecoverSettings.model_validate({"adapter": "adalora", "rank": 4, "dropout": 0.0, "steps": 10})
    return inject(AutoModelForCausalLM.from_pretrained(base), settings, None, 1, evidence())


def is_safe(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["use_rslora"] is config["use_dora"] is False
    assert config["bias"] == "none"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    assert {tensor.shape[0] for name, tensor in tensors.items() if "_A" in name} == {config["r"]}
    assert {tensor.shape[1] for name, tensor in tensors.items() if "_B" in name} == {config["r"]}


CASES = [(family, name) for family in ("llama", "gpt2") for name in EXPORTED]


@pytest.mark.slow
@pytest.mark.exports("peft-lora", "", "the base's layers", "float32")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_stock_peft_loads_the_export_with_equal_logits(base, tmp_path, capsys, family: str, name: str) -> None:
    adapted = saved(tmp_path / "adapter", base(family), name)
    out = tmp_path / "lora"
    assert run(["export", str(tmp_path / "adapter"), "--to", "peft-lora", "--output", str(out)]) == 0, capsys.readouterr().err
    is_safe(out)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(out))
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert float((logits(stock) - adapted).abs().max()) <= 1e-5
    assert float((plain - adapted).abs().max()) > 1e-2


@pytest.mark.slow
def test_ranks_that_differ_are_padded(base, tmp_path) -> None:
    ranks = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 6, "model.layers.2.mlp.down_proj": 4}
    adapted = saved(tmp_path / "adapter", base("llama"), "lora_xs", ranks)
    assert run(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "lora")]) == 0
    is_safe(tmp_path / "lora")
    assert float((in_stock_peft(tmp_path, "lora") - adapted).abs().max()) <= 1e-5


@pytest.mark.slow
def test_an_embedding_is_exported_too(base, tmp_path) -> None:
    adapted = saved(tmp_path / "adapter", base("llama"), "deep_lora", targets=("embed_tokens", "q_proj"))
    assert run(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "lora")]) == 0
    assert float((in_stock_peft(tmp_path, "lora") - adapted).abs().max()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olora", "pissa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_that_starts_from_the_weights_is_saved_for_the_original_ones(base, tmp_path, family: str, name: str) -> None:
    adapted = saved(tmp_path / "adapter", base(family), name, size=0.1)
    is_safe(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8  # twice the rank
    assert float((in_stock_peft(tmp_path, "adapter") - adapted).abs().max()) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", ["rslora", "adalora", "eva"])
def test_adapters_of_peft_become_plain_lora(base, tmp_path, name: str) -> None:
    adapted = saved(tmp_path / "adapter", base("llama"), name)
    assert run(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "lora")]) == 0
    is_safe(tmp_path / "lora")
    assert float((in_stock_peft(tmp_path, "lora") - adapted).abs().max()) <= 1e-5


@pytest.mark.slow
def test_a_module_that_adalora_leaves_no_rank_is_saved_loaded_and_exported_in_silence(base, tmp_path) -> None:
    """Warnings are errors here: PEFT takes an empty factor for one that was never gathered, and says so at length."""
    injected = with_adalora(base("llama"))
    name, layer = next(iter(layers_of(injected.module)))
    for factors, dimension in ((layer.lora_A, 0), (layer.lora_B, 1), (layer.lora_E, 0)):
        factors["default"] = nn.Parameter(factors["default"].data.narrow(dimension, 0, 0))
    layer.ranknum["default"].data.fill_(0.0)
    injected.module.peft_config["default"].rank_pattern = {f"{name}.lora_E": [False] * 6}
    adapted = logits(injected.module)
    (tmp_path / "adapter").mkdir()
    save_adapter(injected, tmp_path / "adapter", str(tmp_path / "base"))
    assert run(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "lora")]) == 0
    assert float((in_stock_peft(tmp_path, "lora") - adapted).abs().max()) <= 1e-5


@pytest.mark.slow
def test_adalora_keeps_the_ranks_of_the_weights_that_are_kept(base, tmp_path) -> None:
    """The best weights may be older than the last ranks that were pruned; what is saved has theirs, not the last ones."""
    injected = with_adalora(base("llama"))
    layers = dict(layers_of(injected.module))
    with torch.no_grad():
        for index, layer in enumerate(layers.values()):
            layer.lora_E["default"].fill_(3.0)[: index % 3] = 0.0
    injected.module.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": [False, True] * 3 for name in layers}
    finish(injected)
    adapted = logits(injected.module)
    (tmp_path / "adapter").mkdir()
    save_adapter(injected, tmp_path / "adapter", str(tmp_path / "base"))
    assert run(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "lora")]) == 0
    assert float((in_stock_peft(tmp_path, "lora") - adapted).abs().max()) <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_adalora_wants_steps_to_see_before_it_prunes(base, steps: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(base("llama"))
    settings = RecoverSettings.model_validate({"adapter": "adalora", "rank": 2, "steps": steps})
    if steps == 3:
        assert inject(model, settings, None, 0).trainable_parameters > 0
        return
    with pytest.raises(InputError, match=f"1 of {steps} steps before its ranks settle, too few; give more `steps`"):
        inject(model, settings, None, 0)


def refused(capsys, arguments: list[str]) -> str:
    capsys.readouterr()  # progress bars of what went before
    assert run(arguments) == 2
    said = capsys.readouterr().err
    said = said[said.index("error:") :]
    assert len(said.strip().splitlines()) == 1, said
    assert "Traceback" not in said
    return said


@pytest.mark.slow
@pytest.mark.parametrize(("name", "said"), [("mora-rotation", "rotation has full rank"), ("dora", "DoRA is no plain LoRA")])
def test_what_is_no_lora_says_so_and_is_merged_instead(base, tmp_path, capsys, name: str, said: str) -> None:
    adapted = saved(tmp_path / "adapter", base("llama"), name)
    words = refused(capsys, ["export", str(tmp_path / "adapter"), "--to", "peft-lora", "--output", str(tmp_path / "out")])
    assert said in words
    assert "merge" in words
    assert not (tmp_path / "out").exists()
    assert run(["export", str(tmp_path / "adapter"), "--to", "merged", "--output", str(tmp_path / "out")]) == 0
    assert float((logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - adapted).abs().max()) <= 1e-5


def test_stock_peft_refuses_our_master_loudly(base, tmp_path) -> None:
    saved(tmp_path / "adapter", base("llama"), "nola")
    with pytest.raises(ValueError, match="adapter_config"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))


@pytest.mark.slow
def test_a_master_is_measured_like_its_merged_model(base, tmp_path) -> None:
    saved(tmp_path / "adapter", base("llama"), "mora-rotation")
    (tmp_path / "text.txt").write_text("abc def " * 40, encoding="utf-8")
    assert run(["export", str(tmp_path / "adapter"), "--to", "merged", "--output", str(tmp_path / "merged")]) == 0
    losses: list[float] = []
    for name in ("adapter", "merged", "base"):
        arguments = ["evaluate", str(tmp_path / name), "--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / f"{name}.json")]
        assert run([*arguments, "--window", "32"]) == 0
        losses.append(json.loads((tmp_path / f"{name}.json").read_text())["loss_nats"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-2


@pytest.mark.slow
def test_an_unconverted_olora_of_peft_is_refused(base, tmp_path, capsys) -> None:
    model = AutoModelForCausalLM.from_pretrained(base("llama"))
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights="olora", target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert "was not converted" in refused(capsys, ["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")])


def another_base(folder: Path) -> None:
    tensors = load_file(folder / "base" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(folder / "base")
    assert tensors


def damaged(folder: Path) -> None:
    path = folder / "adapter" / "adapter.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def no_json(folder: Path) -> None:
    (folder / "adapter" / "adapter.json").write_text("{", encoding="utf-8")


def later(folder: Path) -> None:
    path = folder / "adapter" / "adapter.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'), encoding="utf-8")


def empty(folder: Path) -> None:
    for file in (folder / "adapter").iterdir():
        file.unlink()


SPOILT = {
    another_base: "saved for another base",
    damaged: "checksum differs",
    no_json: "is not JSON",
    later: "update",
    empty: "holds no adapter",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_bad_adapters(base, tmp_path, capsys, spoil) -> None:
    saved(tmp_path / "adapter", base("llama"), "lora_xs")
    spoil(tmp_path)
    assert SPOILT[spoil] in refused(capsys, ["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*regraft"))


def test_an_unknown_format_is_named(base, tmp_path, capsys) -> None:
    saved(tmp_path / "adapter", base("llama"), "lora_xs")
    assert "did you mean 'peft-lora'" in refused(capsys, ["export", str(tmp_path / "adapter"), "--to", "peft_lora", "--output", "x"])
