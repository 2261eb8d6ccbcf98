"""Every command over every family of 2026: it works, or refuses in one line that says why; the marks are those of the page of families."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from families_grid import COLUMNS, CUT, GRID, KINDS, MODELS, OTHERS, PRUNED
from folders import text_file, tiny_tokenizer
from regraft.cli.app import run
from regraft.errors import RegraftError
from regraft.groups.discover import look_for
from regraft.groups.experts import expert_groups
from regraft.groups.traced import Traced
from regraft.models.load import load
from regraft.plans import Cut, GroupKind, Groups, PrunePlan
from regraft.surgery.cut import cut
from regraft.surgery.experts import cut_experts
from regraft.surgery.vocabulary import cut_vocabulary, ids_of_configs, vocabulary_groups

KINDS_OF_GROUPS: tuple[GroupKind, ...] = ("heads", "query_heads", "ffn", "mixer_heads", "layer", "residual")
SHORT = ("--samples", "2", "--seq-len", "16")


@cache
def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, values = (MODELS | OTHERS)[family]
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values)).eval()


@cache
def found_in(family: str) -> Traced:
    return look_for(model_of(family), KINDS_OF_GROUPS)


def cut_of_kind(family: str, kind: str) -> str:
    """Returns ``yes``, or why groups of a kind are not cut."""
    try:
        found = found_in(family)
    except RegraftError as error:
        return str(error)
    if not any(refusal.kind == kind for refusal in found.refusals) and not any(group.kind == kind for group in found.groups.groups):
        return "none"
    return (
        "yes"
        if any(group.kind == kind for group in found.groups.groups)
        else "; ".join(refusal.reason for refusal in found.refusals if refusal.kind == kind)
    )


def cut_of_experts(family: str) -> str:
    try:
        return "yes" if expert_groups(model_of(family)).groups else "none"
    except RegraftError as error:
        return "none" if "has no experts" in str(error) else str(error)


@torch.no_grad()
def cut_of_vocabulary(family: str) -> str:
    """Cuts ten tokens, and compares what is left with the model on text of kept tokens."""
    model: Any = model_of(family)
    try:
        groups: Groups = vocabulary_groups(model)
        stays = sorted(ids_of_configs(model) | (set(range(97)) - set(range(20, 30))))
        count = groups.parameters
        plan = PrunePlan(groups.fingerprint, "planted", "planted", "uniform", 0.1, 1, count, count, (Cut("vocabulary", tuple(stays)),))
        smaller: Any = cut_vocabulary(model, groups, plan)
    except RegraftError as error:
        return str(error)
    ids = torch.tensor([[3, 50, 7, 96, 12]])
    there = torch.tensor([[stays.index(number) for number in ids[0].tolist()]])
    want = model(ids, use_cache=False).logits[..., stays]
    assert (smaller(there, use_cache=False).logits - want).abs().max() <= 1e-5, family
    return "yes"


@cache
def short_text() -> Path:
    """Returns a file with a few thousand characters, so that reading it costs little beside the model."""
    path = text_file().with_name("short.txt")
    path.write_text(text_file().read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def command_of(family: str, column: str, folder: Path) -> list[str]:
    text = str(short_text())
    # Other families go on with what was pruned layer by layer, which equals what is cut in memory.
    model = str(folder / ("memory" if family in OTHERS and column != "memory" else "model"))
    if column == "memory":
        target = "ffn" if cut_of_kind(family, "ffn") == "yes" else "experts"
        asked = ["--align", "8"] if target == "ffn" else ["--calibration", text, *SHORT]
        return ["prune", model, "--targets", target, "--ratio", "0.1", "--criterion", "l2", "--memory", "3GB", *asked]
    if column == "recover":
        return ["recover", model, "--data", text, "--rank", "2", "--steps", "1", "--batch", "1", "--seq-len", "16", "--no-merge"]
    if column == "allocate":
        return ["allocate", model, "--method", "uniform", "--budget", "r=4", "--data", text]
    if column == "compress":
        return ["compress", model, "--ratio", "0.05", "--method", "svd"]
    if column == "peft-lora":
        return ["export", str(folder / "recover"), "--to", "peft-lora"]
    # The tiny tokenizer has no merges, which llama.cpp asks for; tests/unit/export/gguf compares the architectures with it. What other
    # families export to hf is compared below, which costs no process.
    unchecked = column == "gguf" or (family in OTHERS and column == "hf")
    return ["export", model, "--to", column, *(["--no-check"] if unchecked else [])]


def what_is_cut(family: str, column: str) -> str:
    if column in KINDS:
        return cut_of_kind(family, column)
    return cut_of_experts(family) if column == "experts" else cut_of_vocabulary(family)


def verdict(family: str, column: str, folder: Path, capsys: Any) -> str:
    """Returns ``yes``, or the line with which this is refused."""
    if column in CUT:
        return what_is_cut(family, column)
    name = "plan.json" if column == "allocate" else column
    capsys.readouterr()
    code = run([*command_of(family, column, folder), "-o", str(folder / name)])
    said = capsys.readouterr().err.strip()
    assert code in (0, 2), (family, column, said)
    if code == 0:
        return "yes"
    assert said.startswith("error: "), said
    assert len(said.splitlines()) == 1, said
    assert not (folder / name).exists(), "nothing half-written"
    return said.removeprefix("error: ")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(MODELS))
def test_every_command_works_or_says_why_not(family: str, tmp_path: Path, capsys: Any) -> None:
    model_of(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    marks = {column: verdict(family, column, tmp_path, capsys) for column in COLUMNS}
    for column, mark in marks.items():
        want = GRID[family].get(column, "yes")
        assert want in mark, (family, column, mark)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(OTHERS))
def test_other_families_are_cut_layer_by_layer_as_in_memory_and_recovered_and_exported(family: str, tmp_path: Path, capsys: Any) -> None:
    marks = {column: what_is_cut(family, column) for column in CUT}
    model_of(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    marks |= {column: verdict(family, column, tmp_path, capsys) for column in PRUNED}
    for column, mark in marks.items():
        assert GRID[family].get(column, "yes") in mark, (family, column, mark)
    streamed = load(tmp_path / "memory")
    assert streamed.provenance is not None
    plan = streamed.provenance.plan
    assert plan is not None
    model, got = model_of(family), streamed.model.state_dict()
    experts = marks["ffn"] == "none"
    whole = cut_experts(model, expert_groups(model), plan) if experts else cut(model, found_in(family).groups, plan)
    assert whole.num_parameters() < model.num_parameters()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(got[name], tensor), (family, name)
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([[3, 50, 7, 96, 12]])
    with torch.no_grad():
        assert (exported(ids, use_cache=False).logits - whole(ids, use_cache=False).logits).abs().max() <= 1e-5, family
