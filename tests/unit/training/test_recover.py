"""Recovery against a loop written by hand, and what it keeps, refuses and leaves alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations import integration_utils
from transformers.utils import logging as transformers_logging

from regraft.data.text import Corpus
from regraft.errors import DataError, InputError, PlanError, RegraftError, TrainingError
from regraft.plans import RankPlan, to_json
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject
from regraft.training import job as job_module
from regraft.training import recover as module
from regraft.training.batches import collate, make_examples, shuffled, spread
from regraft.training.callbacks import Keeper, log_csv
from regraft.training.losses import mean_loss
from regraft.training.recover import Recovered, finish, recover, train_adapter

CPU = torch.device("cpu")
Make = Callable[..., LlamaForCausalLM]
Quick = Callable[..., RecoverSettings]
Corpora = tuple[Corpus, Corpus]


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def held_out_loss(model: torch.nn.Module, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, settings: RecoverSettings) -> float:
    rows = make_examples(corpus, tokenizer, settings.seq_len, wanted=settings.held_out_windows, seed=0)
    return mean_loss(model, [collate(spread(rows, settings.held_out_windows), 2)], CPU)


def by_hand(
    model: LlamaForCausalLM, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, settings: RecoverSettings, seed: int
) -> tuple[torch.nn.Module, list[float]]:
    """Plain PEFT, AdamW and the formulas of the schedule, the clipping and the loss; no Trainer."""
    first = inject(model, settings, None, seed)
    factors = {name: value.clone() for name, value in first.module.state_dict().items() if "lora" in name}
    plain = first.adapter.merge(first.module)  # the factors are zero in B, so that this changes nothing
    config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(plain, config)
    adapted.load_state_dict(factors, strict=False)
    count = settings.steps * settings.batch * settings.accumulate
    rows = make_examples(corpus, tokenizer, settings.seq_len, wanted=count, seed=seed)
    order = shuffled(len(rows), count, seed)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    warm = round(settings.warmup * settings.steps)
    losses = []
    for step in range(settings.steps):
        part = (step - warm) / (settings.steps - warm)
        rate = step / warm if step < warm else {"cosine": 0.5 * (1 + math.cos(math.pi * part)), "linear": 1 - part}[settings.schedule]
        optimizer.param_groups[0]["lr"] = settings.lr * rate
        size = settings.batch * settings.accumulate
        batch = collate([rows[index] for index in order[step * size : (step + 1) * size]], padding=2)
        labels = batch.pop("labels")
        logits = adapted.eval()(**batch).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(parameter.grad.square().sum() for parameter in trained))
        for parameter in trained:
            parameter.grad *= min(1.0, settings.max_grad_norm / (float(norm) + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    return adapted, losses


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("repeating", {"schedule": "cosine"}),
        ("repeating", {"schedule": "linear", "accumulate": 2, "batch": 2, "warmup": 0.3, "max_grad_norm": 0.5}),
        ("records", {"schedule": "cosine", "seq_len": 300}),
        ("records", {"schedule": "cosine", "seq_len": 300, "accumulate": 2, "batch": 2}),
    ],
)
def test_training_is_that_of_a_loop_written_by_hand(
    request: pytest.FixtureRequest,
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    quick: Quick,
    tmp_path: Path,
    data: str,
    settings: dict[str, Any],
) -> None:
    train, held_out = request.getfixturevalue(data)
    made = quick(dropout=0.0, steps=6, eval_every=6, merge=False, lr=3e-3, **settings)
    expected, losses = by_hand(make_tiny(), train, tokenizer, made, seed=4)
    result = recover(make_tiny(), tokenizer, train, held_out, made, seed=4, work=tmp_path)
    mine = load_file(tmp_path / "checkpoint-6" / "trained.safetensors")
    moved = 0
    for name, value in expected.state_dict().items():
        if "lora" in name:
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
            moved += float(value.abs().max()) > 1e-3
    assert moved == len(mine) == 2 * 7 * 2
    row = result.log[-1]
    assert row.train_loss_nats == pytest.approx(sum(losses) / 6, abs=1e-4)


@pytest.mark.long
def test_a_planted_pattern_is_learned_and_merged(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    model = make_tiny()
    before = tensors(model)
    settings = quick(steps=60, eval_every=20)
    result = recover(model, tokenizer, *repeating, settings, seed=0, work=tmp_path / "work")
    assert result.model is model
    assert result.injected is None
    assert result.best_loss < 1.0 < 4.0 < result.first_loss
    assert held_out_loss(model, repeating[1], tokenizer, settings) == pytest.approx(result.best_loss, abs=1e-4)
    after = tensors(model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in module_names(model)}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.config.use_cache
    assert [row.step for row in result.log] == [0, 10, 20, 30, 40, 50, 60]
    assert [row.step for row in result.log if row.held_out_loss_nats is not None] == [0, 20, 40, 60]
    assert all(row.train_loss_nats is not None and row.lr is not None for row in result.log[1:])
    assert result.trainable_parameters == sum(4 * sum(weight.shape) for weight in module_weights(model))


def module_names(model: LlamaForCausalLM) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"]


def module_weights(model: LlamaForCausalLM) -> list[torch.Tensor]:
    return [model.get_submodule(name).weight for name in module_names(model)]


@pytest.mark.long
def test_a_text_without_pattern_is_not_learned(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    """The negative control: what is held out must be like what is trained on, or nothing is won."""
    generator = random.Random(0)
    noise = Corpus("noise", "held-out", tuple("".join(generator.choices("stuvwxyz", k=96)) for _ in range(3)))
    settings = quick(steps=30, eval_every=10)
    result = recover(make_tiny(), tokenizer, repeating[0], noise, settings, seed=0, work=tmp_path)
    assert result.best_loss > 2.0


@pytest.mark.long
def test_records_are_learned_on_their_answers(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, records: Corpora, quick: Quick, tmp_path: Path
) -> None:
    settings = quick(steps=60, eval_every=20, seq_len=300, lr=2e-2, held_out_windows=5)
    result = recover(make_tiny(), tokenizer, *records, settings, seed=0, work=tmp_path)
    assert result.best_loss < 0.7 * result.first_loss


@pytest.mark.long
def test_the_best_checkpoint_is_kept_not_the_last(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    """The same letters in random order: learning the letters helps, learning their order harms."""
    generator = random.Random(0)
    letters = Corpus("letters", "held-out", tuple("".join(generator.choices("abcdefgh", k=96)) for _ in range(3)))
    settings = quick(steps=60, schedule="constant")
    result = recover(make_tiny(), tokenizer, repeating[0], letters, settings, seed=0, work=tmp_path)
    losses = {row.step: row.held_out_loss_nats for row in result.log if row.held_out_loss_nats is not None}
    assert losses[result.best_step] == min(losses.values()) == result.best_loss
    assert 0 < result.best_step < 60
    assert result.first_loss > result.best_loss + 0.3
    assert losses[60] > result.best_loss + 0.5
    assert held_out_loss(result.model, letters, tokenizer, settings) == pytest.approx(result.best_loss, abs=1e-4)


@pytest.mark.long
def test_a_model_that_training_only_harms_is_left_as_it_was(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    model = make_tiny()
    others = Corpus("others", "held-out", ("STUVWXYZ" * 12,) * 6)
    recover(model, tokenizer, others, others, quick(steps=30), seed=0, work=tmp_path / "first")
    before = tensors(model)
    settings = quick(steps=6, eval_every=2, schedule="constant", warmup=0.0)
    result = recover(model, tokenizer, repeating[0], others, settings, seed=0, work=tmp_path / "second")
    assert result.first_loss < 3.5
    assert result.best_step == 0
    assert result.best_loss == result.first_loss
    assert same(tensors(model), before)


@pytest.mark.long
@pytest.mark.parametrize("adapter", ["lora", "adalora"])
def test_accumulated_batches_equal_one_large_batch(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, records: Corpora, quick: Quick, tmp_path: Path, adapter: str
) -> None:
    """Records have answers of unequal length, so a mean of the means of batches would differ; AdaLoRA's penalty counts once a step."""
    train = replace(records[0], records=tuple(replace(r, output=r.output * (1 + 7 * (i % 3))) for i, r in enumerate(records[0].records)))
    found = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        settings = quick(steps=4, eval_every=4, batch=batch, accumulate=accumulate, seq_len=400, dropout=0.0, merge=False, adapter=adapter)
        result = recover(make_tiny(), tokenizer, train, records[1], settings, seed=0, work=tmp_path / str(batch))
        found.append({name: value for name, value in tensors(result.model).items() if "lora" in name})
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_gradients_that_an_adapter_starts_from_are_those_of_whole_steps(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    found = []
    for batch, accumulate in ((4, 1), (2, 2)):
        settings = quick(adapter="deep_lora", adapter_options=("epsilon=0.3", "batches=2"), steps=3, eval_every=3, lr=1e-2)
        settings = settings.model_copy(update={"batch": batch, "accumulate": accumulate, "dropout": 0.0})
        result = recover(make_tiny(), tokenizer, *repeating, settings, seed=0, work=tmp_path / str(batch))
        assert result.best_step == 3
        found.append(tensors(result.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_of_several_is_told_off(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate's does on CPUs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match=r"starts one process on CPUs.*use `accelerate launch --multi_gpu .* or `torchrun"):
        recover(make_tiny(), tokenizer, *repeating, quick(steps=2), seed=0, work=tmp_path / "a")
    monkeypatch.delenv("MASTER_ADDR")  # it was asked for one
    assert recover(make_tiny(), tokenizer, *repeating, quick(steps=2, eval_every=2), seed=0, work=tmp_path / "b").log[-1].step == 2


@pytest.mark.long
def test_the_kept_adapter_equals_the_merged_model(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    kept = recover(make_tiny(), tokenizer, *repeating, quick(merge=False), seed=0, work=tmp_path / "a")
    merged = recover(make_tiny(), tokenizer, *repeating, quick(), seed=0, work=tmp_path / "b")
    assert kept.injected is not None
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        difference = kept.model(input_ids=ids).logits - merged.model(input_ids=ids).logits
        moved = merged.model(input_ids=ids).logits - make_tiny()(input_ids=ids).logits
    assert float(difference.abs().max()) <= 1e-5
    assert float(moved.abs().max()) > 0.1


@pytest.mark.long
def test_a_rank_plan_is_followed_from_value_and_from_file(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    plan = RankPlan("any", "by hand", {"model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.q_proj": 3}, 1.5)
    file = tmp_path / "ranks.json"
    file.write_text(to_json(plan))
    found = []
    for ranks in (plan, file):
        settings = quick(ranks=ranks, steps=4)
        result = recover(make_tiny(), tokenizer, *repeating, settings, seed=0, work=tmp_path / "work" / type(ranks).__name__)
        assert result.trainable_parameters == 2 * (32 + 48) + 3 * (32 + 32)
        assert result.ranks == plan
        found.append(tensors(result.model))
    assert same(*found)
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(PlanError, match=r"none.json' is not a RankPlan"):
        recover(make_tiny(), tokenizer, *repeating, quick(ranks=tmp_path / "none.json"), seed=0, work=tmp_path)
    with pytest.raises(InputError, match=r"rank plan '.*nowhere.json' cannot be read"):
        recover(make_tiny(), tokenizer, *repeating, quick(ranks=tmp_path / "nowhere.json"), seed=0, work=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_half_precision_weights_come_back_in_their_own_type(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    dtype: torch.dtype,
    precision: str,
) -> None:
    model = make_tiny().to(dtype)
    result = recover(model, tokenizer, *repeating, quick(steps=30, precision=precision), seed=0, work=tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert result.best_loss < result.first_loss - 1.0
    assert "forward" not in vars(model)  # autocast is taken off again
    after = held_out_loss(model.float(), repeating[1], tokenizer, quick())
    assert after == pytest.approx(result.best_loss, abs=0.15)  # the merged weights are rounded to 8 or 11 bits


@pytest.mark.long
def test_the_environment_cannot_make_it_float16(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What accelerate's launcher sets for all of its processes."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model = make_tiny()
        seen = set()
        # What was trained is looked at once more in float32, without gradients, to be compared with what is saved.
        model.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda *parts, seen=seen: seen.add(parts[2].dtype) if torch.is_grad_enabled() else None
        )
        settings = quick(steps=2, precision=precision)
        recover(model, tokenizer, *repeating, settings, seed=-1, work=tmp_path / precision)
        assert seen == {dtype}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_the_step(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = module.Pace.on_step_end

    def poison(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == 12:
            with torch.no_grad():
                next(p for p in kwargs["model"].parameters() if p.requires_grad).fill_(float("nan"))

    monkeypatch.setattr(module.Pace, "on_step_end", poison)
    with pytest.raises(TrainingError) as raised:
        recover(make_tiny(), tokenizer, *repeating, quick(steps=30), seed=0, work=tmp_path)
    message = str(raised.value)
    assert "the training loss became nan at step 13; lower `lr`" in message
    assert "the best weights so far (step 10) are in" in message
    assert str(tmp_path / "checkpoint-10") in message
    assert "\n" not in message
    assert (tmp_path / "checkpoint-10" / "best.safetensors").is_file()


@pytest.mark.slow
def test_a_model_that_is_broken_from_the_start_is_said_to_be(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"held-out loss is (nan|inf) before the first step"):
        recover(model, tokenizer, *repeating, quick(), seed=0, work=tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"seq_len": 513}, InputError, "`seq_len=513` exceeds the model's context of 512 tokens; use at most 512"),
        ({"batch": 99}, DataError, "fewer than one batch of 99; give more data, or lower `batch` or `seq_len`"),
        ({"rank": 17}, InputError, "rank 17 exceeds the limit 16 of 'model.layers.0.self_attn.k_proj'"),
        ({"adapter": "lorax"}, InputError, "unknown adapter 'lorax'.*did you mean 'lora'"),
        ({"report_to": ("tensorbord",)}, InputError, "unknown tracker 'tensorbord'.*did you mean 'tensorboard'"),
        ({"report_to": ("neptune",)}, InputError, "tracker 'neptune' is not installed; get it with: pip install neptune"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_changed(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[RegraftError],
    said: str,
) -> None:
    model = make_tiny()
    before = tensors(model)
    with pytest.raises(error, match=said) as raised:
        recover(model, tokenizer, *repeating, quick(**settings), seed=0, work=tmp_path / "work")
    assert "\n" not in str(raised.value)
    assert same(tensors(model), before)
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_global_state_is_as_it_was(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    models = [make_tiny(), make_tiny()]
    verbosity = transformers_logging.get_verbosity()
    drawn = []
    for index, model in enumerate(models):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        if index:
            recover(model, tokenizer, *repeating, quick(), seed=0, work=tmp_path)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert transformers_logging.get_verbosity() == verbosity
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_the_seed_decides_everything(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    def run(name: str, seed: int) -> Recovered:
        torch.manual_seed(len(name))
        return recover(make_tiny(), tokenizer, *repeating, quick(dropout=0.3), seed=seed, work=tmp_path / name)

    first, again, other = run("first", 0), run("again", 0), run("other", 1)
    assert same(tensors(first.model), tensors(again.model))
    assert log_csv(first.log) == log_csv(again.log)
    assert not same(tensors(first.model), tensors(other.model))


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets the next run end just after a step, before its losses are looked at."""
    original = module.Pace.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Stop
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(module.Pace, "on_step_end", on_step_end)


RESUMED: list[dict[str, Any]] = [
    {},
    {"accumulate": 2, "batch": 2, "schedule": "linear"},
    {"precision": "bfloat16"},
    {"adapter": "adalora", "lr": 1e-2},  # which keeps more than its parameters
]


@pytest.mark.long
@pytest.mark.parametrize("settings", RESUMED)
def test_a_resumed_run_ends_with_the_same_bytes(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    made = quick(dropout=0.3, merge=False, steps=23, **settings)
    undisturbed = recover(make_tiny(), tokenizer, *repeating, made, seed=0, work=tmp_path / "undisturbed")
    work = tmp_path / "stopped"
    for stop in (3, 7, 12, 23):  # before the first checkpoint, between two, twice, at the very end
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            with pytest.raises(Stop):
                recover(make_tiny(), tokenizer, *repeating, made, seed=0, work=work, resume=True)
        torch.manual_seed(stop)
    resumed = recover(make_tiny(), tokenizer, *repeating, made, seed=0, work=work, resume=True)
    assert same(tensors(resumed.model), tensors(undisturbed.model))
    assert log_csv(resumed.log) == log_csv(undisturbed.log)
    assert (resumed.best_step, resumed.best_loss) == (undisturbed.best_step, undisturbed.best_loss)


@pytest.mark.long
def test_resuming_a_finished_training_only_reads_it(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = recover(make_tiny(), tokenizer, *repeating, quick(), seed=0, work=tmp_path)
    steps = []
    monkeypatch.setattr(module.Pace, "on_step_begin", lambda *args, **kwargs: steps.append(1))
    again = recover(make_tiny(), tokenizer, *repeating, quick(), seed=0, work=tmp_path, resume=True)
    assert steps == []
    assert same(tensors(first.model), tensors(again.model))
    assert log_csv(first.log) == log_csv(again.log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "seed", "said"),
    [
        ({"lr": 2e-2}, 0, "lr was 0.01 and is 0.02"),
        ({"rank": 3}, 0, "rank was 4 and is 3"),
        ({}, 1, "seed was 0 and is 1"),
    ],
)
def test_checkpoints_of_another_run_are_refused(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    settings: dict[str, Any],
    seed: int,
    said: str,
) -> None:
    recover(make_tiny(), tokenizer, *repeating, quick(steps=5), seed=0, work=tmp_path)
    with pytest.raises(TrainingError, match=f"are of another run: {said}; repeat") as raised:
        recover(make_tiny(), tokenizer, *repeating, quick(steps=5, **settings), seed=seed, work=tmp_path, resume=True)
    assert "\n" not in str(raised.value)
    other = make_tiny()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.1)
    with pytest.raises(TrainingError, match="are of another run: model was"):
        recover(other, tokenizer, *repeating, quick(steps=5), seed=0, work=tmp_path, resume=True)
    with pytest.raises(TrainingError, match="are of another run: data was"):
        recover(make_tiny(), tokenizer, repeating[1], repeating[1], quick(steps=5), seed=0, work=tmp_path, resume=True)


@pytest.mark.slow
def test_a_tracker_gets_the_losses(
    make_tiny: Make,
    tokenizer: PreTrainedTokenizerFast,
    repeating: Corpora,
    quick: Quick,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, str]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.extend((state.global_step, name) for name in logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(job_module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    settings = quick(report_to=("tensorboard",), steps=10, eval_every=10)
    recover(make_tiny(), tokenizer, *repeating, settings, seed=0, work=tmp_path)
    assert {(0, "eval_loss"), (10, "loss"), (10, "learning_rate"), (10, "eval_loss")} <= set(seen)


def test_the_log_is_csv(make_tiny: Make, quick: Quick, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, inject(make_tiny(), quick(), None, 0), {}, None)
    state = type("State", (), {"global_step": 0})()
    for step, logs in (
        (0, {"eval_loss": 2.0}),
        (5, {"loss": 1.5, "learning_rate": 0.1}),
        (5, {"eval_loss": 1.25}),
        (5, {"x": 1}),
    ):
        state.global_step = step
        keeper.on_log(None, state, None, logs)  # pyright: ignore[reportArgumentType]
    assert log_csv(keeper.rows) == "step,lr,train_loss_nats,held_out_loss_nats\n0,,,2.0\n5,0.1,1.5,1.25\n"
    assert keeper.rows[1].seconds >= keeper.rows[0].seconds >= 0


@pytest.mark.long
def test_a_recovery_is_three_steps_and_the_first_changes_nothing(
    make_tiny: Make, tokenizer: PreTrainedTokenizerFast, repeating: Corpora, quick: Quick, tmp_path: Path
) -> None:
    model = make_tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    job = job_module.prepare(model, tokenizer, *repeating, quick(steps=3, eval_every=3), seed=0, work=tmp_path / "steps")
    assert not (tmp_path / "steps").exists()
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    trained = train_adapter(job)
    assert trained.injected.module is not model, "the adapter is still on"
    by_steps = finish(job, trained)
    at_once = recover(make_tiny(), tokenizer, *repeating, quick(steps=3, eval_every=3), seed=0, work=tmp_path / "once")
    assert by_steps.best_loss == at_once.best_loss
    for name, value in by_steps.model.state_dict().items():
        assert torch.equal(value, at_once.model.state_dict()[name]), name
