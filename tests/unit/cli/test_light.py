"""Help, and errors of the command line itself, do not wait for torch."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.cli.app import COMMANDS

CODE = """
import contextlib, io, sys
from regraft.cli.app import run
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    codes = [run(line.split()) for line in sys.argv[1:]]
print(codes, [name for name in ("torch", "transformers", "numpy", "peft", "scipy") if name in sys.modules])
"""


@pytest.mark.slow
def test_help_and_usage_errors_import_nothing_heavy() -> None:
    helps = [f"{name} --help" for name in sorted(COMMANDS)]
    lines = [*helps, "--help", "prune", "recover seedling --steps many", "nothing"]
    done = subprocess.run([sys.executable, "-c", CODE, *lines], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[0] * len(helps) + [0, 2, 2, 2]} []"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_function_that_is_imported_later_is_there(name: str) -> None:
    source = Path(__file__).parents[3] / "src" / "regraft" / "cli" / f"{name}.py"
    for module, function in re.findall(r'later\("([\w.]+)", "(\w+)"\)', source.read_text(encoding="utf-8")):
        assert callable(getattr(importlib.import_module(module), function))
