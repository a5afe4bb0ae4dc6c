"""Reading the schema: which field a path leads to, and how a type reads in plain words."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from direct_rlhf.recipe.schema import Recipe, Section

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a path leads: ``owner`` is the section that holds its last key, ``field`` that key's field."""

    path: KeyPath  # without the tags that pydantic puts in for unions
    owner: type[Section] | None
    field: FieldInfo | None  # None: there is no such key
    annotation: Any  # the type at the path: that of the field, or of an item in it


def section_of(annotation: Any) -> type[Section] | None:
    """The section class that an annotation is, if it is one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def union_sections(annotation: Any) -> dict[str, type[Section]]:
    """The members of a union by `type`, tag by tag; empty for anything else."""
    members = [section_of(member) for member in get_args(annotation)]
    return {str(m.model_fields["type"].annotation.__args__[0]): m for m in members if m and "type" in m.model_fields}  # type: ignore[union-attr]


def locate(loc: KeyPath, root: type[Section] = Recipe) -> Place:
    """Follow a path of pydantic's through the section ``root``."""
    path: list[str | int] = []
    here: Any = root
    owner: type[Section] | None = None
    field: FieldInfo | None = None
    for part in loc:
        here = without_none(here)
        if section := section_of(here):
            owner, field = section, section.model_fields.get(str(part))
            here = field.annotation if field else None
            path.append(part)
        elif tagged := union_sections(here):
            here = tagged.get(str(part))
        elif get_origin(here) in (list, tuple) and isinstance(part, int):
            arguments = get_args(here)
            here = _bare(arguments[min(part, len(arguments) - 1)])
            path.append(part)
        elif get_origin(here) is dict:  # names that the user chooses
            here = _bare(get_args(here)[1])
            path.append(part)
        elif not _is_union(here):  # a plain union's tag is not part of the path
            path.append(part)
    return Place(tuple(path), owner, field, here)


def leaves(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[Section]]]:
    """Every key of a section and of the sections below: dotted path, field, and the class that holds it.

    Lists of sections appear with `N` for the index.
    """
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field, section
        for below in _sections_below(field.annotation):
            yield from leaves(below, f"{path}.N." if get_origin(field.annotation) is list else f"{path}.")


def type_words(annotation: Any) -> str:
    """A type as a user says it: `whole number`, `text`, `one of: a, b`, `list of text`."""
    annotation = _bare(annotation)
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if annotation in plain:
        return plain[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "one of: " + ", ".join(str(choice) for choice in arguments)
    if get_origin(annotation) is list:
        return f"list of {type_words(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"names, each with its {type_words(arguments[1])}"
    if get_origin(annotation) is tuple:
        return "[" + ", ".join(type_words(argument) for argument in arguments) + "]"
    if tagged := union_sections(annotation):
        return "section, by `type`: " + ", ".join(tagged)
    if _is_union(annotation):
        words = " or ".join(type_words(argument) for argument in arguments if argument is not type(None))
        return f"{words}, or null" if type(None) in arguments else words
    return "section"


def range_words(field: FieldInfo) -> str:
    """The bounds of a number: `above 0, at most 1`; empty if it has none."""
    words = {Gt: ("above", "gt"), Ge: ("at least", "ge"), Lt: ("below", "lt"), Le: ("at most", "le")}
    return ", ".join(
        f"{words[type(bound)][0]} {getattr(bound, words[type(bound)][1])}"
        for bound in field.metadata
        if type(bound) in words
    )


def is_number(annotation: Any) -> bool:
    """Whether a field takes a number (and so never true or false)."""
    return bool({int, float} & {annotation, *(get_args(annotation) if _is_union(annotation) else ())})


def _sections_below(annotation: Any) -> list[type[Section]]:
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    section = section_of(annotation)
    return [section] if section else list(union_sections(annotation).values())


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def without_none(annotation: Any) -> Any:
    """The type that an optional field has if it is given."""
    rest = [argument for argument in get_args(annotation) if argument is not type(None)]
    return rest[0] if _is_union(annotation) and len(rest) == 1 else annotation
