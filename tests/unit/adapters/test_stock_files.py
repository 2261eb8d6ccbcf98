"""Configs of stock adapters that lead elsewhere or never end are refused before PEFT sees them."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from regraft.adapters import stock_files
from regraft.adapters.stock_files import check_patterns, read_stock_config
from regraft.errors import ModelError

NAMES = [f"model.layers.{layer}.{name}" for layer in range(4) for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]


def written(folder: Path, **entries: object) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"} | entries))
    return folder


@pytest.mark.parametrize(
    "entries",
    [
        {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "evil.bin"},
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": "XLORA", "adapters": {"0": "/elsewhere"}},
        {"peft_type": ["LORA"]},
        {"peft_type": None},
        {"corda_config": {"cache_file": "/elsewhere"}},
        {"some_path": "/etc/passwd"},
        *({"alora_invocation_tokens": value} for value in (True, -1, "x", [], [1.5], [None], {"a": 1}, [10**30])),
    ],
    ids=str,
)
def test_other_kinds_and_paths_are_refused(tmp_path: Path, entries: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        read_stock_config(written(tmp_path, **entries))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"peft_type": "LORA"' + "," * 10, "\x00"])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        read_stock_config(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [r"(.*)*(.*)*x$", r"(a|a|.)*(.*)+\d$", r"(.+)+!"])
@pytest.mark.parametrize("place", ["target_modules", "exclude_modules", "rank_pattern"])
def test_patterns_that_never_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, place: str) -> None:
    monkeypatch.setattr(stock_files, "PATTERN_SECONDS", 0.5)
    config = read_stock_config(written(tmp_path, **{place: {pattern: 3} if place == "rank_pattern" else pattern}))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(ModelError, match="takes more than"):
        check_patterns(tmp_path, config, NAMES)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2  # of processor time, whatever else the machine does


@pytest.mark.parametrize("pattern", ["all-linear", r".*\.(q|gate)_proj", r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)"])
def test_the_usual_patterns_pass(tmp_path: Path, pattern: str) -> None:
    check_patterns(tmp_path, read_stock_config(written(tmp_path, target_modules=pattern)), NAMES)


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no pattern"):
        check_patterns(tmp_path, read_stock_config(written(tmp_path, target_modules="(*")), NAMES)
