"""Recovery of a real model on real text: what pruning cost is won back in part, and what is saved is what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.text import Corpus, read_corpus, split_corpus
from regraft.models.provenance import versions
from regraft.models.save import save
from regraft.pipelines.recover import recover_model
from regraft.plans import Provenance
from regraft.settings import RecoverSettings

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "data" / "tinystories" / "train.txt"
MODEL = SHARED / "models" / "stories260K"

pytestmark = pytest.mark.skipif(not (STORIES.is_file() and MODEL.is_dir()), reason=f"no real model and text in {SHARED}")


@pytest.fixture
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


def zero_half_of_the_channels(model: PreTrainedModel) -> None:
    """Prunes as crudely as can be: every other feed-forward channel writes nothing."""
    with torch.no_grad():
        for layer in model.get_submodule("model.layers"):
            layer.get_submodule("mlp").down_proj.weight[:, ::2] = 0.0


def independent_loss(folder: Path, text: Corpus) -> float:
    """Returns the mean loss of a token in nats over the first stories, one by one, by the definition."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for story in text.documents[:40]:
        ids = tokenizer(story, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.long
def test_sixty_steps_win_back_much_of_a_crude_pruning(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    model, tokenizer = loaded
    zero_half_of_the_channels(model)
    save(model, tokenizer, tmp_path / "pruned", Provenance("test", str(MODEL), "", 0, versions()), "# pruned\n")
    settings = RecoverSettings(data=STORIES, steps=60, eval_every=20, seq_len=128, lr=2e-3, held_out_windows=32)
    result = recover_model(tmp_path / "pruned", tmp_path / "recovered", settings, seed=0)
    assert result.recovered.best_step == 60
    _, held_out = split_corpus(read_corpus(STORIES, "train"), settings.held_out, 0)
    dense, pruned, recovered = (independent_loss(path, held_out) for path in (MODEL, tmp_path / "pruned", tmp_path / "recovered"))
    print(f"dense {dense:.4f}, pruned {pruned:.4f}, recovered {recovered:.4f} nats")
    assert dense < recovered < pruned
    assert (pruned - recovered) / (pruned - dense) > 0.4
    assert result.recovered.first_loss - result.recovered.best_loss == pytest.approx(pruned - recovered, abs=0.3)
