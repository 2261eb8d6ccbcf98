"""Rows that training data lose are counted, in the result, on the model card and in the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import regraft
from regraft.settings import RecoverSettings
from regraft.training.job import DataCounts

Make = Callable[..., LlamaForCausalLM]


def instructions(path: Path) -> Path:
    """Ten short records, two of them too long for a window of 200 tokens, and two rows that cannot be read."""
    rows = [json.dumps({"instruction": f"Say {number}.", "output": f"{number}!"}) for number in range(10)]
    rows += [json.dumps({"instruction": "Count.", "output": "1 " * 200}), json.dumps({"instruction": "x" * 300, "output": "y"})]
    path.write_text("\n".join([*rows, "{", '{"words": 1}']) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_dropped_cut_and_skipped_rows_are_counted_everywhere(tmp_path: Path, make_tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    data = instructions(tmp_path / "data.jsonl")
    settings = RecoverSettings(steps=3, batch=2, seq_len=200, eval_every=1, held_out=0.1, skip_bad=True)
    result = regraft.recover(make_tiny(), tokenizer=tokenizer, data=data, settings=settings)
    counts = result.recovered.data
    assert counts.skipped.rows == 2
    assert counts.records is not None
    assert counts.records.prompt == "alpaca"
    held_out = 12 - counts.records.records
    assert held_out in (1, 2)
    assert counts.records.dropped <= 1
    assert counts.records.cut <= 1
    lines = counts.lines()
    assert any("2 rows could not be read" in line and "line 13" in line for line in lines)
    result.save_pretrained(tmp_path / "out")
    assert "rows could not be read" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "out" / "regraft.json").read_text(encoding="utf-8"))
    assert record["settings"]["skipped_rows"] == 2
    assert record["settings"]["records"]["records"] == counts.records.records


def test_text_loses_nothing_and_says_nothing() -> None:
    assert DataCounts().lines() == ()


def test_a_bad_row_is_refused_unless_it_may_be_skipped(tmp_path: Path, make_tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(regraft.RegraftError, match="line 13"):
        regraft.recover(make_tiny(), tokenizer=tokenizer, data=instructions(tmp_path / "data.jsonl"), steps=1, batch=2, seq_len=200)
