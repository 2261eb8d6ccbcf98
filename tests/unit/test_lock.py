"""The lock file agrees with the constraints, has a checksum for everything, and names no machine; the bill of materials follows it."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def make_sbom() -> Any:
    spec = importlib.util.spec_from_file_location("make_sbom", ROOT / "scripts" / "make_sbom.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lock_is_that_of_the_constraints() -> None:
    versions, _ = make_sbom().read_lock(LOCK)
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}
    differing = {name: (version, versions[name]) for name, version in names.items() if versions.get(name, version) != version}
    assert differing == {}, "run: make lock"
    assert {"torch", "transformers", "peft", "ruff", "lm-eval"} <= set(versions)
    assert LOCK.count("--hash=sha256:") > 2 * len(versions)
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=[a-z])", LOCK.partition("\n\n")[2]) if "==" in entry)
    assert "://" not in LOCK
    assert " /" not in LOCK


def test_the_bill_of_materials_separates_what_is_needed_from_extras() -> None:
    sbom = make_sbom()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = sbom.bill(LOCK, project)
    assert json.loads(json.dumps(found)) == found
    scopes = {part["name"]: part["scope"] for part in found["components"]}
    assert {name: scopes[name] for name in ("torch", "sympy", "pytest", "mkdocs", "lm-eval")} == {
        "torch": "required", "sympy": "required", "pytest": "optional", "mkdocs": "optional", "lm-eval": "optional",
    }  # fmt: skip
    uses = {entry["ref"]: entry["dependsOn"] for entry in found["dependencies"]}
    torch = next(part["bom-ref"] for part in found["components"] if part["name"] == "torch")
    assert torch in uses[found["metadata"]["component"]["bom-ref"]]
    assert {reference for users in uses.values() for reference in users} <= set(uses)
