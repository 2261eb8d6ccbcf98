"""An exported model with uneven layers is served by llama.cpp over the OpenAI-compatible route, and writes what ours writes."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gguf_toys import uneven
from real_models import smollm2
from regraft.export.llama_cpp import Runtime
from regraft.models.load import load
from regraft.pipelines.export import export
from regraft.pipelines.generate import generate, prompt_ids
from regraft.settings import ExportSettings, LoadSettings

pytest.importorskip("xllamacpp")
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories3M"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def asked(address: str, route: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(address + route, json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@pytest.mark.long
def test_a_chat_completion_of_an_uneven_smollm2(tmp_path: Path) -> None:
    """The model keeps its own chat template and tokenizer; ours and llama.cpp's answers to a chat are the same tokens."""
    loaded = load(smollm2(), LoadSettings(dtype="float32"))
    assert loaded.tokenizer is not None
    loaded.model = uneven(loaded.model, layer12=(9, 3, 1280), layer17=(6, 2, 1536), layer20=(9, 3, 1024))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = prompt_ids(loaded, messages)
    done = export(loaded, tmp_path / "out", "gguf", check=None)
    assert "'deci'" in done.words
    ours = generate(loaded, ids, tokens=24)
    with Runtime(tmp_path / "out" / "model.gguf", context=256, exact=True) as runtime:
        question = {"messages": messages, "max_tokens": 24, "temperature": 0.0, "top_k": 1}
        answer = asked(runtime.address, "/v1/chat/completions", question)
        rendered = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert runtime.token_ids(str(rendered)) == list(ids)
    assert len(ours.split()) > 5
    assert answer["choices"][0]["message"]["content"].strip() == ours.strip()


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories3M")
def test_a_chat_completion_of_an_uneven_model(tmp_path: Path) -> None:
    loaded = load(STORIES)
    assert loaded.tokenizer is not None
    loaded.tokenizer.chat_template = TEMPLATE
    loaded.model = uneven(loaded.model, layer1=(6, 2, 480), layer3=(6, 2, 496))
    done = export(
        loaded, tmp_path / "out", "gguf", settings=ExportSettings(check_positions=12), check="Once upon a time there was a girl. " * 9
    )
    assert "'deci'" in done.words
    prompt = "Once upon a time, there was a little girl named Lily. She"
    ids = prompt_ids(loaded, [{"role": "user", "content": prompt}])
    ours = generate(loaded, ids, tokens=32)
    with Runtime(tmp_path / "out" / "model.gguf", exact=True) as runtime:
        question = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 32, "temperature": 0.0, "top_k": 1}
        answer = asked(runtime.address, "/v1/chat/completions", question)
        theirs = answer["choices"][0]["message"]["content"]
    assert len(ours.split()) > 10
    assert theirs.strip() == ours.strip()
