from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import regraft
from regraft.errors import DataError, InputError, ModelError
from regraft.pipelines.evaluate import evaluate_model
from regraft.settings import EvaluateSettings, LoadSettings

MakeModel = Callable[..., PreTrainedModel]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for a changed name


@pytest.fixture
def base(make_model: MakeModel, make_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path) -> Path:
    """A model folder with a tokenizer of one token a character."""
    folder = tmp_path / "base"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> EvaluateSettings:
    text = tmp_path / "held_out.txt"
    text.write_text("once upon a time\n<|endoftext|>\nthere was a cat\n")
    return EvaluateSettings(text=text, window=16)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A saved adapter that changes the model, beside its base."""
    model = get_peft_model(regraft.load(base).model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    return folder


def set_base(adapter: Path, base: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def test_a_folder_is_measured_whole(base: Path, settings: EvaluateSettings) -> None:
    measured = evaluate_model(str(base), settings)
    assert measured.label == str(base)
    assert (measured.loss.documents, measured.loss.tokens) == (2, 31)
    assert measured.loss.text == str(settings.text)
    assert measured.size.bytes_on_disk == (base / "model.safetensors").stat().st_size
    assert measured.speed is None
    assert regraft.evaluate(base, settings).loss == measured.loss


@pytest.mark.slow
def test_an_adapter_is_measured_on_its_base(base: Path, adapter: Path, settings: EvaluateSettings) -> None:
    plain, adapted = evaluate_model(base, settings), evaluate_model(adapter, settings)
    assert abs(adapted.loss.loss_nats - plain.loss.loss_nats) > 1e-3
    assert adapted.size.parameters - plain.size.parameters == 3 * 2 * ((48 + 48) + (64 + 48))
    assert adapted.size.bytes_on_disk == (adapter / "adapter_model.safetensors").stat().st_size
    merged = get_peft_model(regraft.load(base).model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    stored = load_file(adapter / "adapter_model.safetensors")
    merged.load_state_dict({name.replace(".weight", ".default.weight"): value for name, value in stored.items()}, strict=False)
    by_hand = base.parent / "merged"
    shutil.copytree(base, by_hand)
    merged.merge_and_unload().save_pretrained(by_hand)
    assert evaluate_model(by_hand, settings).loss.loss_nats == pytest.approx(adapted.loss.loss_nats, abs=1e-5)


@pytest.mark.slow
def test_an_adapter_finds_its_base_from_where_it_lies(
    base: Path, adapter: Path, settings: EvaluateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_model(adapter, settings).loss
    set_base(adapter, "../base")
    monkeypatch.chdir("/")
    assert evaluate_model(adapter, settings).loss == expected


@pytest.mark.parametrize("name", [None, "", 3])
def test_an_adapter_without_a_base_is_refused(adapter: Path, settings: EvaluateSettings, name: object) -> None:
    set_base(adapter, name)
    with pytest.raises(ModelError, match="names no base model"):
        evaluate_model(adapter, settings)


@pytest.mark.slow
def test_damaged_adapters_are_refused(base: Path, adapter: Path, settings: EvaluateSettings) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    stored = load_file(weights)
    weights.write_bytes(whole[:-7])
    with pytest.raises(ModelError, match="truncated"):
        evaluate_model(adapter, settings)
    first = sorted(stored)[0]
    save_file({name: value for name, value in stored.items() if name != first}, weights)
    with pytest.raises(ModelError, match=r"does not fit its base .*it lacks .*lora_"):
        evaluate_model(adapter, settings)
    save_file(stored | {first: torch.zeros(5, 7)}, weights)
    with pytest.raises(ModelError, match="does not fit its base"):
        evaluate_model(adapter, settings)
    save_file(stored | {first: torch.full_like(stored[first], float("nan"))}, weights)
    with pytest.raises(ModelError, match="NaN"):
        evaluate_model(adapter, settings)
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors"):
        evaluate_model(adapter, settings)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        evaluate_model(adapter, settings)


@pytest.mark.slow
def test_an_adapter_of_another_model_is_refused(adapter: Path, settings: EvaluateSettings, make_model: MakeModel, tmp_path: Path) -> None:
    set_base(adapter, str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"the base model of the adapter.*gone"):
        evaluate_model(adapter, settings)
    model = make_model("llama")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    shutil.copytree(tmp_path / "base", tmp_path / "shallow")
    model.save_pretrained(tmp_path / "shallow")
    set_base(adapter, str(tmp_path / "shallow"))
    with pytest.raises(ModelError, match=r"does not fit its base .*no place for .*layers.2"):
        evaluate_model(adapter, settings)


def test_bad_input_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        evaluate_model(tmp_path / "no model", EvaluateSettings(text=tmp_path / "no.txt"))


def test_settings_that_do_not_fit_the_model_are_refused(base: Path, settings: EvaluateSettings) -> None:
    with pytest.raises(InputError, match="`window=65` exceeds the model's context of 64"):
        evaluate_model(base, settings.model_copy(update={"window": 65}))
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        evaluate_model(base, settings)


@pytest.mark.slow
def test_the_number_type_is_the_loader_s(base: Path, settings: EvaluateSettings) -> None:
    full = evaluate_model(base, settings)
    half = evaluate_model(base, settings, load=LoadSettings(dtype="bfloat16"))
    assert half.size.bytes_in_memory < 0.51 * full.size.bytes_in_memory
    assert half.loss.loss_nats == pytest.approx(full.loss.loss_nats, rel=0.02)
