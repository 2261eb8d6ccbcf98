"""Distillation against the formula written out, with and without a cache, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.data.text import Corpus
from regraft.errors import DataError, InputError, ModelError, OutputError, TrainingError
from regraft.models.view import fingerprint
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject
from regraft.training import distill, teacher_cache
from regraft.training import recover as module
from regraft.training.batches import Example, collate
from regraft.training.distill import Distillation, Readout, Teacher, fit_projections, layer_pairs
from regraft.training.recover import recover
from regraft.training.teacher_cache import TeacherCache

Make = Callable[..., LlamaForCausalLM]
Quick = Callable[..., RecoverSettings]
Corpora = tuple[Corpus, Corpus]


def teacher_of(model: Any, tokenizer: PreTrainedTokenizerFast | None = None) -> Teacher:
    return Teacher(model, "the teacher", tokenizer, fingerprint(model))


def other(model: LlamaForCausalLM, seed: int = 5) -> LlamaForCausalLM:
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def a_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for tokens, ignored in ((9, 0), (6, 3), (9, 4)):
        ids = torch.randint(3, 90, (tokens,), generator=generator)
        labels = ids.clone()
        labels[:ignored] = -100
        rows.append(Example(ids, labels))
    return collate(rows, 2)


def squashing() -> Gemma2ForCausalLM:
    """A model whose logits are not its head times its last hidden states."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 98, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, max_position_embeddings=64)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3)
    return model


def by_definition(student: Any, teacher: Any, batch: dict[str, torch.Tensor], settings: RecoverSettings) -> torch.Tensor:
    """Full logits in float64, one position after the other."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ours = student(**inputs, output_hidden_states=True)
    theirs = teacher(**inputs, output_hidden_states=True)
    total = torch.zeros((), dtype=torch.float64)
    chosen = []
    for row, labels in enumerate(batch["labels"]):
        for position in range(len(labels) - 1):
            if labels[position + 1] == -100:
                continue
            chosen.append((row, position))
            z, u = ours.logits[row, position].double(), theirs.logits[row, position].double()
            t = settings.temperature
            p = (u / t).softmax(0)
            kl = (p * (p.log() - (z / t).log_softmax(0))).sum()
            total = total - (1 - settings.distill) * z.log_softmax(0)[labels[position + 1]] + settings.distill * t * t * kl
    for mine, target in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        a = torch.stack([mine[place] for place in chosen]).double()
        b = torch.stack([target[place] for place in chosen]).double()
        total = total + settings.distill_hidden * (a - b).square().mean(1).sum() / b.square().mean() / len(ours.hidden_states[1:])
    return total


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "asked",
    [
        {"distill": 0.5},
        {"distill": 1.0, "temperature": 3.0},
        {"distill": 0.3, "distill_hidden": 0.7},
        {"distill": 0.0, "distill_hidden": 2.0},
    ],
)
def test_the_loss_and_its_gradient_are_those_of_the_definition(make_tiny: Make, quick: Quick, kind: str, asked: dict[str, Any]) -> None:
    settings = quick(**asked, dropout=0.0)
    student, teacher = (make_tiny(), other(make_tiny())) if kind == "llama" else (squashing(), other(squashing()))
    injected = inject(student, settings, None, 0)
    for name, parameter in injected.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = [parameter for parameter in injected.module.parameters() if parameter.requires_grad]
    loss = Distillation(student, teacher, settings, torch.float32)
    assert Readout(student, torch.float32).fused == (kind == "llama")
    injected.module.eval()
    found, expected = loss(injected.module, a_batch()), by_definition(injected.module, teacher, a_batch(), settings)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, wanted in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_the_logits_of_all_positions_never_exist(make_tiny: Make, quick: Quick, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_PIECE_VALUES", {"cpu": 4 * 99, "cuda": 4 * 99})
    student = make_tiny()
    settings = quick(dropout=0.0)
    injected = inject(student, settings, None, 0)
    loss = Distillation(student, other(make_tiny()), settings, torch.float32)
    seen: list[int] = []
    original = Readout.logits

    def logits(self: Any, last: torch.Tensor) -> torch.Tensor:
        seen.append(len(last))
        return original(self, last)

    monkeypatch.setattr(Readout, "logits", logits)
    whole: list[int] = []
    student.lm_head.register_forward_hook(lambda *parts: whole.append(parts[2].shape[1]))
    loss(injected.module, a_batch()).backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * (8 + 3 + 5)
    assert whole == [1]


@pytest.mark.long
def test_a_student_learns_its_teacher(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    """From distillation alone, on text that says nothing: what is learned can only come from the teacher."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(0, 26, (96,), generator=generator).tolist() for _ in range(12)]
    noise = Corpus("noise", "train", tuple("".join(chr(97 + value) for value in draw) for draw in draws))
    teacher = make_tiny()
    recover(teacher, tokenizer, *repeating, quick(steps=40, eval_every=40), seed=0, work=tmp_path / "t")
    teacher.requires_grad_(False)
    held_out = repeating[1]
    taught, untaught = (
        recover(
            make_tiny(),
            tokenizer,
            noise,
            held_out,
            quick(steps=40, eval_every=20, distill=share, dropout=0.0),
            seed=0,
            work=tmp_path / str(share),
            teacher=teacher_of(teacher, tokenizer),
        )
        for share in (1.0, 0.0)
    )
    assert taught.best_loss < untaught.best_loss - 0.5


