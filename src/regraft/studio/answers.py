"""What the studio answers: its page, the state of runs and jobs, reports; and what it does: start, stop, prompt.

Nothing here knows a socket: :meth:`Studio.answer` makes a :class:`Response` of a :class:`Request`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from regraft.errors import InputError, RegraftError, did_you_mean, shown
from regraft.pipelines.report import figures_of, list_runs, page_of, progress_of, run_named
from regraft.pipelines.run.recipe import read_recipe, shipped_recipes
from regraft.reading import check_text, is_file, is_folder, list_in, object_in, parse_json, real_number, whole_number
from regraft.report.assets import style
from regraft.studio.guard import Request, refusal
from regraft.studio.jobs import Jobs

LONGEST_PROMPT = 100_000
MOST_TOKENS = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHANGE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.*", re.DOTALL)
_MADE = ("model", "pruned", "compressed")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report draws its pictures by a script that stands in it; as a sandbox it is no page of the studio and can ask it nothing.
_REPORT_POLICY = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        status: Number of HTTP: 200, 400 for a wrong value, 403 for a stranger, 404 for what is not there.
        kind: Content type.
        body: Contents.
        headers: More headers, beside those of every answer.
    """

    status: int
    kind: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


def as_json(value: Any, status: int = 200) -> Response:
    """Returns plain values as an answer."""
    return Response(status, "application/json", json.dumps(value, allow_nan=False).encode())


