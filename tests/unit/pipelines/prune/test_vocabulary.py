"""The vocabulary as a target: a text of kept tokens has the same logits, and what a text needs is never dropped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from folders import byte_pair_tokenizer, text_file
from regraft.cli.app import run
from regraft.models.load import load
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.prune.vocabulary import weighted

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
ROWS = 640  # a few more than the tokenizer has tokens, as in many models


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_pair_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=request.param, bos_token_id=1, eos_token_id=[2, 0], pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.suppress_tokens = [600, 5]
    model.save_pretrained(path)
    return path


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0]


@pytest.mark.long
def test_texts_of_kept_tokens_have_the_same_logits(folder: Path, tmp_path: Path) -> None:
    command = ["prune", str(folder), "-o", str(tmp_path / "small"), "--targets", "vocabulary", "--calibration", str(text_file())]
    assert run([*command, "--vocabulary-size", "450"]) == 0
    record = load(tmp_path / "small").provenance
    assert record is not None
    assert record.plan is not None
    kept = record.plan.cuts[0].kept
    assert len(kept) == 450
    config = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (450, 1, [2, 0], 2)
    generation = json.loads((tmp_path / "small" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["suppress_tokens"] == [new for old in (600, 5) for new, there in enumerate(kept) if there == old]
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "small")
    chat = [{"role": "user", "content": "the"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    same = 0
    for text in (*text_file("test").read_text(encoding="utf-8").split()[:300], TEMPLATE, after.apply_chat_template(chat, tokenize=False)):
        old = before.encode(text)[:60]
        if set(old) <= set(kept):
            new = [kept.index(token) for token in old]
            assert after.encode(text)[:60] == new
            same += 1
            if same % 50 == 1:
                torch.testing.assert_close(logits(tmp_path / "small", new), logits(folder, old)[:, list(kept)], atol=1e-6, rtol=1e-6)
    assert same > 100


@pytest.mark.slow
def test_a_file_of_tokens_and_the_plan_again(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = max((token for token in tokenizer.get_vocab() if token.lstrip("Ġ").isascii()), key=len)
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps([*SPECIAL, longest, 300]), encoding="utf-8")
    done = prune(str(folder), targets=("vocabulary",), keep_tokens=file)
    assert done.model is not None
    assert done.tokenizer is not None
    assert done.tokenizer.tokenize(longest.replace("Ġ", " ")) == [longest]
    kept = done.plan.cuts[0].kept
    assert {tokenizer.convert_tokens_to_ids(longest), 300} < set(kept)
    assert len(kept) == done.tokenizer.vocab_size == done.model.config.vocab_size < 300
    plan = tmp_path / "plan.json"
    command = ["prune", str(folder), "--targets", "vocabulary", "--keep-tokens", str(file)]
    assert run([*command, "--plan-only", "-o", str(plan)]) == 0
    assert run(["prune", str(folder), "--plan", str(plan), "-o", str(tmp_path / "again")]) == 0
    again = load(tmp_path / "again").model.state_dict()
    for name, tensor in done.model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--vocabulary-size", "100"], "--vocabulary-size 100 is too small: 259 tokens are special, or every text needs them"),
        (["--vocabulary-size", "9000"], "--vocabulary-size 9000 removes nothing from 620 tokens"),
        (["--keep-tokens", "dropping"], "drops the special token '<|im_end|>' (1 in all)"),
        (["--keep-tokens", "unknown"], "names 'zzzz', which is no token of this model"),
        (["--keep-tokens", "missing"], "missing"),
        ([], "takes --vocabulary-size, a number of tokens, or --keep-tokens, a file of them: give one"),
        (["--vocabulary-size", "400", "--memory", "3GB"], "--memory is not for --targets vocabulary"),
        (["--vocabulary-size", "400", "--targets", "vocabulary,ffn"], "--vocabulary-size is for --targets vocabulary alone"),
        (["--targets", "vocabulary,residual"], "--targets vocabulary,residual share weights, as a token is a row as wide as the stream"),
        (["--targets", "vocabulary,ffn", "--memory", "3GB"], "--memory leaves no room to measure what tokens are worth"),
        (["--targets", "vocabulary,ffn", "--rounds", "2"], "--rounds 2 does not go with a vocabulary beside other targets"),
        (["--targets", "vocabulary,ffn", "--budget", "milliseconds"], "--budget milliseconds does not know what tokens cost"),
        (["--targets", "vocabulary,ffn", "--criterion", "l2"], "by measured damage, which --select uniform does not"),
        (["--vocabulary-size", "400", "--targets", "ffn"], "--vocabulary-size is for --targets vocabulary"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder: Path, tmp_path: Path, capsys: Any, given: list[str], why: str) -> None:
    (tmp_path / "dropping").write_text("<unk>\n<|im_start|>\na\n", encoding="utf-8")
    (tmp_path / "unknown").write_text("\n".join([*SPECIAL, "zzzz"]), encoding="utf-8")
    given = [str(tmp_path / entry) if entry in ("dropping", "unknown", "missing") else entry for entry in given]
    command = ["prune", str(folder), "-o", str(tmp_path / "out"), "--calibration", str(text_file())]
    targets = [] if "--targets" in given else ["--targets", "vocabulary"]
    assert run([*command, *targets, *given]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_every_text_counts_by_its_share_however_long_it_is() -> None:
    long, short = Counter({7: 60, 8: 30, 9: 10}), Counter({9: 5})
    even = weighted([long, short], [1.0, 1.0])
    assert sum(even.values()) == pytest.approx(105)
    assert {token: count / 105 for token, count in even.items()} == pytest.approx({7: 0.3, 8: 0.15, 9: 0.55})
    assert weighted([long], [0.4]) == long
    assert weighted([long, Counter()], [1.0, 1.0])[7] == pytest.approx(0.5 * 60 * 101 / 100)


@pytest.mark.slow
def test_several_texts_are_counted_and_own_text_is_not(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("zq zq zq " * 50, encoding="utf-8")
    (tmp_path / "two.txt").write_text("the cat " * 5000, encoding="utf-8")
    command = ["prune", str(folder), "--dry-run", "--targets", "vocabulary", "--vocabulary-size", "450", "--calibration"]
    assert run([*command, f"{tmp_path / 'one.txt'},{tmp_path / 'two.txt'}"]) == 0
    assert run([*command, f"{tmp_path / 'one.txt'},self"]) == 2
    assert "too short to count tokens on" in capsys.readouterr().err
