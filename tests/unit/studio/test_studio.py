"""The studio's answers without a socket: who may ask, what is shown, what is started and stopped."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from regraft.claims import lock_file
from regraft.cli import app
from regraft.plans import LossReport, Measurement, SizeReport, to_json
from regraft.report.summary import RunReport
from regraft.studio import jobs as jobs_module
from regraft.studio.answers import Response, Studio
from regraft.studio.guard import Request
from regraft.studio.jobs import Jobs
from regraft.studio.server import serving

TOKEN = "a-token"
ATTACK = "<script>document.title='taken'</script>"
# Stands for a command of regraft: prints its arguments and input, then waits for a signal, unless it was given `model=short`.
CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("error: interrupted", file=sys.stderr), sys.exit(143)))
print(" ".join(sys.argv[1:]), "é", sys.stdin.read(), flush=True)
print("stage one", file=sys.stderr, flush=True)
if "model=short" not in sys.argv and "generate" not in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.setattr(jobs_module, "COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    made = Studio(Path("runs"), Jobs(tmp_path / "jobs"), TOKEN)
    yield made
    made.jobs.stop_all()


def get(studio: Studio, target: str, **headers: str) -> Response:
    return studio.answer(Request("GET", target, {"host": "127.0.0.1:8737", "x-regraft-token": TOKEN} | headers))


def post(studio: Studio, target: str, value: Any = None, **headers: str) -> tuple[int, Any]:
    sent = {"host": "127.0.0.1:8737", "x-regraft-token": TOKEN, "content-type": "application/json"}
    given = {name.replace("_", "-"): text for name, text in headers.items()}
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    found = studio.answer(Request("POST", target, sent | given, body))
    return found.status, json.loads(found.body)


def finished_run(folder: Path, name: str, loss: float) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "run.json").write_text("{}")
    (folder / name / "timings.json").write_text('{"prune": 1.5, "recover": "soon"}')
    measured = tuple(
        Measurement(label, LossReport(value, 9.0, 1.0, 8, 4, 10, 40, 1, True, ATTACK, "all"), SizeReport(80, 80, 80, 80, 8))
        for label, value in (("dense", 2.0), ("pruned", loss))
    )
    (folder / name / "report.json").write_text(to_json(RunReport(f"{name} {ATTACK}", "", "model: x\n", measured)))


def until(studio: Studio, number: int, state: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        job = json.loads(get(studio, f"/api/jobs/{number}").body)["job"]
        if job["state"] == state:
            return job
        time.sleep(0.02)
    raise AssertionError(job)


@pytest.mark.parametrize(
    ("headers", "target"),
    [
        ({"x-regraft-token": "another"}, "/api/state"),
        ({"x-regraft-token": ""}, "/"),
        ({"x-regraft-token": ""}, "/?token=another"),
        ({"x-regraft-token": "à"}, "/"),
        ({"host": "evil.example:8737"}, "/api/state"),
        ({"host": "127.0.0.1.evil.example"}, "/api/state"),
        ({"host": ""}, "/api/state"),
        ({"origin": "http://evil.example"}, "/api/state"),
        ({"origin": "null"}, "/api/state"),
        ({"origin": "http://127.0.0.1:1"}, "/api/state"),
        ({"sec-fetch-site": "cross-site"}, "/?token=a-token"),
    ],
)
def test_strangers_are_refused(studio: Studio, headers: dict[str, str], target: str) -> None:
    assert get(studio, target, **headers).status == 403


def test_whoever_may_is_answered(studio: Studio) -> None:
    for headers in ({}, {"origin": "http://127.0.0.1:8737"}, {"host": "localhost:9000", "origin": "http://localhost:9000"}):
        assert get(studio, "/api/state", **headers).status == 200
    assert get(studio, "/?token=a-token", **{"x-regraft-token": ""}).status == 200
    # A form or an image of another page can send the token's place in the address, but no header.
    assert post(studio, "/api/runs?token=a-token", {}, x_regraft_token="")[0] == 403
    assert post(studio, "/api/runs", {}, content_type="text/plain")[0] == 403


@pytest.mark.parametrize(
    "target",
    ["/runs/../report", "/runs/%2e%2e/report", "/runs/..%2f../report", "/runs/%2fetc%2fpasswd/report", "/runs//report", "/x"],
)
def test_nothing_outside_the_runs_is_read(studio: Studio, tmp_path: Path, target: str) -> None:
    finished_run(tmp_path, "outside", 3.0)
    finished_run(tmp_path / "runs", "inside", 3.0)
    assert get(studio, target).status in (400, 404)
    assert get(studio, "/runs/outside/report").status == 400
    assert get(studio, "/runs/inside/report").status == 200


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


def test_runs_are_listed_with_names_as_text_and_reports_are_boxed_in(studio: Studio, tmp_path: Path) -> None:
    finished_run(tmp_path / "runs", "one", 2.5)
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "run.json").write_text("{}")
    with lock_file(tmp_path / "runs" / "begun" / ".lock", tmp_path):  # as `regraft run` on the command line does
        begun, one = json.loads(get(studio, "/api/state").body)["runs"]
    assert begun["works"].startswith("process ")
    assert not begun["finished"]
    assert (one["run"], one["finished"], one["works"], one["stages"]) == ("one", True, None, {"prune": 1.5})
    assert (one["parameters"], one["change_nats"], one["text"]) == (80, 0.5, ATTACK)
    lines = json.loads(get(studio, "/api/compare?runs=one,one").body)
    assert [line["model"] for line in lines] == ["dense", "pruned"] * 2
    assert get(studio, "/api/compare?runs=two").status == 400
    report = get(studio, "/runs/one/report")
    assert report.headers["Content-Security-Policy"].startswith("sandbox allow-scripts; default-src 'none'")
    assert ATTACK not in report.body.decode()
    named = Studio(Path(ATTACK), studio.jobs, TOKEN)
    page = get(named, "/")
    tags = Tags()
    tags.feed(page.body.decode())
    assert tags.found.count("script") == 1
    assert "'unsafe-inline'" not in page.headers["Content-Security-Policy"]
    script = get(studio, "/studio.js").body.decode()
    assert not any(name in script for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("))


def test_a_run_is_started_watched_stopped_and_gone_on_with(studio: Studio) -> None:
    wanted = {"recipe": "quickstart", "name": "mine", "changes": ["prune.ratio=0.3"]}
    status, job = post(studio, "/api/runs", wanted)
    assert (status, job["state"], job["kind"]) == (200, "running", "run")
    assert job["arguments"] == ["run", "quickstart", "prune.ratio=0.3", "--output", str(Path("runs") / "mine")]
    status, refused = post(studio, "/api/runs", wanted)
    assert (status, refused["error"]) == (400, "'mine' is running; wait for it, or stop it")
    deadline = time.monotonic() + 20
    while until(studio, 1, "running")["line"] != "stage one":
        assert time.monotonic() < deadline
    found = json.loads(get(studio, "/api/jobs/1").body)
    assert found["text"].split() == [*job["arguments"], "é"]
    assert json.loads(get(studio, f"/api/jobs/1?from={found['next']}").body)["text"] == ""
    assert post(studio, "/api/jobs/1/stop", {})[0] == 200
    ended = until(studio, 1, "stopped")
    assert (ended["code"], ended["line"]) == (143, "error: interrupted")
    assert "--resume" in post(studio, "/api/runs", wanted | {"changes": ["model=short"], "resume": True})[1]["arguments"]
    assert until(studio, 2, "done")["code"] == 0


def test_two_models_answer_one_prompt_which_is_on_no_command_line(studio: Studio) -> None:
    status, started = post(studio, "/api/prompts", {"models": ["seedling", "other"], "prompt": "--tell\nme", "tokens": 5})
    assert status == 200
    for job in started:
        until(studio, job["number"], "done")
        assert "--tell" not in " ".join(job["arguments"])
        assert json.loads(get(studio, f"/api/jobs/{job['number']}").body)["text"].rstrip().endswith("é --tell\nme")


@pytest.mark.parametrize(
    ("target", "value", "words"),
    [
        ("/api/runs", {"recipe": "quickstrat", "name": "a"}, "did you mean 'quickstart'?"),
        ("/api/runs", {"recipe": "../x.yaml", "name": "a"}, "there is no recipe"),
        ("/api/runs", {"recipe": "quickstart", "name": "../a"}, "is no name of a run"),
        ("/api/runs", {"recipe": "quickstart", "name": "-a"}, "is no name of a run"),
        ("/api/runs", {"recipe": "quickstart"}, "name is missing"),
        ("/api/runs", {"recipe": "quickstart", "name": "a", "changes": ["--output=/"]}, "is no change"),
        ("/api/runs", {"recipe": "quickstart", "name": "a", "changes": ["prune.ratio=7"]}, "prune.ratio"),
        ("/api/runs", [], "recipe is missing"),
        ("/api/prompts", {"models": [], "prompt": "x"}, "0 models were given"),
        ("/api/prompts", {"models": ["--help"], "prompt": "x"}, "is no model"),
        ("/api/prompts", {"models": ["a"], "prompt": ""}, "0 characters"),
        ("/api/prompts", {"models": ["a"], "prompt": "x", "tokens": 10**9}, "tokens"),
        ("/api/prompts", {"models": ["a"], "prompt": "x", "temperature": "hot"}, "temperature"),
        ("/api/jobs/7/stop", {}, "there is no job '7'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_starts_nothing(studio: Studio, target: str, value: Any, words: str) -> None:
    status, found = post(studio, target, value)
    assert status == 400
    assert words in found["error"]
    assert "\n" not in found["error"]
    assert studio.jobs.all() == []
    assert (
        studio.answer(
            Request("POST", target, {"host": "localhost", "x-regraft-token": TOKEN, "content-type": "application/json"}, b"{")
        ).status
        == 400
    )


def test_a_studio_on_a_port_answers_and_a_second_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path / "runs", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with urllib.request.urlopen(server.address) as answer:
            assert "regraft studio" in answer.read().decode()
            assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert app.run(["studio", str(tmp_path / "runs"), "--port", str(server.server_address[1])]) == 2
        said = capsys.readouterr().err
        assert said == f"error: port {server.server_address[1]} is in use; give another --port, or --port 0 for a free one\n"
        server.shutdown()
        thread.join()
    (tmp_path / "file").write_text("")
    assert app.run(["studio", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_ctrl_c_stops_what_runs_and_says_how_to_go_on(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []

    def forever(server: Any) -> None:
        job = server.studio.jobs.start("mine", ["run", "quickstart", "--output", "runs/mine"])
        started.append(job.process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr("regraft.studio.server.StudioServer.serve_forever", forever)
    assert app.run(["studio", "runs", "--port", "0"]) == 128 + signal.SIGINT
    said = capsys.readouterr().out
    assert "stopped mine; go on: regraft run quickstart --output runs/mine --resume" in said
    assert started
    assert not (tmp_path / "runs").exists()
