from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from regraft.cli import app
from regraft.cli.examples import EXAMPLES
from regraft.errors import ConfigError, InputError

FOLDER = Path(app.__file__).parent
NOT_COMMANDS = {"figures", "__init__", "app", "examples", "later", "no_memory", "options", "progress", "screen", "tasks", "words"}


def python(code: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)


def test_every_command_file_is_listed_with_the_first_line_of_its_help() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - NOT_COMMANDS
    assert set(app.COMMANDS) == names
    for name in names:
        function = getattr(importlib.import_module(f"regraft.cli.{name}"), name)
        assert function.__doc__.splitlines()[0] == app.COMMANDS[name]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in app.COMMANDS)


@pytest.mark.parametrize("name", sorted(app.COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"regraft {name}" in shown
    # Every example has a line of its own in the help, and is a command that the parser takes.
    assert set(EXAMPLES[name]) <= {line.strip() for line in shown.splitlines()}
    for example in EXAMPLES[name]:
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("regraft", name)
        app.load_command(name).make_context(name, arguments)


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--quiet", {"run", "prune", "compress", "recover", "allocate", "evaluate", "export", "complete"}),
        ("--json", {"run", "prune", "compress", "recover", "allocate", "evaluate", "export", "complete", "inspect", "runs", "doctor"}),
    ],
)
def test_what_takes_long_can_be_quiet_and_what_measures_gives_its_figures(option: str, names: set[str]) -> None:
    lacking = {name for name in names if option not in {word for found in app.load_command(name).params for word in found.opts}}
    assert lacking == set()


@pytest.mark.slow
def test_help_and_version_do_not_import_torch() -> None:
    code = "import sys\nfrom regraft.cli.app import run\nassert run(sys.argv[1:]) == 0\nassert 'torch' not in sys.modules"
    for arguments in (["--help"], ["--version"], []):
        done = python(code, *arguments)
        assert done.returncode == 0, done.stderr


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "regraft", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("regraft 0.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "error: No such command 'rnu'. Did you mean 'run'?; see: regraft --help"),
        (["--nonsense"], "error: No such option: --nonsense; see: regraft --help"),
        (["prune"], "see: regraft prune --help"),
        (["prune", "seedling", "--ratoi", "0.2"], "see: regraft prune --help"),
        (
            ["prune", "seedling", "--ratio", "1.5", "--dry-run"],
            "error: command line: --ratio: should be above 0.0 and below 1.0 (got '1.5')",
        ),
        (["prune", "seedling"], "--output is missing"),
        (["run", "nothing.yaml"], "recipe 'nothing.yaml' not found; give a YAML file or one of: "),
        (["run"], "no recipe was given"),
        (["run", "quickstart", "prune.ration=0.3", "--dry-run"], "unknown key; did you mean 'ratio'?"),
    ],
)
def test_bad_input_is_one_line_on_the_standard_error(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert words in shown.err
    assert list(tmp_path.iterdir()) == []


class Broken(ModuleType):
    """Stands for a command's module whose function raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("broken")

        def run() -> None:
            """Break."""
            raise error

        self.run = run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("the ratio is 2, use less than 1"), 2, "error: the ratio is 2, use less than 1\n"),
        (ConfigError("recipe.yaml", ["a", "b"]), 2, "error: recipe.yaml: 2 problems\n  - a\n  - b\n"),
        (InputError("x" * 500 + " [bold]not markup[/bold]"), 2, "error: " + "x" * 500 + " [bold]not markup[/bold]\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command with --resume goes on from what is finished\n"),
        (
            PermissionError(13, "Permission denied", "closed/x"),
            2,
            "error: 'closed/x': Permission denied; check the path, its permissions and its length\n",
        ),
        (OSError(12, "Cannot allocate memory"), 2, "or set prune.memory\n"),
        (InputError("a\x1b[31m\nerror: b"), 2, "error: a\\x1b[31m\\nerror: b\n"),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "regraft.cli.run", Broken(error))
    assert app.run(["run"]) == code
    assert capsys.readouterr().err.endswith(line)


def test_a_defect_is_one_line_that_names_the_file_with_its_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "regraft.cli.run", Broken(ZeroDivisionError("ours\nand theirs")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert app.run(["run"]) == app.FAULT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    (trace,) = tmp_path.iterdir()
    assert f"this is a fault of ours: ZeroDivisionError: ours\\nand theirs; the full trace is in '{trace}'" in said
    assert "Traceback" in trace.read_text()


@pytest.mark.slow
def test_no_colour_where_it_is_not_wanted() -> None:
    code = "from regraft.cli.app import run\nraise SystemExit(run(['rnu']))"
    for env in ({}, {"NO_COLOR": "1", "FORCE_COLOR": ""}, {"TERM": "dumb"}):
        done = python(code, env=env)
        assert done.returncode == 2
        assert "\x1b" not in done.stderr
        assert done.stderr.startswith("error: No such command")


def test_the_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["run", "--list"]) == 0
    assert "quickstart: seedling" in capsys.readouterr().out


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = app.run(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["healthy"] else 1)
    assert {"python", "torch", "transformers"} <= {entry["name"] for entry in found["required"]}
