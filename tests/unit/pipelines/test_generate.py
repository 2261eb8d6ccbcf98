"""Text that is written piece by piece is what greedy decoding gives, and conversations follow the chat template."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from gguf_toys import as_loaded, byte_level_tokenizer, toy
from regraft.cli.app import run
from regraft.cli.generate import show_piece
from regraft.errors import InputError, ModelError, harmless
from regraft.pipelines.generate import generate, prompt_ids

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def greedy(model: torch.nn.Module, ids: list[int], tokens: int, end: int) -> list[int]:
    found: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            number = int(model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax())
        if number == end:
            break
        found.append(number)
    return found


def test_the_text_is_that_of_greedy_decoding() -> None:
    loaded = as_loaded(toy("llama"))
    pieces: list[str] = []
    ids = prompt_ids(loaded, "the king")
    text = generate(loaded, ids, tokens=12, show=pieces.append)
    assert text == byte_level_tokenizer().decode(greedy(loaded.model, ids, 12, 2), skip_special_tokens=True)
    assert "".join(pieces) == text


def test_a_prompt_is_put_into_the_chat_template() -> None:
    tokenizer = byte_level_tokenizer(TEMPLATE)
    loaded = as_loaded(toy("llama"), tokenizer)
    asked = tokenizer.decode(prompt_ids(loaded, "Hi"), skip_special_tokens=True)
    assert asked == "user: Hi\nassistant: "
    assert tokenizer.decode(prompt_ids(loaded, "Hi", plain=True), skip_special_tokens=True) == "Hi"


@pytest.mark.slow
def test_drawn_text_follows_the_seed() -> None:
    loaded = as_loaded(toy("llama"))
    ids = prompt_ids(loaded, "the king")
    texts = [generate(loaded, ids, tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_what_cannot_be_answered_is_refused() -> None:
    loaded = as_loaded(toy("llama"))
    with pytest.raises(InputError, match="chat template"):
        prompt_ids(loaded, [{"role": "user", "content": "Hi"}])
    with pytest.raises(InputError, match="empty"):
        prompt_ids(loaded, "")
    with pytest.raises(InputError, match="is no text; give UTF-8"):
        prompt_ids(loaded, "half a \ud800 character")
    with pytest.raises(InputError, match="context"):
        generate(loaded, [5] * 128)
    with pytest.raises(InputError, match="negative"):
        generate(loaded, [5], temperature=-1.0)
    for none in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="no number; use 0"):
            generate(loaded, [5], temperature=none)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_that_predicts_no_numbers_is_refused(value: float, temperature: float) -> None:
    loaded = as_loaded(toy("llama"))
    with torch.no_grad():
        loaded.model.get_parameter("model.norm.weight").fill_(value)
    with pytest.raises(ModelError, match=r"predicts no numbers for token 1 .*`dtype=float32`"):
        generate(loaded, prompt_ids(loaded, "the king"), tokens=4, temperature=temperature)


@pytest.mark.slow
def test_the_commands_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = as_loaded(toy("llama"), byte_level_tokenizer(TEMPLATE))
    loaded.model.save_pretrained(tmp_path / "model")
    byte_level_tokenizer(TEMPLATE).save_pretrained(tmp_path / "model")
    assert run(["generate", str(tmp_path / "model"), "--prompt", "the king", "--tokens", "6"]) == 0
    assert capsys.readouterr().out == harmless(generate(loaded, prompt_ids(loaded, "the king"), tokens=6)) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\n"))
    assert run(["chat", str(tmp_path / "model"), "--temperature", "0", "--tokens", "6"]) == 0
    assert harmless(generate(loaded, prompt_ids(loaded, "Hi"), tokens=6)) in capsys.readouterr().out


def test_what_a_model_writes_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for piece in ("a\tb\nc é漢🙂", "\x1b[31m", "\x07\r\x9b\u202e"):
        show_piece(piece)
    assert capsys.readouterr().out == "a\tb\nc é漢🙂\\x1b[31m\\x07\\r\\x9b\\u202e"
