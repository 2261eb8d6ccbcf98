"""Examination of this machine and installation: installed libraries, missing ones, and how to install them.

It imports nothing that may be missing, so that it can report it.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from regraft import seedling
from regraft.atomic import sha256_of
from regraft.errors import RegraftError

DISTRIBUTION = "regraft"

# Extras that add something to a command, and what. Their libraries are in the package metadata.
EXTRAS = {
    "bnb": "recovery on 4-bit weights (`load_in_4bit`)",
    "data": "data from the hub",
    "eval": "tasks of lm-evaluation-harness (`tasks`)",
    "gguf": "GGUF files: read, write and run",
    "postgres": "rank searches of several machines on one PostgreSQL database",
    "ray": "rank searches on a Ray cluster",
}

Status = Literal["ok", "missing", "outdated", "damaged", "none"]


@dataclass(frozen=True)
class Finding:
    """One result of the examination.

    Attributes:
        name: Name of the library or the part of the machine.
        status: ``ok``; ``missing`` or ``outdated`` for libraries; ``damaged``; ``none`` for absent hardware.
        value: Version, size or state.
        required: Whether regraft cannot work without it.
        remedy: Command that corrects the problem, or empty.
    """

    name: str
    status: Status
    value: str
    required: bool = False
    remedy: str = ""


@dataclass(frozen=True)
class Examination:
    """All results of the examination.

    Attributes:
        required: Python and the libraries that regraft needs.
        optional: Libraries that some commands use.
        machine: Cores, memory, disk and devices.
        model: The embedded model.
    """

    required: tuple[Finding, ...]
    optional: tuple[Finding, ...]
    machine: tuple[Finding, ...]
    model: Finding

    @property
    def healthy(self) -> bool:
        """Returns whether all requirements are met."""
        return all(finding.status == "ok" for finding in (*self.required, self.model))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return {"healthy": self.healthy, **asdict(self)}


def examine(folder: Path | None = None) -> Examination:
    """Examines the installation and the machine.

    Args:
        folder: Folder whose disk is examined; None for the current directory.
    """
    return Examination(tuple(_required()), tuple(_optional()), tuple(_machine(folder or Path.cwd())), _embedded_model())


def _required() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}", required=True)
    for requirement in _requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check(requirement)


def check(requirement: Requirement) -> Finding:
    """Compares a requirement with the installed version."""
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, "missing", str(requirement.specifier), required=True, remedy=install)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, "outdated", f"{found}, wanted {requirement.specifier}", required=True, remedy=install)
    return Finding(requirement.name, "ok", found, required=True)


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:  # regraft runs from a checkout without installation
        return []


def _optional() -> Iterator[Finding]:
    for name, extra in optional_libraries():
        try:
            yield Finding(name, "ok", f"{version(name)}: {EXTRAS[extra]}")
        except PackageNotFoundError:
            yield Finding(name, "missing", EXTRAS[extra], remedy=f"pip install '{DISTRIBUTION}[{extra}]'")


def optional_libraries() -> list[tuple[str, str]]:
    """Returns each library that only some commands use, with the extra that installs it, as the package metadata have them."""
    return [(requirement.name, extra) for requirement in _requirements() for extra in _extras_of(requirement) if extra in EXTRAS]


def _extras_of(requirement: Requirement) -> list[str]:
    """Returns the extras that install a requirement, from its marker ``extra == "name"``."""
    text = str(requirement.marker or "")
    return [part.split('"')[1] for part in text.split("extra ==")[1:] if '"' in part]


def _machine(folder: Path) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    yield Finding("CPU cores", "ok", f"{usable} usable of {os.cpu_count()}")
    memory = psutil.virtual_memory()
    yield Finding("memory", "ok", f"{_gib(memory.available)} free of {_gib(memory.total)}")
    disk = shutil.disk_usage(folder)
    yield Finding("disk here", "ok", f"{_gib(disk.free)} free of {_gib(disk.total)}")
    yield from _devices()


def _devices() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # torch raises an OSError if its libraries do not load
        yield Finding("torch devices", "none", f"torch cannot be imported: {error}")
        return
    yield Finding("torch threads", "ok", str(torch.get_num_threads()))
    if not torch.cuda.is_available():
        yield Finding("CUDA", "none", "no GPU that this torch can use; everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
        yield Finding(f"cuda:{index}", "ok", f"{facts.name}, {_gib(facts.total_memory)}, {bf16}")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _embedded_model() -> Finding:
    """Compares the weights of the embedded model with their shipped checksums."""
    again = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
    try:
        folder = seedling.path()
        files = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        damaged = [name for name, checksum in files.items() if sha256_of(folder / name) != checksum]
    except (RegraftError, OSError, ValueError, KeyError) as error:
        return Finding("seedling", "damaged", str(error), required=True, remedy=again)
    if damaged:
        return Finding("seedling", "damaged", f"checksum of {', '.join(damaged)} differs", required=True, remedy=again)
    return Finding("seedling", "ok", f"{sum((folder / name).stat().st_size for name in files) / 1e6:.1f} MB, checksums match", True)
