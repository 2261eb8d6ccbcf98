from __future__ import annotations

import importlib
import json
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from regraft import seedling
from regraft.atomic import sha256_of
from regraft.pipelines import doctor

ROOT = Path(__file__).parents[3]


def test_what_is_installed_is_found_with_its_version() -> None:
    found = {finding.name: finding for finding in doctor.examine().required}
    for name in ("torch", "transformers", "peft", "safetensors"):
        assert found[name].status == "ok"
        assert found[name].value == version(name)
        assert found[name].remedy == ""


@pytest.mark.parametrize(
    ("requirement", "status", "remedy"),
    [
        ("numpy>=1", "ok", ""),
        ("numpy>=999", "outdated", "pip install 'numpy>=999'"),
        ("no-such-library-anywhere>=2", "missing", "pip install 'no-such-library-anywhere>=2'"),
    ],
)
def test_requirements_are_compared(requirement: str, status: str, remedy: str) -> None:
    finding = doctor.check(Requirement(requirement))
    assert (finding.status, finding.remedy) == (status, remedy)
    assert finding.required


def test_optional_libraries_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    monkeypatch.setattr(doctor, "requires", lambda _: ["ray>=2.40; extra == 'ray'", 'gguf; extra == "gguf"', "ruff; extra == 'dev'"])
    found = {finding.name: finding for finding in doctor.examine().optional}
    assert found["gguf"].remedy == "pip install 'regraft[gguf]'"
    assert found["ray"].remedy == "pip install 'regraft[ray]'"
    assert found.keys() == {"gguf", "ray"}
    assert {finding.status for finding in found.values()} == {"missing"}


@pytest.mark.slow
def test_every_optional_library_is_imported_somewhere() -> None:
    """A library that no code imports is not named, and one that is imported where it may be missing has an extra."""
    source = Path(doctor.__file__).parents[1]
    text = "\n".join(path.read_text(encoding="utf-8") for path in source.rglob("*.py") if path.name != "doctor.py")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {Requirement(line).name.replace("-", "_") for extra in doctor.EXTRAS for line in extras[extra]}
    library = rf"({'|'.join(named)})"
    at_use = [rf"import_module\(\"{library}\"", rf"^ +import {library}$", rf"find_spec\(\"{library}\"", rf"_DRIVERS = .*\"{library}\""]
    used = {name for pattern in at_use for name in re.findall(pattern, text, re.MULTILINE)}
    assert used == named
    refused = set(re.findall(r"MissingDependencyError\(\"\w+\", \"(\w+)\"\)", text))
    assert refused <= doctor.EXTRAS.keys()
    for name in ("mkdocs", "trackio"):
        assert name not in {finding.name for finding in doctor.examine().optional}


def test_a_missing_library_makes_it_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["no-such-library-anywhere"])
    assert not doctor.examine().healthy


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the embedded model, with checksums."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    files = {"model.safetensors": sha256_of(tmp_path / "model.safetensors")}
    (tmp_path / "checksums.json").write_text(json.dumps(files))
    monkeypatch.setattr(seedling, "path", lambda: tmp_path)
    return tmp_path


def test_an_intact_model(model: Path) -> None:
    assert doctor.examine().model.status == "ok"


@pytest.mark.parametrize("damage", ["flipped", "removed", "no checksums", "broken checksums"])
def test_a_damaged_model_is_found(model: Path, damage: str) -> None:
    match damage:
        case "flipped":
            (model / "model.safetensors").write_bytes(b"weightz")
        case "removed":
            (model / "model.safetensors").unlink()
        case "no checksums":
            (model / "checksums.json").unlink()
        case _:
            (model / "checksums.json").write_text("[")
    examination = doctor.examine()
    assert examination.model.status == "damaged"
    assert "pip install --force-reinstall" in examination.model.remedy
    assert not examination.healthy


def test_without_torch_it_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without_torch(name: str) -> ModuleType:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without_torch)
    assert "torch cannot be imported" in {finding.name: finding.value for finding in doctor.examine().machine}["torch devices"]


def test_it_is_plain_json() -> None:
    examination = doctor.examine()
    assert json.loads(json.dumps(examination.to_dict()))["healthy"] == examination.healthy
