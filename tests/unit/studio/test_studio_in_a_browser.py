"""The studio's page in headless Chromium: from an empty folder to a finished run, its report, and two models side by side."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from browser import Tab, needs_chromium
from regraft.studio import jobs
from regraft.studio.server import serving

CHILD = "import sys; print(sys.argv[2], 'answers <b>', sys.stdin.read())"
# The quick start, as small as it gets: the same stages but for the search of ranks.
CHANGES = """allocate=null
prune.criterion=l2
recover.steps=2
recover.seq_len=32
evaluate.max_tokens=600
sample.tokens=4"""


@pytest.mark.long
@needs_chromium
def test_from_an_empty_folder_to_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(Path("runs"), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with Tab(server.address) as tab:
            tab.wait_for("document.querySelectorAll('#recipe option').length > 3")
            assert tab.run("document.querySelector('#empty').hidden") is False
            tab.run("const pick = document.querySelector('#recipe'); pick.value = 'quickstart'; pick.dispatchEvent(new Event('change'))")
            assert tab.run("document.querySelector('#name').value") == "quickstart"
            tab.run(f"document.querySelector('#changes').value = {json.dumps(CHANGES)}; document.querySelector('#start button').click()")
            tab.wait_for("document.querySelector('.job[data-state=running] button')")
            tab.wait_for("document.querySelector('.job[data-state=done]')", 600)
            tab.wait_for("document.querySelector('#runs a')")
            assert "won back" in tab.run("document.querySelector('.job pre').textContent")
            assert tab.run("document.querySelector('#runs tbody tr').cells[2].textContent") == "recovered"
            tab.run("document.querySelector('#runs input').click(); document.querySelector('#compare').click()")
            tab.wait_for("document.querySelectorAll('#compared tbody tr').length === 3")
            monkeypatch.setattr(jobs, "COMMAND", (jobs.COMMAND[0], "-c", CHILD))
            tab.run("document.querySelector('#second').value = 'runs/quickstart/model'; document.querySelector('#ask button').click()")
            tab.wait_for("document.querySelectorAll('#answers [data-state=done]').length === 2")
            tab.wait_for(
                "[...document.querySelectorAll('#answers pre')].every((part) => part.textContent.includes('answers <b> Return the'))"
            )
            tab.picture(tmp_path / "studio.png", 1100)
            assert (tmp_path / "studio.png").stat().st_size > 20_000
            tab.picture(tmp_path / "phone.png", 390)
            assert tab.run("document.documentElement.scrollWidth <= 390")
            assert tab.console == []
            tab.run("location.href = document.querySelector('#runs a').href")
            tab.wait_for("document.documentElement?.dataset.drawn > 0", 120)
        server.shutdown()
        thread.join()
