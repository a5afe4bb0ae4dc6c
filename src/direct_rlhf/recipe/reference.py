"""Every key of the recipe as one page: `python -m direct_rlhf.recipe.reference > docs/reference/recipe.md`."""

import json
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from direct_rlhf.recipe.fields import range_words, section_of, type_words, union_sections
from direct_rlhf.recipe.schema import Recipe, Section

HEAD = """# The recipe

Made by `python -m direct_rlhf.recipe.reference` from `src/direct_rlhf/recipe/schema.py`; do not edit.

A recipe is YAML. Every key has a default unless it says *required*; an unknown key is an error. `extends: NAME-or-file`
merges a recipe over a shipped one or another file: sections key by key, lists whole; `name` and `description` are not
taken over. On the command line `a.b=c` sets a key after that, `data.preferences.0.weight=2` an item of a list.
Relative paths start from the folder of the recipe, then from the working folder; those of a shipped recipe from the
working folder. Numbers may be written `1e-5`; `null` is "not set".
"""


def page() -> str:
    """The whole page, as Markdown."""
    return HEAD + "".join(_section("", Recipe, Recipe(), "The top level"))


def _section(path: str, section: type[Section], defaults: Section | None, heading: str) -> Iterator[str]:
    """One table, then those of the sections below. ``defaults`` are this place's own, if the whole section has any."""
    yield f"\n## {heading}\n\n" + (f"{cell(section.__doc__)}\n\n" if _own_doc(section) else "")
    yield "| key | type | default | meaning |\n|---|---|---|---|\n"
    below: list[Iterator[str]] = []
    for name, field in section.model_fields.items():
        default = getattr(defaults, name) if defaults else field.default
        yield f"| `{path}{name}` | {type_cell(field)} | {default_cell(field, default)} | {cell(field.description)} |\n"
        below += _below(f"{path}{name}", field, default)
    for part in below:
        yield from part


def _below(path: str, field: FieldInfo, default: Any) -> list[Iterator[str]]:
    if section := section_of(field.annotation):
        return [_section(f"{path}.", section, default, f"`{path}`")]
    if get_origin(field.annotation) is list and (item := section_of(get_args(field.annotation)[0])):
        return (
            []
            if path.endswith((".prompts", ".text"))
            else [_section("", item, None, f"A source, in `{path}` and the like")]
        )
    return [
        _section(f"{path}.", member, None, f"`{path}` with `type: {tag}`")
        for tag, member in union_sections(field.annotation).items()
    ]


def _own_doc(section: type[Section]) -> bool:
    return bool(section.__doc__) and section.__doc__ != Section.__doc__


def type_cell(field: FieldInfo) -> str:
    """What a key takes, in words."""
    words = "list of sources" if "DataSource" in str(field.annotation) else type_words(field.annotation)
    bounds = range_words(field)
    return cell(f"{words}, {bounds}" if bounds else words)


def default_cell(field: FieldInfo, default: Any) -> str:
    """What it is if nothing is given."""
    if field.is_required():
        return "*required*"
    if isinstance(default, Section):
        return "see below"
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def cell(text: str | None) -> str:
    """A text in one line of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