def run(make_tiny: Make, tokenizer: Any, corpora: Corpora, settings: RecoverSettings, work: Path, resume: bool = False) -> Any:
    teacher = teacher_of(other(make_tiny()), tokenizer)
    result = recover(make_tiny(), tokenizer, *corpora, settings, seed=0, work=work, resume=resume, teacher=teacher)
    return result, {name: value.clone() for name, value in result.model.state_dict().items()}, teacher


@pytest.mark.long
def test_a_cache_of_all_tokens_gives_what_the_teacher_gives_and_lets_it_go(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    base = {"steps": 6, "eval_every": 6, "dropout": 0.0, "temperature": 2.0}
    _, beside, alive = run(make_tiny, tokenizer, repeating, quick(**base), tmp_path / "a")
    cached = quick(**base, teacher_cache=tmp_path / "cache", teacher_top_k=1000)
    _, stored, released = run(make_tiny, tokenizer, repeating, cached, tmp_path / "b")
    for name, value in beside.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-4, atol=1e-5)
    assert alive.model is not None
    assert released.model is None
    few, third = quick(**base, teacher_cache=tmp_path / "cache", teacher_top_k=3), tmp_path / "c"
    _, coarse, _ = run(make_tiny, tokenizer, repeating, few, third)
    assert any(not torch.equal(coarse[name], value) for name, value in stored.items())
    assert len(list((tmp_path / "cache").iterdir())) == 2  # one folder for each K


