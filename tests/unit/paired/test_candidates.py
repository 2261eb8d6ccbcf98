"""Short recoveries side by side: each is the recovery it would be by itself, and what a real recovery gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rank_spaces import layer_space, plan_of
from regraft.adapters.nested_init import first_rows
from regraft.data.text import Corpus
from regraft.errors import InputError, ModelError, PlanError
from regraft.paired.candidates import Candidates
from regraft.paired.setup import PairedSetup
from regraft.plans import RankSpace
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject
from regraft.training.batches import collate, make_examples, spread
from regraft.training.distill import Teacher
from regraft.training.recover import recover

Make = Callable[..., LlamaForCausalLM]
Quick = Callable[..., RecoverSettings]
Corpora = tuple[Corpus, Corpus]
VECTORS = [(4, 4), (6, 2), (1, 6)]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def ground_of(tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick) -> Callable[..., PairedSetup]:
    """Returns ``make(model, space, corpora, teacher, cache_bytes, **settings)``."""

    def make(model: LlamaForCausalLM, space: RankSpace, corpora: Corpora = repeating, **values: Any) -> PairedSetup:
        apart = {key: values.pop(key) for key in ("teacher", "objective", "cache_bytes") if key in values}
        names = [name for slot in space.slots for name in slot.modules]
        return PairedSetup(model, tokenizer, *corpora, names, quick(**{"steps": 8, "eval_every": 3} | values), **apart)

    return make


def losses(candidates: Candidates, vectors: list[tuple[int, int]], fidelity: float = 1.0, seed: int = 4) -> list[float]:
    found = [trial.loss_nats for trial in candidates.measure(vectors, fidelity, seed)]
    assert all(loss is not None for loss in found)
    return [loss for loss in found if loss is not None]


@pytest.mark.long
@pytest.mark.parametrize(
    ("data", "values", "layers", "first"),
    [
        ("repeating", {}, 2, 0),
        ("repeating", {"schedule": "linear", "accumulate": 2, "batch": 2, "dropout": 0.3, "lr_ratio": 4.0, "max_grad_norm": 0.3}, 2, 0),
        ("repeating", {"adapter": "rslora", "schedule": "constant", "warmup": 0.5}, 3, 1),
        ("records", {"seq_len": 300, "steps": 4, "batch": 2, "packing": True}, 3, 1),
        ("repeating", {"distill": 0.7, "temperature": 2.0}, 2, 0),
    ],
)
def test_a_measurement_is_a_real_recovery(
    request: pytest.FixtureRequest,
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    quick: Quick,
    ground_of: Callable[..., PairedSetup],
    tmp_path: Path,
    data: str,
    values: dict[str, Any],
    layers: int,
    first: int,
) -> None:
    """The Trainer with PEFT's modules, one candidate at a time, with and without a frozen layer below."""
    corpora = request.getfixturevalue(data)
    model = make_tiny(num_hidden_layers=layers)
    space = layer_space(model, first=first)
    dense = Teacher(make_tiny(intermediate_size=80), "dense", tokenizer, "any") if "distill" in values else None
    ground = ground_of(model, space, corpora, teacher=dense, **values)
    assert ground.prefix.layers == first
    measured = losses(Candidates(ground, space), VECTORS)
    for index, ranks in enumerate(VECTORS):
        settings = quick(**{"steps": 8, "eval_every": 3, "ranks": plan_of(space, ranks), "quiet": True} | values)
        work = tmp_path / str(index)
        real = recover(make_tiny(num_hidden_layers=layers), tokenizer, *corpora, settings, seed=4, work=work, teacher=dense)
        assert real.best_loss < real.first_loss - 0.1
        # Sums are added in another order; eight steps of Adam amplify that.
        assert measured[index] == pytest.approx(real.best_loss, abs=2e-5)
    assert max(measured) - min(measured) > 1e-2, "the ranks make a difference here, so that a mix-up would show"


def test_what_a_candidate_has_learnt_can_be_folded_in(make_tiny: Make, ground_of: Callable[..., PairedSetup]) -> None:
    model = make_tiny()
    space = layer_space(model)
    candidates = Candidates(ground_of(model, space), space)
    assert candidates.change((6, 2), 4) is None
    measured = losses(candidates, [(6, 2), (4, 4)], 0.5)[0]
    change = candidates.change((6, 2), 4)
    assert change is not None
    assert {len(low_rank.right) for low_rank in change.values()} == {6, 2}
    with torch.no_grad():
        for name, low_rank in change.items():
            model.get_submodule(name).weight += low_rank.left @ low_rank.right
    assert ground_of(model, space).first_loss() == pytest.approx(measured, abs=1e-5)


