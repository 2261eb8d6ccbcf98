"""Hook of mkdocs that adds the pages which are made from the code, so that no copy of them has to be kept.

One page for each command (from ``make_docs.py``), the reference of the public API and of what authors of methods build on, and the texts
that lie at the repository's root. Pages of ``docs/`` that the navigation does not name are put under Guides.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
AT_THE_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}

# Reference pages beside the public API: title, what it is for, and modules.
PAGES = {
    "settings": ("Settings", "What a user can set: one class for each section of a recipe.", ["regraft.settings"]),
    "plans": ("Plans", "What passes between stages, is stored beside a model and can be replayed.", ["regraft.plans"]),
    "errors": ("Errors", "Everything that regraft raises for a user.", ["regraft.errors"]),
    "contracts": (
        "Contracts",
        "What a criterion, a selector, an allocator, an adapter, a compression method or an export format of your own has to be. "
        "See [Plug-ins](../plugins.md).",
        [
            "regraft.registry",
            "regraft.importance.criteria",
            "regraft.selection.budget",
            "regraft.allocation.contract",
            "regraft.adapters.contract",
            "regraft.compression.contract",
            "regraft.export.contract",
        ],
    ),
    "testing": ("Testing", "The conformance suite for authors of methods. See [Plug-ins](../plugins.md).", ["regraft.testing"]),
    "numerics": ("Numerics", "Linear algebra on tensors, each with its paper and its shapes.", []),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the navigation: one entry for each command, and every page of ``docs/`` that has no place yet."""
    commands = [{"All": "commands/index.md"}, *({name: f"commands/{name}.md"} for name in _commands())]
    reference = [{"regraft": "reference/index.md"}, *({title: f"reference/{name}.md"} for name, (title, _, _) in PAGES.items())]
    nav: list[Any] = config.nav or []
    for entry in nav:
        for title in entry:
            entry[title] = {"commands/": commands, "reference/": reference}.get(str(entry[title]), entry[title])
    named = set(re.findall(r"[\w/]+\.md", str(nav)))
    guides = next(entry["Guides"] for entry in nav if "Guides" in entry)
    guides += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named | {"commands.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made from the code."""
    for name, text in _pages().items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links out of ``docs/`` into links to the generated pages, or into plain names where the site has no such page."""
    here = posixpath.dirname(page.file.src_uri)

    def target(found: re.Match[str]) -> str:
        text, link = found[1], found[2]
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:|#|$", link):
            return found[0]
        path = posixpath.normpath(posixpath.join(here, path))
        if page.file.src_uri in AT_THE_ROOT:
            path = path.removeprefix("docs/")
        back = {source: name for name, source in AT_THE_ROOT.items()}
        path = back.get(path.removeprefix("../"), path).replace("../benchmarks/results/", "results/")
        if path == "commands.md":
            path, anchor = ("commands/" + (anchor.removeprefix("regraft-") or "index") + ".md"), ""
        known = path in _pages() or (ROOT / "docs" / path).is_file() or (path.startswith("results/") and path.endswith(".png"))
        if not known:
            name = f"`{path.removeprefix('../').replace('results/', 'benchmarks/results/')}`"
            return name if text.strip("`") in name else f"{text} ({name})"
        return f"[{text}]({posixpath.relpath(path, here or '.')}{'#' + anchor if anchor else ''})"

    return re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", target, markdown)


def _pages() -> dict[str, str]:
    if not _CACHE:
        for name, text in _commands().items():
            _CACHE[f"commands/{name}.md"] = text
        lines = [f"- [`regraft {name}`]({name}.md)" for name in _commands()]
        _CACHE["commands/index.md"] = _docs.commands_page().partition("\n- [")[0].rstrip() + "\n\n" + "\n".join(lines) + "\n"
        _CACHE["reference/index.md"] = _public_api()
        for name, (title, purpose, modules) in PAGES.items():
            modules = modules or sorted(f"regraft.numerics.{path.stem}" for path in _numerics() if path.stem != "__init__")
            body = "\n\n".join(f"## `{module}`\n\n::: {module}\n    options:\n      show_root_heading: false" for module in modules)
            _CACHE[f"reference/{name}.md"] = f"# {title}\n\n{purpose}\n\n{body}\n"
        for name, source in AT_THE_ROOT.items():
            _CACHE[name] = (ROOT / source).read_text(encoding="utf-8")
    return _CACHE


def _numerics() -> list[Path]:
    return [path for room in ("numerics",) for path in (ROOT / "src" / "regraft" / room).glob("*.py")]


def _public_api() -> str:
    import regraft

    entries = "\n\n".join(f"::: regraft.{name}\n    options:\n      heading_level: 2" for name in sorted(regraft.__all__))
    return f"# regraft\n\nThe names that `import regraft` gives. Everything else may change between versions.\n\n{entries}\n"


def _commands() -> dict[str, str]:
    return {name: _docs.command_page(name) for name in _docs.COMMANDS}


def _load_docs() -> Any:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_docs"] = module
    spec.loader.exec_module(module)
    return module


_CACHE: dict[str, str] = {}
_docs = _load_docs()
