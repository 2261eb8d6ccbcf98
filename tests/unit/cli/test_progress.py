"""Progress: a bar where there is a terminal, lines elsewhere, nothing where it is not wanted."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from regraft.cli import progress as module
from regraft.cli.progress import progress, remaining_seconds
from regraft.progress import Step


def text_of(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=100, highlight=False, markup=False), stream


def test_a_line_comes_at_intervals_even_while_nothing_new_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.05)
    console, stream = text_of(terminal=False)
    with progress("loading", console=console) as say:
        time.sleep(0.2)
        say(Step("scoring layers", 1, 4))
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert any(line.startswith("loading (") for line in lines)
    counted = [line for line in lines if line.startswith("scoring layers: 1 of 4 (")]
    assert counted
    assert all("left of this step" in line for line in counted)
    assert len(lines) < 12
    written = stream.getvalue()
    time.sleep(0.2)
    assert stream.getvalue() == written  # the thread has ended with the block


def test_a_short_block_and_a_quiet_one_say_nothing() -> None:
    for quiet in (False, True):
        console, stream = text_of(terminal=False)
        with progress("loading", quiet=quiet, console=console) as say:
            say("line\x1b[31m")
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_count_and_no_escape_of_a_line() -> None:
    console, stream = text_of(terminal=True)
    with progress("loading", console=console) as say:
        say(Step("scoring layers", 3, 4))
        say("a name \x1b]0;forged\x07")
        say(Step("writing", 1, 2, "loss 2.5"))
    assert "\x1b]0;forged" not in stream.getvalue()
    assert "writing, loss 2.5" in stream.getvalue()
    assert "1/2" in stream.getvalue()


def test_the_rest_follows_from_the_mean_speed() -> None:
    assert remaining_seconds(Step("x", 3, 12), 30.0) == pytest.approx(90.0)
    assert remaining_seconds(Step("x", 0, 12), 30.0) is None
    assert remaining_seconds("a line", 30.0) is None