@pytest.mark.slow
def test_together_is_alone(make_tiny: Make, ground_of: Callable[..., PairedSetup]) -> None:
    model = make_tiny()
    space = layer_space(model)
    together = losses(Candidates(ground_of(model, space), space, together=3), VECTORS)
    alone = losses(Candidates(ground_of(model, space), space, together=1), VECTORS)
    assert together == pytest.approx(alone, abs=1e-6)
    assert losses(Candidates(ground_of(model, space), space, together=2), VECTORS[::-1])[::-1] == pytest.approx(alone, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kept_in", ["memory", "folder"])
def test_a_survivor_goes_on_from_where_it_stopped(
    make_tiny: Make, ground_of: Callable[..., PairedSetup], tmp_path: Path, kept_in: str
) -> None:
    model = make_tiny()
    space = layer_space(model)
    folder = tmp_path / "kept" if kept_in == "folder" else None
    straight = Candidates(ground_of(model, space), space).measure(VECTORS, 1.0, 4)
    candidates = Candidates(ground_of(model, space), space, folder=folder)
    first = candidates.measure(VECTORS, 0.25, 4)
    if folder:  # another process
        candidates = Candidates(ground_of(model, space), space, folder=folder)
    last = candidates.measure(VECTORS[1:], 1.0, 4)
    assert [trial.loss_nats for trial in last] == pytest.approx([trial.loss_nats for trial in straight[1:]], abs=1e-6)
    # 8 steps of 4 windows, three passes each; looks at 4 held-out windows after steps 3 and 6 and at the end.
    whole = 8 * 4 * 3 + 3 * 4
    assert straight[0].cost == pytest.approx(1.0)
    assert first[0].cost == pytest.approx((2 * 12 + 4) / whole)
    assert last[0].cost == pytest.approx((6 * 12 + 3 * 4) / whole)
    assert [trial.fidelity for trial in first] == [0.25] * 3
    again = candidates.measure(VECTORS[1:], 1.0, 4)
    assert [trial.loss_nats for trial in again] == [trial.loss_nats for trial in last]
    assert [trial.cost for trial in again] == [trial.cost for trial in last], "killed before it was recorded, a trial costs the same"


@pytest.mark.slow
def test_other_data_or_seeds_do_not_continue_what_is_kept(make_tiny: Make, ground_of: Callable[..., PairedSetup], tmp_path: Path) -> None:
    model = make_tiny()
    space = layer_space(model)
    Candidates(ground_of(model, space), space, folder=tmp_path).measure([(4, 4)], 0.5, 4)
    other = Corpus("other", "train", tuple("hgfedcba" * 12 for _ in range(12)))
    for ground, seed in ((ground_of(model, space), 5), (ground_of(model, space, (other, other)), 4), (ground_of(model, space, lr=1e-3), 4)):
        trial = Candidates(ground, space, folder=tmp_path).measure([(4, 4)], 1.0, seed)[0]
        assert trial.cost == pytest.approx(1.0)
    for file in tmp_path.iterdir():  # damage costs steps and nothing else
        file.write_bytes(b"damaged")
    assert Candidates(ground_of(model, space), space, folder=tmp_path).measure([(4, 4)], 1.0, 4)[0].cost == pytest.approx(1.0)


def test_all_ranks_start_from_the_same_rows(make_tiny: Make) -> None:
    """PEFT's LoRA on a model starts there too; the distribution is Kaiming's as PEFT draws it."""
    rows = first_rows("m", 40, 1000, 3)
    for rank in (1, 2, 7, 39):
        assert torch.equal(first_rows("m", rank, 1000, 3), rows[:rank])
    assert not torch.equal(first_rows("n", 40, 1000, 3), rows)
    drawn = nn.init.kaiming_uniform_(torch.empty(40, 1000), a=5**0.5, generator=torch.Generator().manual_seed(0))
    assert float(rows.abs().max()) == pytest.approx(float(drawn.abs().max()), rel=1e-3)
    assert float(rows.std()) == pytest.approx(float(drawn.std()), rel=0.01)
    space = layer_space(make_tiny())
    small, large = (
        inject(make_tiny(), RecoverSettings(ranks=plan_of(space, ranks)), plan_of(space, ranks), seed=9).module.state_dict()
        for ranks in ((1, 2), (6, 4))
    )
    shared = [name for name in small if "lora_A" in name]
    assert len(shared) == 14
    for name in shared:
        assert torch.equal(small[name], large[name][: len(small[name])])


@pytest.mark.slow
def test_a_candidate_that_diverges_leaves_the_others_alone(
    make_tiny: Make, ground_of: Callable[..., PairedSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny()
    space = layer_space(model)
    alone = losses(Candidates(ground_of(model, space), space), VECTORS[1:])
    train_step, calls = PairedSetup.train_step, []

    def struck(self: PairedSetup, seed: int, step: int, copies: int) -> torch.Tensor:
        found = train_step(self, seed, step, copies)
        calls.append(copies)
        if step == 3:
            found[0] = float("nan")
        return found

    monkeypatch.setattr(PairedSetup, "train_step", struck)
    candidates = Candidates(ground_of(model, space), space, together=3)
    trials = candidates.measure(VECTORS, 1.0, 4)
    assert trials[0].loss_nats is None
    assert trials[0].note == "the training loss became nan at step 4"
    assert 0.4 < trials[0].cost < 0.6
    assert [trial.loss_nats for trial in trials[1:]] == pytest.approx(alone, abs=1e-6)
    assert calls == [3] * 4 + [2] * 4


def test_a_rate_that_is_far_too_high_is_a_failed_trial(make_tiny: Make, ground_of: Callable[..., PairedSetup]) -> None:
    model = make_tiny()
    space = layer_space(model)
    trials = Candidates(ground_of(model, space, lr=1e30, warmup=0.0), space).measure(VECTORS, 1.0, 4)
    assert [trial.loss_nats for trial in trials] == [None] * 3
    assert all("loss became" in trial.note for trial in trials)


@pytest.mark.slow
def test_the_divergence_from_a_teacher_is_the_dense_formula(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, ground_of: Callable[..., PairedSetup]
) -> None:
    model, teacher = make_tiny(), make_tiny(num_hidden_layers=3)
    space = layer_space(model)
    ground = ground_of(model, space, teacher=Teacher(teacher, "dense", tokenizer, "any"), objective="divergence", distill=1.0)
    ids = collate(spread(make_examples(repeating[1], tokenizer, 24, wanted=4, seed=0), 4), 2)["input_ids"]
    with torch.no_grad():
        p, q = (torch.log_softmax(each(input_ids=ids).logits[:, :-1].double(), -1) for each in (teacher, model))
    assert ground.first_loss() == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert losses(Candidates(ground, space), [(4, 4)])[0] < ground.first_loss() - 0.1


@pytest.mark.slow
def test_layers_below_the_first_adapted_one_run_once_a_batch(make_tiny: Make, ground_of: Callable[..., PairedSetup]) -> None:
    model = make_tiny(num_hidden_layers=4)
    space = layer_space(model, first=2)
    ground = ground_of(model, space)
    passes: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda module, inputs, output: passes.append(1))
    kept = losses(Candidates(ground, space, together=1), VECTORS)
    assert len(passes) == 8 + 1, "eight training batches and one of held-out rows, for three candidates and all looks"
    without = losses(Candidates(ground_of(model, space, cache_bytes=0), space, together=1), VECTORS)
    assert len(passes) > 40
    assert without == kept
    ground = ground_of(model, space)
    ground.prefix.layers = 0
    assert losses(Candidates(ground, space, together=1), VECTORS) == pytest.approx(kept, abs=1e-6)


@pytest.mark.slow
def test_fewer_at_a_time_where_memory_is_short(
    make_tiny: Make, ground_of: Callable[..., PairedSetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny()
    space = layer_space(model)
    expected = losses(Candidates(ground_of(model, space), space), VECTORS)
    train_step, most = PairedSetup.train_step, 1

    def small(self: PairedSetup, seed: int, step: int, copies: int) -> torch.Tensor:
        if copies > most:
            raise torch.OutOfMemoryError("no")
        return train_step(self, seed, step, copies)

    monkeypatch.setattr(PairedSetup, "train_step", small)
    assert losses(Candidates(ground_of(model, space), space, together=3), VECTORS) == pytest.approx(expected, abs=1e-6)
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        Candidates(ground_of(model, space), space).measure([(4, 4)], 1.0, 4)


def test_model_and_generators_are_left_as_they_were(make_tiny: Make, ground_of: Callable[..., PairedSetup]) -> None:
    model = make_tiny().to(torch.float16).train()
    model.model.norm.weight.requires_grad_(False)
    space = layer_space(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ground = ground_of(model, space)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    losses(Candidates(ground, space), VECTORS[:1], 0.25)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["model.norm.weight"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_input_is_one_line(make_tiny: Make, ground_of: Callable[..., PairedSetup]) -> None:
    model = make_tiny()
    space = layer_space(model)
    candidates = Candidates(ground_of(model, space), space)
    with pytest.raises(InputError, match=r"^fidelity 0\.0 is not in \(0, 1\]"):
        candidates.measure([(4, 4)], 0.0, 0)
    with pytest.raises(PlanError, match="are not of this space"):
        candidates.measure([(6, 6)], 1.0, 0)
    with pytest.raises(InputError, match="lora or rslora, not with `adapter=dora`"):
        Candidates(ground_of(model, space, adapter="dora"), space)
    teacher = Teacher(make_tiny(vocab_size=50), "small", None, "any")
    with pytest.raises(ModelError, match="'small' has another vocabulary: 50 tokens"):
        ground_of(model, space, teacher=teacher)
    with pytest.raises(InputError, match="give one with `teacher`"):
        ground_of(model, space, objective="divergence")
    other = make_tiny(num_hidden_layers=4)
    with pytest.raises(InputError, match=r"'model\.layers\.2.self_attn\.q_proj', which this model does not have"):
        ground_of(model, layer_space(other))
    with pytest.raises(InputError, match="`seq_len=600` exceeds"):
        ground_of(model, space, seq_len=600)
    with pytest.raises(InputError, match="`load_in_4bit` is not known while ranks are compared"):
        ground_of(model, space, load_in_4bit=True)
    assert candidates.measure([], 1.0, 0) == []
