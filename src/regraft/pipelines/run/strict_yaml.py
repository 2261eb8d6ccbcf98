"""Strict YAML: no duplicate keys, the numbers and words of YAML 1.2, and the line number of every key.

PyYAML follows YAML 1.1, in which ``1e-3`` is text, ``1:20`` is the number 80 and ``no`` is false. Here plain values follow the core schema
of YAML 1.2. Only plain data are made (by a ``SafeLoader``); tags for Python objects are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from regraft.errors import ConfigError, shown

MOST_VALUES = 10_000
DEEPEST = 50
_CORE = "tag:yaml.org,2002:"
_TAGS = ("null", "bool", "int", "float", "str", "map", "seq", "merge")


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers and words of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way of declaring them


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes texts that either version of YAML would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012 - PyYAML's own way of declaring them
        first: list(known) for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def _plain(tag: str, pattern: str, first: str) -> None:
    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


def write_yaml(value: Any) -> str:
    """Returns plain data as YAML that :func:`read_value` reads back to an equal value; text that looks like a number is quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


_plain("null", r"^(?:null|Null|NULL|~|)$", "nN~")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])
_plain("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_plain("int", r"^[-+]?[0-9]+$", "-+0123456789")
_plain(
    "float",
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
    "-+.0123456789",
)
_plain("merge", r"^<<$", "<")


def _whole_number(_: yaml.SafeLoader, node: yaml.Node) -> int:
    return int(node.value)  # PyYAML reads 010 as eight; here leading zeros are ignored


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


@dataclass
class YamlText:
    """A YAML document.

    Attributes:
        values: Plain data.
        lines: Dotted key to its line number, from 1.
        empty: Dotted keys without a value, not even ``null``.
        problems: One line for each duplicate key.
    """

    values: Any
    lines: dict[str, int] = field(default_factory=dict[str, int])
    empty: set[str] = field(default_factory=set[str])
    problems: list[str] = field(default_factory=list[str])


def read_yaml(text: str, source: str) -> YamlText:
    """Reads one YAML document.

    Args:
        text: The document.
        source: Name of the document, for messages.

    Raises:
        ConfigError: The text is not YAML; the message gives line and column.
    """
    try:
        return _read(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ConfigError(source, [f"{where}{error.problem or error.context}; this is not YAML"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"{' '.join(str(error).split())}; this is not YAML"]) from None
    except RecursionError:
        raise ConfigError(source, ["nested too deeply; this is not a recipe"]) from None
    except (
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
    ) as error:  # a value that its own tag contradicts, such as !!int x
        raise ConfigError(source, [f"{shown(error, 200)}; this is not YAML that can be read"]) from None


def _read(text: str) -> YamlText:
    if _deepest_brackets(text) > DEEPEST:  # PyYAML takes the square of the depth
        raise ValueError(f"nested more than {DEEPEST} deep")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        found = YamlText(None)
        if node is not None:
            _refuse_bomb(node)
            _walk(node, "", found, set())  # before construction, which writes merged keys into the nodes
            found.values = loader.construct_document(node)
        return found
    finally:
        loader.dispose()


def _deepest_brackets(text: str) -> int:
    """Returns how deep brackets are nested, those in texts counted too; a recipe has a handful."""
    depth = deepest = 0
    for found in re.finditer(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if found[0] in "[{" else -1))
        deepest = max(deepest, depth)
    return deepest


def _refuse_bomb(node: yaml.Node) -> None:
    """Refuses a document whose aliases stand for more values than anybody writes, before they are made, and keys that are no text.

    Raises:
        ValueError: It is such a document.
    """
    counts: dict[int, int] = {}

    def count(node: yaml.Node, depth: int) -> int:
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        if id(node) not in counts:
            counts[id(node)] = MOST_VALUES  # of one that holds itself
            if node.tag.removeprefix(_CORE) not in _TAGS:
                mark = node.start_mark
                raise ValueError(f"line {mark.line + 1}, column {mark.column + 1}: the tag {shown(node.tag, 60)} is not read; leave it out")
            counts[id(node)] = 1 + sum(count(part, depth + 1) for part in _parts(node))
            if counts[id(node)] > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES:,} values, by aliases")
        return counts[id(node)]

    count(node, 0)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """Returns the values of a mapping or a sequence.

    Raises:
        ValueError: A key is no text.
    """
    match node:
        case yaml.MappingNode():
            for key, _ in node.value:
                _check_key(key)
            return [value for _, value in node.value]
        case yaml.SequenceNode():
            return node.value
        case _:
            return []


def _check_key(key: yaml.Node) -> None:
    match key:
        case yaml.ScalarNode() if key.tag.removeprefix(_CORE) in ("str", "merge"):
            return
        case yaml.ScalarNode():
            what = f"the key {shown(key.value, 40)} is"
        case _:
            what = "a key is"
    raise ValueError(f"line {key.start_mark.line + 1}: {what} no text; give the name of a setting")


def _walk(node: yaml.Node, prefix: str, found: YamlText, above: set[int]) -> None:
    """Records the line of every key, and duplicate keys."""
    if not isinstance(node, yaml.MappingNode) or id(node) in above:
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        dotted, line = prefix + name, key.start_mark.line + 1
        if name == "<<":
            continue
        if name in seen:
            found.problems.append(f"{dotted} (line {line}): stands twice, first on line {seen[name]}; keep one of them")
        seen.setdefault(name, line)
        found.lines.setdefault(dotted, line)
        if isinstance(value, yaml.ScalarNode) and not value.value and value.style is None:
            found.empty.add(dotted)
        _walk(value, f"{dotted}.", found, above | {id(node)})


def read_value(text: str) -> Any:
    """Reads the value of an override such as ``prune.ratio=0.3``.

    Raises:
        ConfigError: The text is not YAML.
    """
    return read_yaml(text, "value").values
