"""Writes what regraft is made of as a bill of materials in CycloneDX JSON, from ``requirements.lock`` (``make sbom``).

Packages that regraft itself needs are ``required``; those of its extras alone, tests and documentation included, are ``optional``. The
file is the same for the same lock: it has no time and no serial number.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)(?:\s*;\s*([^\\]+?))?\s*\\?$")
_NEEDED_BY = re.compile(r" +# +(?:via +)?(?!via$)([A-Za-z0-9][A-Za-z0-9._-]*)")


def read_lock(text: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    r"""Returns the version of each package of a lock file, and the names of those that need it.

    >>> read_lock("a==1 \\\n    --hash=sha256:0\n    # via\n    #   b\nb==2 ; os_name == 'x'\n    # via c (pyproject.toml)")
    ({'a': '1', 'b': '2'}, {'a': {'b'}, 'b': {'c'}})
    """
    versions: dict[str, str] = {}
    needed_by: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        if (pin := _PIN.match(line)) is not None:
            name = str(canonicalize_name(pin[1]))
            versions[name] = pin[2]
            needed_by.setdefault(name, set())
        elif name and (user := _NEEDED_BY.match(line)) is not None:
            needed_by[name].add(str(canonicalize_name(user[1])))
    return versions, needed_by


def required(direct: Iterable[str], needed_by: Mapping[str, set[str]]) -> set[str]:
    """Returns the packages that the direct ones bring, themselves included."""
    found = {str(canonicalize_name(Requirement(line).name)) for line in direct}
    while more := {name for name, users in needed_by.items() if name not in found and users & found}:
        found |= more
    return found & set(needed_by)


def bill(lock: str, project: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the bill of materials of a project by its lock."""
    versions, needed_by = read_lock(lock)
    needed = required(project["dependencies"], needed_by)
    own = f"pkg:pypi/{project['name']}@{project['version']}"
    reference = {name: f"pkg:pypi/{name}@{version}" for name, version in versions.items()} | {project["name"]: own}
    uses: dict[str, list[str]] = {name: [] for name in reference}
    for name, users in needed_by.items():
        for user in users & set(uses):
            uses[user].append(reference[name])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": own,
                "name": project["name"],
                "version": project["version"],
                "purl": own,
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": [
            {
                "type": "library",
                "bom-ref": reference[name],
                "name": name,
                "version": version,
                "purl": reference[name],
                "scope": "required" if name in needed else "optional",
            }
            for name, version in sorted(versions.items())
        ],
        "dependencies": [{"ref": reference[name], "dependsOn": sorted(found)} for name, found in sorted(uses.items())],
    }


def main() -> int:
    """Writes the bill of materials."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="file to write")
    output = parser.parse_args().output
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = bill((ROOT / "requirements.lock").read_text(encoding="utf-8"), project)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {output}: {len(found['components'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
