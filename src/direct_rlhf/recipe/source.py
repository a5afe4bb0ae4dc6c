"""YAML text to plain data that remembers where each value was written, and `a.b=c` overrides on top of it.

YAML is read by PyYAML's safe loader with the scalars of YAML 1.2: `1e-5` is a number; `yes`, `12:30`, `010` are text.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from direct_rlhf.recipe.fields import KeyPath


@dataclass
class Document:
    """Plain data of one recipe or merge file while it is put together."""

    data: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)  # path -> FILE:LINE, or the override that set it
    problems: list[str] = field(default_factory=list)

    def origin(self, path: KeyPath) -> str:
        """Where ``path`` was set, or else the nearest section around it; empty if nowhere."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ""


class _Yaml12(yaml.SafeLoader):
    """PyYAML's safe loader without the surprises of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own shape)


for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"<<$", "<"),
):
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


_COLLECTIONS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


class RecipeDumper(yaml.SafeDumper):
    """Writes YAML that both kinds of reader, 1.1 and ours, read back to the same values."""


def _text(dumper: RecipeDumper, text: str) -> yaml.ScalarNode:
    """Unicode's own line breaks survive in double quotes only."""
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


RecipeDumper.add_representer(str, _text)
RecipeDumper.add_implicit_resolver(  # so that the text "1e3" is written in quotes
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(file: Path, name: str, what: str = "recipe") -> Document:
    """As ``parse_yaml``, of a file; that it cannot be read is a problem too."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return Document(
            {}, problems=[f"{name}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x}). Save it as UTF-8."]
        )
    except OSError as error:
        return Document({}, problems=[f"{name}: cannot be read: {error.strerror}."])
    return parse_yaml(text, name, what)


def parse_yaml(text: str, name: str, what: str = "recipe") -> Document:
    """Read one file of a kind. All that is wrong is collected in ``problems``; ``name`` stands before line numbers."""
    document = Document({})
    try:
        loader = _Yaml12(text)
        node = loader.get_single_node()
        if node is None:
            start = " A start: direct-rlhf init quickstart" if what == "recipe" else ""
            document.problems.append(f"{name}: the file is empty.{start}")
        elif not isinstance(node, yaml.MappingNode):
            document.problems.append(f"{name}:1: a {what} is a mapping (lines of `key: value`), not {_kind(node)}.")
        else:
            document.data = _plain(loader, node, (), name, document)
    except yaml.YAMLError as error:
        document.problems.append(_yaml_problem(error, name, text, what))
    except RecursionError:
        document.problems.append(f"{name}: not valid YAML: nested too deeply, or an alias that holds itself.")
    return document


def _plain(loader: _Yaml12, node: yaml.Node, path: KeyPath, name: str, document: Document) -> Any:
    document.origins[path] = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
        raise yaml.constructor.ConstructorError(
            problem="could not determine a constructor", problem_mark=node.start_mark
        )
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, index), name, document) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    document.problems += _duplicates(node, path, name)
    loader.flatten_mapping(node)  # `<<: *anchor`
    mapping = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        mapping[key] = _plain(loader, value_node, (*path, key), name, document)
        document.origins[*path, key] = f"{name}:{key_node.start_mark.line + 1}"
    return mapping


def _duplicates(node: yaml.MappingNode, path: KeyPath, name: str) -> list[str]:
    first: dict[str, int] = {}
    problems = []
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key in first:
            problems.append(f"{dotted((*path, key))}: set twice ({name}:{first[key]} and {name}:{line}). Keep one.")
        first.setdefault(key, line)
    return problems


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _yaml_problem(error: yaml.YAMLError, name: str, text: str, what: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a reader error: a character that YAML forbids
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position) + 1
        return f"{name}:{line}: not valid YAML: control character U+{ord(text[position]):04X}. Remove it."
    problem = _words(error)
    line_text = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    hint = ""
    if "\t" in line_text[: mark.column + 1] and not line_text[: mark.column].strip():
        problem, hint = "a tab in the indentation", " Indent with spaces."
    elif problem.startswith("mapping values"):
        problem, hint = "a second colon in one line, or wrong indentation", " Put text with a colon in quotes."
    elif problem.startswith("could not determine a constructor"):
        problem, hint = f"a tag (!) has no place in a {what}", " Remove it."
    elif problem.startswith("but found another document"):
        problem, hint = "a second document starts here (---)", " Keep one."
    return f"{name}:{mark.line + 1}: not valid YAML: {problem}.{hint}"


def _words(error: Exception) -> str:
    return str(getattr(error, "problem", None) or "").replace("but got '<stream end>'", "but it ends here")


def extend(base: Document, child: Document) -> Document:
    """``child`` merged over ``base``: sections key by key, lists and single values replaced whole.

    A section whose `type` changes is replaced too, as the keys of one variant mean nothing to another.
    """
    merged = Document(copy.deepcopy(base.data), dict(base.origins), [*base.problems, *child.problems])
    _merge(merged, merged.data, child.data, (), child)
    return merged


def _merge(merged: Document, into: dict[str, Any], new: dict[str, Any], path: KeyPath, child: Document) -> None:
    for key, value in new.items():
        here = (*path, key)
        old = into.get(key)
        if isinstance(old, dict) and value is None:
            continue  # a section whose lines are all commented out
        if isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type"):
            _merge(merged, old, value, here, child)
        else:
            into[key] = value
            _forget(merged, here)
            merged.origins |= {place: origin for place, origin in child.origins.items() if place[: len(here)] == here}


def _forget(document: Document, path: KeyPath) -> None:
    for place in [place for place in document.origins if place[: len(path)] == path]:
        del document.origins[place]


def apply_overrides(document: Document, overrides: Sequence[str], defaults: dict[str, Any]) -> None:
    """Set `a.b=c` in place, in order; the value is YAML, a number in the path is a list index.

    ``defaults`` supplies the lists that the recipe did not write, so that their items have an index too.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
        if not equals or "" in path:
            document.problems.append(f"override {override}: write it as key=value, for example ppo.clip=0.1.")
            continue
        try:
            value = _override_value(text)
        except (yaml.YAMLError, RecursionError) as error:
            reason = _words(error) or "a character or nesting that YAML forbids"
            document.problems.append(f"override {override}: the value is not valid YAML: {reason}.")
        else:
            _set(document, path, value, f"override {override}", defaults)


def _override_value(text: str) -> Any:
    loader = _Yaml12(text)
    node = loader.get_single_node()
    inner = Document({})
    value = None if node is None else _plain(loader, node, (), "the value", inner)
    if inner.problems:
        raise yaml.MarkedYAMLError(problem=inner.problems[0].partition(" (")[0])
    return value


def _set(document: Document, path: KeyPath, value: Any, origin: str, defaults: Any) -> None:
    here: Any = document.data
    walked: KeyPath = ()
    for part in path[:-1]:
        slot = _slot(document, here, part, walked, origin)
        if slot is None:
            return
        defaults = _item(defaults, slot)
        if not isinstance(_item(here, slot), dict | list):
            here[slot] = copy.deepcopy(defaults) if isinstance(defaults, list) else {}
            document.origins[*walked, slot] = origin
        here, walked = here[slot], (*walked, slot)
    slot = _slot(document, here, path[-1], walked, origin)
    if slot is not None:
        here[slot] = value
        _forget(document, (*walked, slot))
        document.origins[*walked, slot] = origin


def _slot(
    document: Document, container: dict[str, Any] | list[Any], part: str | int, walked: KeyPath, origin: str
) -> str | int | None:
    """The key or index that ``part`` names in ``container``; None, with a problem noted, if a list has no such item."""
    if isinstance(container, dict):
        return str(part)
    if isinstance(part, int) and part < len(container):
        return part
    document.problems.append(
        f"{origin}: {dotted(walked)} is a list of {len(container)} (counted from 0) and has no item {part}."
    )
    return None


def _item(container: Any, slot: str | int) -> Any:
    if isinstance(container, dict):
        return container.get(slot)
    return container[slot] if isinstance(container, list) and isinstance(slot, int) and slot < len(container) else None


def dotted(path: KeyPath) -> str:
    """A path as users write it."""
    return ".".join(str(part) for part in path)
