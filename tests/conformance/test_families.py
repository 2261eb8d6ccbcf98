"""Every family, every mode: removing equals zeroing, counts are exact, and what is saved loads."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import fresh
from regraft.groups.discover import discover, refusals
from regraft.models.build import declared_sizes
from regraft.models.family import families
from regraft.models.load import load
from regraft.models.save import save
from regraft.models.view import ModelView, parameter_count
from regraft.plans import Cut, Provenance
from regraft.surgery.cut import cut
from verdicts import ALL, KINDS, MODES, TITLES, cuts_for, even_cut, logits, page, plan_for, shape_of, subject, verdict

REFUSED = {("falcon-alibi", "residual"), ("falcon-alibi", "together")}
QUICK = ("llama", "qwen3", "gpt2", "gemma2", "phi3")  # one of each way to lay out weights, for `make test-fast`
NOT_THERE = {(family, "query_heads") for family in ALL if shape_of(family)[1] == 1} | {("falcon", "heads"), ("gpt_bigcode", "heads")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in ALL])
def test_removed_equals_zeroed(family, mode):
    found = verdict(family, mode)
    assert bool(found.missing) == ((family, mode) in REFUSED | NOT_THERE), found.missing
    if found.missing:
        return
    assert found.error <= 1e-5
    assert found.effect > 1e-2, "the cut must matter, or the test proves nothing"
    assert found.miscounted == 0


def test_every_family_is_here():
    assert {ModelView(subject(name)[0]).family.model_type for name in ALL} == set(families())
    assert set(TITLES) == set(ALL)


@pytest.mark.slow
def test_what_is_refused_says_why():
    assert {refusal.kind for refusal in refusals(subject("falcon-alibi")[0])} == {"residual"}
    assert "alibi" in verdict("falcon-alibi", "residual").missing


@pytest.mark.long
def test_the_page_of_families_is_up_to_date():
    written = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert written == page(), "run: python scripts/make_families.py"


def smaller(family: str, mode: str) -> PreTrainedModel:
    model, groups = subject(family)
    return cut(model, groups, plan_for(groups, cuts_for(groups, family, mode)))


def widest(family: str) -> str:
    """The mode that cuts most in this family."""
    return "mlp" if (family, "together") in REFUSED else "together"


def saved(model: PreTrainedModel, folder: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(model, None, str(folder), Provenance("test", "random", "0" * 16, 0, {}), "# Test")


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_saved_loaded_and_generated(family, tmp_path):
    pruned = smaller(family, widest(family))
    view = ModelView(pruned)
    assert tuple(view.sizes(layer) for layer in range(len(view.layers))) == declared_sizes(pruned.config)
    want = logits(pruned)
    saved(pruned, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(loaded) is type(pruned)
    assert torch.equal(logits(loaded), want)
    again = load(tmp_path / "model").model
    assert torch.equal(logits(again), want)
    ids = torch.tensor([[5, 9, 2, 31]])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, use_cache=True, **settings), loaded.generate(ids, use_cache=False, **settings))


AGAIN = ("bloom", "falcon", "falcon-alibi", "gemma3", "gpt2", "llama", "olmo2", "opt-350m", "phi3", "starcoder2")


@pytest.mark.slow
@pytest.mark.parametrize("family", AGAIN)
def test_a_pruned_model_is_pruned_again(family):
    """Half the channels in two steps are half the channels in one; what is gone stays gone, in norms and slopes too."""
    model, groups = subject(family)
    residual = bool(groups.of("residual"))
    heads = next(kind for kind in ("heads", "query_heads") if groups.named()[f"layers.1.{kind}"].units > 1)
    units = groups.named()[f"layers.1.{heads}"].units
    first = [Cut(f"layers.1.{heads}", tuple(range(1, units))), Cut("layers.0.ffn", tuple(range(50)))]
    then = [Cut(f"layers.1.{heads}", tuple(range(units - 2)))] if units > 2 else []
    then.append(Cut("layers.0.ffn", tuple(range(10, 50))))
    straight = [Cut(f"layers.1.{heads}", tuple(range(1, units))[: max(1, units - 2)]), Cut("layers.0.ffn", tuple(range(10, 50)))]
    if residual:
        first.append(Cut("residual", tuple(range(4, 48))))
        then.append(Cut("residual", tuple(range(40))))
        straight.append(Cut("residual", tuple(range(4, 44))))
    once = cut(model, groups, plan_for(groups, tuple(first)))
    again = discover(once, KINDS)
    twice = cut(once, again, plan_for(again, tuple(then)))
    direct = cut(model, groups, plan_for(groups, tuple(straight)))
    assert parameter_count(twice) == parameter_count(direct)
    assert (logits(twice) - logits(direct)).abs().max() <= 1e-5


STOCK = [
    ("gemma2", "ffn"), ("phi3", "heads"), ("olmo2", "heads"), ("gpt2", "ffn"), ("gpt_neox", "ffn"), ("opt", "ffn"), ("falcon", "ffn"),
    ("stablelm", "ffn"), ("starcoder2", "heads"), ("qwen3", "residual"), ("gemma3", "residual"), ("llama", "layer"), ("bloom", "layer"),
    ("falcon-grouped", "layer"), ("gpt2", "layer"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), STOCK)
def test_even_cuts_give_the_stock_class(family, kind):
    pruned = even_cut(family, kind)
    assert type(pruned) is type(subject(family)[0])
    assert parameter_count(pruned) < parameter_count(subject(family)[0])


PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
folders = json.loads(sys.argv[1])
ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
found = {}
with torch.no_grad():
    for name, folder in folders.items():
        found[name] = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()(ids).logits.contiguous()
assert "regraft" not in sys.modules
save_file(found, sys.argv[2])
"""


@pytest.mark.slow
def test_without_regraft_the_code_in_the_folder_is_enough(tmp_path):
    """A fresh process that cannot import regraft loads a pruned model of every family."""
    folders: dict[str, str] = {}
    want: dict[str, torch.Tensor] = {}
    for family in ALL:
        pruned = smaller(family, widest(family))
        saved(pruned, tmp_path / family)
        folders[family], want[family] = str(tmp_path / family), logits(pruned)
    path = [entry for entry in sys.path if "regraft" not in entry and not entry.rstrip("/").endswith("src")]
    hidden = "import sys; sys.modules['regraft'] = None\n"  # an editable installation would still be found
    code = hidden + PROGRAM.replace('"regraft" not in sys.modules', "sys.modules['regraft'] is None")
    done = fresh.run(["-c", code, json.dumps(folders), str(tmp_path / "out.safetensors")], env={"PYTHONPATH": ":".join(path)})
    assert done.returncode == 0, done.stderr[-2000:]
    got = load_file(tmp_path / "out.safetensors")
    for family in ALL:
        torch.testing.assert_close(got[family], want[family], atol=1e-5, rtol=0)
