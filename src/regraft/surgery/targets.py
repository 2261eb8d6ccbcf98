"""Target modules of adapters: every projection of every layer, or the modules that patterns name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from regraft.adapters.linear_like import is_site, is_table, shape_of
from regraft.adapters.stock_files import problem_of
from regraft.compat import names_of_experts
from regraft.errors import InputError, did_you_mean
from regraft.surgery.adapted import Adapted

_EXPRESSION = frozenset("()|\\^$+{")  # characters of regular expressions, which no module's name and no glob has


def find_targets(model: PreTrainedModel, patterns: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Returns the modules to adapt, by full name, in the order of the model.

    Args:
        model: A model with or without adapters; for adapted modules, the plain modules inside are returned.
        patterns: As :func:`matching` takes them. Empty for every projection of every layer, without embeddings, heads, gates of one
            number, matrices that a kernel of a mixer reads by itself, and names that PEFT takes for experts.

    Raises:
        InputError: A pattern matches no module; the message lists the modules.
    """
    sites = _sites(model)
    wanted = list(patterns)
    if not wanted:
        inside = {name: module for name, module in sites.items() if not is_table(module) and _in_a_layer(model, name)}
        experts = names_of_experts(model.config.model_type)
        found = {
            name: module
            for name, module in inside.items()
            if not _read_by_a_kernel(model, name) and min(shape_of(module)) > 1 and name.rpartition(".")[2] not in experts
        }
        if not found:
            raise InputError(f"no layer of {type(model).__name__} has a linear projection to adapt; name modules with `targets`")
        return found
    chosen = matching(sites, wanted)
    return {name: module for name, module in sites.items() if name in chosen}


def matching(names: Collection[str], patterns: Iterable[str]) -> frozenset[str]:
    r"""Returns the names of modules that any of several patterns matches.

    Args:
        names: Full names of modules.
        patterns: Full names, ends of names (``q_proj``, ``mlp.up_proj``), globs of either (``*.layers.0.*``, ``*_proj``), or regular
            expressions, which match a whole name as PEFT's do (``.*\.(q|v)_proj``). What is a glob that matches counts as one.

    Raises:
        InputError: A pattern matches nothing; the message lists the ends of the names.

    >>> sorted(matching(["layers.0.q_proj", "layers.1.v_proj"], ["q_proj", r".*\.1\..*"]))
    ['layers.0.q_proj', 'layers.1.v_proj']
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if _matches(name, pattern)} or _by_expression(names, pattern)
        if not hits:
            known = sorted({name.rpartition(".")[2] for name in names})
            hint = did_you_mean(pattern, [*known, *names])
            if _is_expression(pattern):
                hint = "; a regular expression has to match a whole name, as in PEFT, such as .*[.](q|v)_proj"
            raise InputError(f"target '{pattern}' matches nothing; the model has: {', '.join(known)}{hint}")
        found |= hits
    return frozenset(found)


def _is_expression(pattern: str) -> bool:
    return bool(_EXPRESSION.intersection(pattern)) or ".*" in pattern


def _by_expression(names: Collection[str], pattern: str) -> set[str]:
    """Returns the names that a regular expression matches as a whole; none where the pattern is no such expression."""
    if not _is_expression(pattern):
        return set()
    if problem := problem_of((pattern,), tuple(names)):
        raise InputError(f"`targets`: {problem}; write a list of names, or globs such as *.layers.0.*_proj")
    expression = re.compile(pattern)
    return {name for name in names if expression.fullmatch(name)}


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
