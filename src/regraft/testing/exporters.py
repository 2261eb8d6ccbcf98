"""Checks that every export format must pass."""

from __future__ import annotations

import tempfile
from pathlib import Path

from regraft.errors import InputError
from regraft.export import AdapterFormat, Exportable, Exporter, ModelFormat
from regraft.models.load import Loaded
from regraft.settings import ExportSettings
from regraft.surgery.adapters import factors, finish
from regraft.testing.adapters import AdapterForm, scramble
from regraft.testing.require import NonconformingError, generators_left_alone, require
from regraft.testing.toys import FULL_NAMES, toy

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def check_exporter(exporter: Exporter, loaded: Loaded | None = None, text: str = "the cat sat on the mat and then saw two birds") -> None:
    """Checks an export format.

    It says what it is and what loads it; it writes at least one file, none of them pickled, and the same bytes the second time; global
    generators are left alone. An adapter's format refuses an adapter that changes nothing, in one line. A model's format names a file
    that is there, and its own check of it passes.

    Args:
        exporter: The format.
        loaded: A model that it can hold; needed for formats of whole models.
        text: What a format of whole models is checked on.

    Raises:
        NonconformingError: With what the format did.
        TypeError: A format of whole models was given no model.
    """
    who = f"export format ({exporter.summary})"
    require(bool(exporter.summary) and bool(exporter.holds), f"{who} does not say what it is, or what loads it")
    with tempfile.TemporaryDirectory() as work:
        folders = [Path(work, name) for name in ("first", "second")]
        for folder in folders:
            folder.mkdir()
            with generators_left_alone(who):
                match exporter:
                    case AdapterFormat():
                        require(bool(exporter.write(_adapter(), folder)), f"{who} does not say what it wrote")
                    case _:
                        _write_model(who, exporter, loaded, folder, text)
        first, second = ({str(p.relative_to(f)): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()} for f in folders)
        require(bool(first), f"{who} writes nothing")
        require(first == second, f"{who} writes other bytes the second time")
        require(not [name for name in first if name.endswith(PICKLED)], f"{who} writes pickled files")
        if isinstance(exporter, AdapterFormat):
            _check_refusal(who, exporter, Path(work))


def _write_model(who: str, exporter: ModelFormat, loaded: Loaded | None, folder: Path, text: str) -> None:
    if loaded is None:
        raise TypeError("a format of whole models is checked on a model: check_exporter(exporter, loaded)")
    settings = ExportSettings()
    exporter.refuse(loaded, settings)
    written = exporter.write(loaded, folder, settings)
    require((folder / written.file).exists(), f"{who} names {written.file}, which it did not write")
    exporter.check(loaded, folder, written, text, settings)


def _adapter(changes: bool = True) -> Exportable:
    plain, injected = toy(), AdapterForm("lora").put_on(toy(), "linear")
    scramble(injected)
    finish(injected)
    name = FULL_NAMES["linear"]
    found = factors(injected) if changes else {}
    names = tuple(name for name, _ in plain.named_modules())
    return Exportable(plain, "base", found, {name: plain.get_submodule(name)} if changes else {}, names)


def _check_refusal(who: str, exporter: AdapterFormat, work: Path) -> None:
    folder = work / "empty"
    folder.mkdir()
    try:
        exporter.write(_adapter(changes=False), folder)
    except InputError as refusal:
        require("\n" not in str(refusal), f"{who} refuses an adapter without a change in more than one line")
    else:
        raise NonconformingError(f"{who} exports an adapter that changes nothing")
