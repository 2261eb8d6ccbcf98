"""A saved tiny model with a tokenizer, and a machine without a network."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folders import UNEVEN, provenance, tiny_tokenizer
from regraft.models.build import build
from regraft.models.card import model_card
from regraft.models.save import save
from slicing import sliced


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every attempt to look up or reach another machine fail."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the network was touched")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def make_folder(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Returns ``make(family, uneven=False)``: a folder written by plain transformers, or by us where it is uneven."""

    def make(family: str = "llama", *, uneven: bool = False, **config: Any) -> Path:
        model = make_model(family, **config)
        folder = tmp_path / f"{family}-model"
        if uneven:
            model = build(model, *sliced(model, UNEVEN))
            save(model, tiny_tokenizer(), folder, provenance(), model_card(provenance()))
        else:
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return folder

    return make
