"""Exports are committed to the hub as they lie in their folder; a local server stands for the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import Hub, running_hub
from gguf_toys import as_loaded, byte_level_tokenizer, toy
from regraft.cli.app import run
from regraft.errors import OutputError
from regraft.pipelines.export import export

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's own client


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as started:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", started.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
        yield started


@pytest.mark.parametrize("to", ["hf", "gguf", "ollama"])
def test_every_file_of_the_folder_arrives(tmp_path: Path, hub: Hub, to: str) -> None:
    result = export(as_loaded(toy("llama")), tmp_path / "out", to, check=None)
    address = result.push_to_hub("me/small", private=True, token="hf_secret")
    assert address.startswith(f"{hub.address}/me/small")
    assert hub.repositories["me/small"]["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path: content for (name, path), content in hub.files.items() if name == "me/small"} == written
    assert any(name.endswith((".safetensors", ".gguf")) for name in written)


def test_the_command_uploads_what_it_wrote(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    toy("llama").save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--to", "gguf", "--no-check", "--output", str(tmp_path / "out")]
    assert run([*command, "--push-to-hub", "me/small", "--token", "hf_secret"]) == 0, capsys.readouterr().err
    assert f"committed to {hub.address}/me/small" in capsys.readouterr().out
    assert hub.files["me/small", "model.gguf"] == (tmp_path / "out" / "model.gguf").read_bytes()


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(tmp_path: Path, hub: Hub) -> None:
    result = export(as_loaded(toy("llama")), tmp_path / "out", "hf", check=None)
    hub.refuse = 403
    with pytest.raises(OutputError, match="'me/small' cannot be written to the hub") as caught:
        result.push_to_hub("me/small", token="hf_secret")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert (tmp_path / "out" / "model.safetensors").is_file()
