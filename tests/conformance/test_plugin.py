"""The example package is installed by pip and used by the command; a broken one beside it is reported, and nothing else stops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fresh

ROOT = Path(__file__).parents[2]
BROKEN = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "broken-plugin"
version = "1.0"
[project.entry-points."regraft.criteria"]
shattered = "broken_plugin:CRITERION"
[tool.setuptools]
py-modules = ["broken_plugin"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example and a package whose module cannot be imported, both installed by pip without the network."""
    work = tmp_path_factory.mktemp("plugins")
    shutil.copytree(ROOT / "examples" / "plugin", work / "example")
    (work / "broken").mkdir()
    (work / "broken" / "pyproject.toml").write_text(BROKEN, encoding="utf-8")
    (work / "broken" / "broken_plugin.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    target = ["--disable-pip-version-check", "--target", str(work / "site"), str(work / "example"), str(work / "broken")]
    done = subprocess.run([*command, *target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work / "site"


def run(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(installed), str(ROOT / "src")])
    return fresh.run([*command], env=os.environ | {"PYTHONPATH": paths})


@pytest.mark.long
def test_its_criterion_prunes_and_the_broken_one_is_named(installed: Path, tmp_path: Path) -> None:
    options = ["--ratio", "0.2", "--shape", "uniform", "--select", "uniform", "--reconstruct", "none", "--device", "cpu"]
    done = run(installed, "-m", "regraft", "prune", "seedling", "--criterion", "spread", *options, "-o", str(tmp_path / "pruned"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "pruned" / "regraft.json").read_text(encoding="utf-8"))
    assert record["plan"]["criterion"].startswith("spread(")
    assert "criterion 'shattered' of package 'broken-plugin' is left out: loading it raises ModuleNotFoundError" in done.stderr
    assert "Traceback" not in done.stderr
    refused = run(installed, "-m", "regraft", "prune", "seedling", "--criterion", "shattered", *options, "-o", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert "a_package_that_is_not_there" in refused.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_its_own_tests_pass(installed: Path) -> None:
    test = ROOT / "examples" / "plugin" / "test_plugin.py"
    done = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, str(test))
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
