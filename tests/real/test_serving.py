"""An exported model with uneven layers is served by llama.cpp over the OpenAI-compatible route, and writes what ours writes."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gguf_toys import uneven
from regraft.export.llama_cpp import Runtime
from regraft.models.load import load
from regraft.pipelines.export import export
from regraft.pipelines.generate import generate, prompt_ids
from regraft.settings import ExportSettings

pytest.importorskip("xllamacpp")
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories3M"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def asked(address: str, route: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(address + route, json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


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