class Studio:
    """The studio of one folder of runs.

    Args:
        runs: Folder that holds the runs; it need not be there yet.
        jobs: What it starts.
        token: What a request must know.
    """

    def __init__(self, runs: Path, jobs: Jobs, token: str) -> None:
        self.runs = runs
        self.jobs = jobs
        self.token = token

    def answer(self, request: Request) -> Response:
        """Answers a request; what cannot be done is one line."""
        refused = refusal(request, self.token)
        if refused is not None:
            return as_json({"error": refused}, 403)
        try:
            found = self._read(request) if request.method == "GET" else self._act(request)
        except RegraftError as error:
            return as_json({"error": shown(error, 2000)}, 400)
        except OSError as error:
            return as_json({"error": f"the operating system refuses: {error.strerror or shown(error)}"}, 500)
        return found or as_json({"error": f"there is nothing at '{shown(request.target.partition('?')[0])}'"}, 404)

    def _read(self, request: Request) -> Response | None:
        match request.parts:
            case ():
                return self._page()
            case ("studio.js",):
                return Response(200, "text/javascript; charset=utf-8", _own("studio.js").encode())
            case ("studio.css",):
                return Response(200, "text/css; charset=utf-8", (style() + _own("studio.css")).encode())
            case ("api", "state"):
                return as_json(self.state())
            case ("api", "compare"):
                names = [name for name in request.query("runs").split(",") if name]
                return as_json([line for name in names for line in figures_of(run_named(self.runs, name), every_model=True)])
            case ("api", "jobs", number):
                job = self.jobs.numbered(number)
                start = whole_number(_number(request.query("from") or "0"), "from", 0, 2**53)
                text, following = job.output(start)
                return as_json({"job": job.as_dict(), "text": text, "next": following})
            case ("runs", name, "report"):
                page = page_of(run_named(self.runs, name).path)
                return Response(200, "text/html; charset=utf-8", page.encode(), {"Content-Security-Policy": _REPORT_POLICY})
            case _:
                return None

    def _act(self, request: Request) -> Response | None:
        match request.parts:
            case ("api", "runs"):
                return as_json(self.start_run(object_in(parse_json(request.body, "the request"))))
            case ("api", "prompts"):
                return as_json(self.start_prompts(object_in(parse_json(request.body, "the request"))))
            case ("api", "jobs", number, "stop"):
                job = self.jobs.numbered(number)
                job.stop()
                return as_json(job.as_dict())
            case _:
                return None

    def _page(self) -> Response:
        page = _own("studio.html").replace("{token}", escape(self.token)).replace("{folder}", escape(str(self.runs)))
        return Response(200, "text/html; charset=utf-8", page.encode("utf-8", "replace"), {"Content-Security-Policy": _POLICY})

    def state(self) -> dict[str, Any]:
        """Returns recipes, models, runs and jobs, as plain JSON types."""
        found = list_runs(self.runs) if is_folder(self.runs) else []
        runs = [{**figures_of(run)[0], **progress_of(run)} for run in found]
        models = ["seedling", *(str(run.path / name) for run in found for name in _MADE if is_file(run.path / name / "config.json"))]
        return {"recipes": list(self._recipes()), "models": models, "runs": runs, "jobs": [job.as_dict() for job in self.jobs.all()]}

    def start_run(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Starts ``regraft run``.

        Args:
            wanted: ``recipe``, ``name`` of the run, ``changes`` as a list of ``key=value``, and ``resume``.

        Raises:
            InputError: A value is wrong, or the recipe does not read.
        """
        recipe, name = _text(wanted, "recipe"), _text(wanted, "name")
        known = self._recipes()
        if recipe not in known:
            raise InputError(f"there is no recipe '{shown(recipe)}'; known: {', '.join(known)}{did_you_mean(recipe, known)}")
        if not _NAME.fullmatch(name):
            raise InputError(f"'{shown(name)}' is no name of a run; use letters, digits, '.', '_' and '-', the first a letter or a digit")
        changes = [str(change) for change in list_in(wanted.get("changes"))]
        for change in changes:
            if not _CHANGE.fullmatch(change):
                raise InputError(f"'{shown(change)}' is no change; write key=value, such as prune.ratio=0.3")
        read_recipe(recipe, changes)
        if any(job.state == "running" and job.title == name for job in self.jobs.all()):
            raise InputError(f"'{name}' is running; wait for it, or stop it")
        resume = ["--resume"] if wanted.get("resume") is True else []
        arguments = ["run", recipe, *changes, "--output", str(self.runs / name), *resume]
        return self.jobs.start(name, arguments).as_dict()

    def start_prompts(self, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Starts ``regraft generate`` for one model or two.

        Args:
            wanted: ``models``, ``prompt``, ``tokens``, ``temperature`` and ``plain``.

        Raises:
            InputError: A value is wrong.
        """
        models = [str(model) for model in list_in(wanted.get("models"))]
        if not 1 <= len(models) <= 2:
            raise InputError(f"{len(models)} models were given; give one or two")
        for model in models:
            if not model or model.startswith("-"):
                raise InputError(f"'{shown(model)}' is no model; give a folder, a hub id, or seedling")
        prompt = _text(wanted, "prompt")
        if not prompt or len(prompt) > LONGEST_PROMPT:
            raise InputError(f"the prompt has {len(prompt)} characters; give 1 to {LONGEST_PROMPT:,}")
        tokens = whole_number(wanted.get("tokens", 64), "tokens", 1, MOST_TOKENS)
        asked = wanted.get("temperature", 0)
        temperature = 0.0 if asked == 0 else real_number(asked, "temperature", 0, 100)
        options = ["--prompt", "-", "--tokens", str(tokens), "--temperature", str(temperature)]
        plain = ["--plain"] if wanted.get("plain") is True else []
        return [self.jobs.start(model, ["generate", model, *options, *plain], prompt).as_dict() for model in models]

    def _recipes(self) -> list[str]:
        """Returns the recipes that come with regraft, and the YAML files of the current folder."""
        own = sorted(path.name for path in Path().iterdir() if path.suffix in (".yaml", ".yml") and is_file(path))
        return [*shipped_recipes(), *(name for name in own if not name.startswith("-"))]


def _text(wanted: Mapping[str, Any], name: str) -> str:
    value = wanted.get(name)
    if not isinstance(value, str):
        raise InputError(f"{name} is missing; give a text")
    check_text(value, name)
    return value


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1


def _own(name: str) -> str:
    return (files("regraft.studio") / name).read_text(encoding="utf-8")
