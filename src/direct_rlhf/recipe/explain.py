"""What pydantic found wrong, in the words of a recipe: path, value, reason, place, and what was probably meant."""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from direct_rlhf.recipe.fields import (
    KeyPath,
    Place,
    is_number,
    leaves,
    locate,
    section_of,
    type_words,
    union_sections,
    without_none,
)
from direct_rlhf.recipe.schema import Recipe, Section
from direct_rlhf.recipe.source import Document, dotted

S = TypeVar("S", bound=Section)


def validate(document: Document) -> Recipe | None:
    """The recipe that ``document`` describes; None if anything is wrong, all of it then in ``document.problems``."""
    return validate_as(Recipe, document)


def validate_as(root: type[S], document: Document) -> S | None:
    """The section ``root`` that ``document`` describes; None if anything is wrong, as in ``validate``."""
    document.problems += _booleans_as_numbers(document, document.data, (), (), root)
    try:
        section = root.model_validate(document.data)
    except ValidationError as error:
        document.problems += explain(error, document, root)
        return None
    return None if document.problems else section


def _booleans_as_numbers(
    document: Document, data: Any, path: KeyPath, loc: KeyPath, root: type[Section]
) -> Iterator[str]:
    """pydantic takes true for 1. ``loc`` is ``path`` with the tags of unions in it, as pydantic's own."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    if isinstance(data, dict) and "type" in data and union_sections(locate(loc, root).annotation):
        loc = (*loc, str(data["type"]))
    for key, value in items:
        here, there = (*path, key), (*loc, key)
        if isinstance(value, bool) and (place := locate(there, root)).field:
            annotation = place.field.annotation
            annotation = place.annotation if get_origin(annotation) is dict else annotation
            if is_number(annotation):
                yield line(here, value, f"must be a {type_words(annotation)}", document)
        yield from _booleans_as_numbers(document, value, here, there, root)


def explain(
    error: ValidationError,
    document: Document,
    root: type[Section] = Recipe,
    written: Callable[[KeyPath], KeyPath] = lambda path: path,
) -> list[str]:
    """One line for each thing that is wrong; ``written`` gives the path in the document of a path in ``root``."""
    lines: dict[KeyPath, str] = {}
    for found in error.errors(include_url=False):
        place = locate(tuple(found["loc"]), root)
        place = replace(place, path=written(place.path))
        kind = found["type"]
        if kind == "extra_forbidden":
            said = _unknown_key(place, document, root)
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            said = _wrong_tag(place, found["input"], document)
        elif kind == "value_error":
            said = _broken_rule(place.path, str(found["ctx"]["error"]), document)
        elif kind == "missing" and isinstance(found["loc"][-1], int):  # a pair with one item
            short = locate(tuple(found["loc"][:-1]), root)
            said = line(written(short.path), found["input"], f"must be {type_words(short.annotation)}", document)
        elif kind == "missing":
            said = f"{dotted(place.path)}: is required{at(place.path, document)}."
        else:
            reason, suggestion = _reason(kind, found.get("ctx", {}), place, found["input"], str(found["msg"]))
            said = line(place.path, found["input"], reason, document, suggestion)
        lines.setdefault(place.path, said)  # a plain union reports once per member
    return list(lines.values())


def line(path: KeyPath, value: Any, reason: str, document: Document, suggestion: str = "") -> str:
    """`path = value: reason (place). suggestion`"""
    shown = "" if isinstance(value, Mapping) else f" = {_shown(value)}"
    return f"{dotted(path)}{shown}: {reason}{at(path, document)}." + (f" {suggestion}" if suggestion else "")


def at(path: KeyPath, document: Document) -> str:
    origin = document.origin(path)
    return f" ({origin})" if origin else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str | bool | int | list):
        text = json.dumps(value, ensure_ascii=False, default=str)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unknown_key(place: Place, document: Document, root: type[Section]) -> str:
    *parents, key = place.path
    legal = list(place.owner.model_fields) if place.owner else []
    near = difflib.get_close_matches(str(key), legal, 1, cutoff=0.65) or _elsewhere(
        str(key), dotted(tuple(parents)), root
    )
    if near and near[0] in legal:
        hint = f"Did you mean {dotted((*parents, near[0]))}?"
    elif near:
        hint = f"Did you mean {near[0]}?"
    else:
        hint = f"Known here: {', '.join(legal)}."
    return f"{dotted(place.path)}: unknown key{at(place.path, document)}. {hint}"


def _elsewhere(key: str, around: str, root: type[Section]) -> list[str]:
    """The key of that name, or nearly, in another section: below the one it was written in, if it is there."""
    everywhere = [path for path, _, _ in leaves(root)]
    if f"{around}.{key}" in everywhere:  # a key of the same section with another `type`
        return []
    ordered = sorted(everywhere, key=lambda path: not path.startswith(f"{around}."))
    paths = {path.rpartition(".")[2]: path for path in reversed(ordered)}
    return [paths[name] for name in difflib.get_close_matches(key, list(paths), 1, cutoff=0.8)]


def _wrong_tag(place: Place, value: Any, document: Document) -> str:
    tags = list(union_sections(place.field.annotation)) if place.field else []
    path = (*place.path, "type")
    choices = f"one of: {', '.join(tags)}"
    if isinstance(value, Mapping) and "type" in value:
        return line(path, value["type"], f"must be {choices}", document, _nearest(value["type"], tags))
    return f"{dotted(path)}: is required, {choices}{at(path, document)}."


def _broken_rule(path: KeyPath, message: str, document: Document) -> str:
    """A rule over several keys: its place is that of the last of them that was written."""
    named = [key for key in document.origins if len(key) > len(path) and key[: len(path)] == path]
    mentioned = [key for key in named if dotted(key[len(path) :]) in message]
    at = document.origins[mentioned[-1]] if mentioned else document.origin(path)
    prefix = f"{dotted(path)}: " if path else ""
    return f"{prefix}{message}" + (f" ({at})." if at else ".")


def _reason(kind: str, context: Mapping[str, Any], place: Place, value: Any, otherwise: str) -> tuple[str, str]:
    """(what the value must be, what was probably meant or nothing)."""
    annotation = place.annotation
    bounds = {"greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge")}
    bounds |= {"less_than": ("below", "lt"), "less_than_equal": ("at most", "le")}
    if kind in bounds:
        words, key = bounds[kind]
        return f"must be {words} {context[key]:g}", _smaller(place, value, context.get("lt", context.get("le")))
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(without_none(annotation))]
        return f"must be one of: {', '.join(choices)}", _nearest(value, choices)
    if kind == "string_pattern_mismatch" and place.field and isinstance(place.field.json_schema_extra, dict):
        return f"must {place.field.json_schema_extra['must']}", ""
    if kind == "string_too_short":
        return "must not be empty", ""
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters", ""
    if kind == "finite_number":
        return "must be a finite number", ""
    if kind == "too_long":
        return f"must be {type_words(annotation)}", ""
    if kind == "list_type" and (items := _keys(get_args(annotation)[0])):
        return f"must be a list, each item a section with keys: {items}", ""
    if kind == "dict_type" and get_origin(annotation) is dict:
        return f"must be a section: {type_words(annotation)}", ""
    if kind.startswith(("model_", "dict_")):
        return f"must be a section, with keys below it: {_keys(annotation)}", ""
    if kind == "string_type" and annotation is str and isinstance(value, int | float):
        return "must be text", f'In quotes it is: "{value}".'
    if kind.endswith(("_type", "_parsing", "_from_float")):
        words = type_words(annotation)
        return f"must be {words if words.startswith(('one of', 'text', 'true', '[')) else f'a {words}'}", ""
    return otherwise, ""


def _keys(annotation: Any) -> str:
    """The keys of a section, or of a union by `type`; empty for anything else."""
    if section := section_of(annotation):
        return ", ".join(section.model_fields)
    tags = union_sections(annotation)
    return f"type ({', '.join(tags)}) and its own" if tags else ""


def _nearest(value: Any, choices: list[str]) -> str:
    near = difflib.get_close_matches(str(value).lower(), choices, 1)
    return f"Did you mean {near[0]}?" if near else ""


def _smaller(place: Place, value: Any, upper: float | None) -> str:
    """A mantissa without its exponent, or a percentage where a share is wanted."""
    if upper != 1 or not isinstance(value, int | float | str):
        return ""
    number = float(value)
    if place.path[-1] == "learning_rate":
        return f"Did you mean {number:g}e-6?" if number < 10 else ""
    is_share = bool(place.field and (place.field.description or "").startswith("Share"))
    return f"Did you mean {number / 100:g}?" if is_share and number <= 100 else ""