@pytest.mark.long
def test_a_cache_is_shared_and_gone_on_with(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "_ROWS_OF_A_FILE", 4)
    settings = quick(steps=6, eval_every=6, teacher_cache=tmp_path / "cache", teacher_top_k=5)
    asked: list[int] = []
    original = TeacherCache._asked

    def count(self: Any, teacher: Any, readout: Any, keys: Any, rows: Any, padding: int) -> Any:
        if len(asked) == 3 and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise KeyboardInterrupt
        asked.append(len(keys))
        return original(self, teacher, readout, keys, rows, padding)

    monkeypatch.setattr(TeacherCache, "_asked", count)
    with pytest.raises(KeyboardInterrupt):
        run(make_tiny, tokenizer, repeating, settings, tmp_path / "a")
    before = sum(asked)
    _, first, _ = run(make_tiny, tokenizer, repeating, settings, tmp_path / "a", resume=True)
    rows = sum(asked)
    assert 0 < before < rows
    assert not [path for path in (tmp_path / "cache").rglob("*") if "regraft" in path.name]
    slower = settings.model_copy(update={"lr": 1e-3})
    run(make_tiny, tokenizer, repeating, slower, tmp_path / "b")
    assert sum(asked) == rows  # nothing was asked twice
    _, again, _ = run(make_tiny, tokenizer, repeating, settings, tmp_path / "c")
    assert all(torch.equal(again[name], value) for name, value in first.items())
    damaged = next((tmp_path / "cache").rglob("rows-*"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(DataError, match=r"teacher's cache '.*rows-.*' is damaged .* remove that file"):
        run(make_tiny, tokenizer, repeating, settings, tmp_path / "d")
    with pytest.raises(OutputError, match=r"`teacher_cache` '.*again' is a file; name a folder"):
        run(make_tiny, tokenizer, repeating, settings.model_copy(update={"teacher_cache": tmp_path / "again"}), tmp_path / "e")


@pytest.mark.long
@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_distillation_ends_with_the_same_bytes(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
) -> None:
    settings = quick(dropout=0.3, steps=12, lr_ratio=4.0, teacher_cache=tmp_path / "cache" if cached else None, distill_hidden=0.0)
    _, undisturbed, _ = run(make_tiny, tokenizer, repeating, settings, tmp_path / "a")
    original = module.Pace.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module.Pace, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run(make_tiny, tokenizer, repeating, settings, tmp_path / "b")
    _, resumed, _ = run(make_tiny, tokenizer, repeating, settings, tmp_path / "b", resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    with pytest.raises(TrainingError, match="are of another run: teacher was"):
        recover(make_tiny(), tokenizer, *repeating, settings, seed=0, work=tmp_path / "b", resume=True)


@pytest.mark.slow
def test_a_teacher_of_another_width_is_mapped(make_tiny: Make, quick: Quick) -> None:
    """Hidden states that are a planted linear map of the teacher's are found again."""
    student, teacher = make_tiny(), make_tiny(hidden_size=48, head_dim=8, num_hidden_layers=4)
    assert fit_projections(student, make_tiny(num_hidden_layers=4), [a_batch()], torch.float32) == ()
    batches = [{"input_ids": torch.randint(3, 90, (4, 100)), "labels": torch.ones(4, 100, dtype=torch.int64)} for _ in range(3)]
    projections = fit_projections(student, teacher, batches, torch.float32)
    assert [tuple(one.shape) for one in projections] == [(48, 32)] * 2
    loss = Distillation(student, teacher, quick(distill_hidden=1.0, distill=0.0), torch.float32, projections)
    injected = inject(student, quick(dropout=0.0), None, 0)
    assert torch.isfinite(loss(injected.module, a_batch()))
    # Least squares: no other map of the last layers does better.
    inputs = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        ours = make_tiny()(input_ids=inputs, output_hidden_states=True).hidden_states[-1][:, :-1].flatten(0, 1).double()
        theirs = teacher(input_ids=inputs, output_hidden_states=True).hidden_states[-1][:, :-1].flatten(0, 1).double()
    best = torch.linalg.lstsq(theirs, ours).solution
    residual, least = (float((theirs @ map_ - ours).square().sum()) for map_ in (projections[-1].double(), best))
    assert least <= residual <= 1.001 * least


def test_layers_are_paired_by_depth() -> None:
    assert layer_pairs(4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert layer_pairs(2, 6) == [(0, 2), (1, 5)]
    assert layer_pairs(3, 2) == [(0, 0), (1, 0), (2, 1)]


def test_a_teacher_with_another_vocabulary_is_refused(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    larger = teacher_of(make_tiny(vocab_size=200))
    with pytest.raises(
        ModelError, match=r"the teacher 'the teacher' has another vocabulary: 200 tokens, the student has 99; give a teacher"
    ) as raised:
        recover(make_tiny(), tokenizer, *repeating, quick(), seed=0, work=tmp_path / "w", teacher=larger)
    assert "\n" not in str(raised.value)
    renamed = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<end>")
    with pytest.raises(ModelError, match="has another vocabulary"):
        recover(make_tiny(), tokenizer, *repeating, quick(), seed=0, work=tmp_path / "w", teacher=teacher_of(make_tiny(), renamed))
    both = quick(distill_hidden=1.0, teacher_cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"`distill_hidden` needs .* give one of the two"):
        recover(make_tiny(), tokenizer, *repeating, both, seed=0, work=tmp_path / "w", teacher=teacher_of(make_tiny(), tokenizer))
