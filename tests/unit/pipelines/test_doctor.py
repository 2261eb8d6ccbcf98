from __future__ import annotations

import importlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from regraft import seedling
from regraft.atomic import sha256_of
from regraft.pipelines import doctor


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
    monkeypatch.setattr(doctor, "requires", lambda _: ["optuna>=4; extra == 'search'", 'gguf; extra == "gguf"', "ruff; extra == 'dev'"])
    found = {finding.name: finding for finding in doctor.examine().optional}
    assert found["gguf"].remedy == "pip install 'regraft[gguf]'"
    assert found["optuna"].remedy == "pip install 'regraft[search]'"
    assert found["lm_eval"].remedy == "pip install lm-eval"
    assert {finding.status for finding in found.values()} == {"missing"}


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
