"""Every key of a merge file as one page: `python -m direct_rlhf.recipe.merge_reference > docs/reference/merge.md`."""

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from direct_rlhf.recipe.fields import range_words, type_words, without_none
from direct_rlhf.recipe.merge_file import MergeFile, ModelEntry
from direct_rlhf.recipe.merge_methods import OTHER_METHODS, PARAMETERS, MethodParameters
from direct_rlhf.recipe.reference import cell, default_cell, type_cell
from direct_rlhf.recipe.schema import Section

HEAD = """# The merge file

Made by `python -m direct_rlhf.recipe.merge_reference` from `src/direct_rlhf/recipe/merge_file.py` and
`merge_methods.py`; do not edit. How to write one: [merge models](../how-to/merge.md).

An unknown key is an error. A parameter is one value, a list over the layers, or a list of `{filter, value}`. What can
be given for each model stands in its own `parameters`, and for all of them in those of the file.
"""
OWN = {"models": "list of models", "slices": "list of slices", "parameters": "section"}


def page() -> str:
    """The whole page, as Markdown."""
    return HEAD + "".join(_tables())


def _tables() -> Iterator[str]:
    yield from _table("The file", MergeFile)
    yield from _table("A model", ModelEntry)
    for name, parameters in PARAMETERS.items():
        yield from _method(name, parameters)
    yield "\n## Other names of methods\n\n"
    for name, other in OTHER_METHODS.items():
        settings = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in other.settings.items())
        yield f"- `{name}` is `{other.name}` with {settings}\n"


def _table(heading: str, section: type[Section]) -> Iterator[str]:
    yield f"\n## {heading}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in section.model_fields.items():
        default = "" if name in OWN else default_cell(field, field.default)
        yield f"| `{name}` | {OWN.get(name) or type_cell(field)} | {default} | {cell(field.description)} |\n"


def _method(name: str, parameters: type[MethodParameters]) -> Iterator[str]:
    fewest, most = parameters.experts
    number = f"at least {fewest}" if most is None else str(fewest)
    base = "" if parameters.needs_base else "; base_model is not needed"
    yield f"\n## `{name}`\n\nModels: {number}{base}.\n\n"
    yield "| parameter | type | default | other names | meaning |\n|---|---|---|---|---|\n"
    for key, field in parameters.model_fields.items():
        others = [f"`{other}`" for other, ours in parameters.other_names.items() if ours == key]
        each = key in parameters.per_expert()
        kind = _each(field) if each else type_cell(field)
        default = _plain(field.default) if each else default_cell(field, field.default)
        yield f"| `{key}` | {kind} | {default} | {', '.join(others)} | {cell(field.description)} |\n"


def _each(field: FieldInfo) -> str:
    """The type of a parameter with a number for each model."""
    item = get_args(without_none(field.annotation))[0]
    bounds = range_words(FieldInfo.from_annotation(item))
    return ", ".join([f"{type_words(item)} for each model", *([bounds] if bounds else [])])


def _plain(default: Any) -> str:
    return "`null`" if default is None else f"`{json.dumps(default[0])}`"


if __name__ == "__main__":
    print(page(), end="")
