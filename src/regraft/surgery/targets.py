"""Target modules of adapters: every projection of every layer, or the modules that patterns name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from regraft.adapters.linear_like import is_site, is_table
from regraft.errors import InputError, did_you_mean
from regraft.surgery.adapted import Adapted

_EXPRESSION = frozenset("()|\\^$+")  # characters of regular expressions, which no module's name and no glob has


def find_targets(model: PreTrainedModel, patterns: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Returns the modules to adapt, by full name, in the order of the model.

    Args:
        model: A model with or without adapters; for adapted modules, the plain modules inside are returned.
        patterns: Full names, ends of names (``q_proj``, ``mlp.up_proj``) or globs of either (``*.layers.0.*``, ``*_proj``). Empty for
            every projection of every layer, without embeddings, heads, and matrices that a kernel of a mixer reads by itself.

    Raises:
        InputError: A pattern matches no module; the message lists the modules.
    """
    sites = _sites(model)
    wanted = list(patterns)
    if not wanted:
        inside = {name: module for name, module in sites.items() if not is_table(module) and _in_a_layer(model, name)}
        found = {name: module for name, module in inside.items() if not _read_by_a_kernel(model, name)}
        if not found:
            raise InputError(f"no layer of {type(model).__name__} has a linear projection to adapt; name modules with `targets`")
        return found
    for pattern in wanted:
        if not any(_matches(name, pattern) for name in sites):
            known = sorted({name.rpartition(".")[2] for name in sites})
            hint = did_you_mean(pattern, [*known, *sites])
            if _EXPRESSION.intersection(pattern) or ".*" in pattern:
                hint = "; patterns are names and globs such as *.layers.0.*_proj, several as a list, not regular expressions"
            raise InputError(f"target '{pattern}' matches nothing; the model has: {', '.join(known)}{hint}")
    return {name: module for name, module in sites.items() if any(_matches(name, pattern) for pattern in wanted)}


def _sites(model: nn.Module) -> dict[str, nn.Module]:
    """Returns all modules that can be adapted, by their names in the plain model; wrappers are replaced by the modules inside."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            found[name] = module.base
            inside.update(id(part) for part in module.modules())
        elif is_site(module) and id(module) not in inside:
            found[name] = module
    return found


def _read_by_a_kernel(model: nn.Module, name: str) -> bool:
    """Returns whether a matrix is the last of a Mamba mixer: its fused kernel reads the weight, and passes by what stands around it."""
    parent, _, last = name.rpartition(".")
    beside = {key for key, _ in model.get_submodule(parent).named_parameters(recurse=False)}
    return last == "out_proj" and {"A_log", "D"} <= beside


def _in_a_layer(model: nn.Module, name: str) -> bool:
    """Returns whether a module is inside a list of layers."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList) for depth in range(1, len(parts)))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
