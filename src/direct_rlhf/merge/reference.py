"""Every merge method as one page: `python -m direct_rlhf.merge.reference > docs/reference/merge-methods.md`."""

import json
import sys
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from direct_rlhf.merge.laws import LAWS
from direct_rlhf.merge.methods import METHODS
from direct_rlhf.merge.types import Method
from direct_rlhf.recipe.fields import range_words, type_words
from direct_rlhf.recipe.merge_methods import OTHER_METHODS

HEAD = """# Merge methods

Made by `python -m direct_rlhf.merge.reference` from `src/direct_rlhf/merge/methods/` and
`src/direct_rlhf/recipe/merge_methods.py`; do not edit.

theta_0 is the base, theta_i are the experts, tau_i = theta_i - theta_0, T their number. All is computed in float32,
tensor by tensor, and cast once; results depend neither on shards nor on devices, threads or (but for SLERP) the order
of the experts. A parameter that every expert has for itself is one number for all, or one for each.

"""


def page() -> str:
    """The whole page, as Markdown."""
    return HEAD + "".join([*_laws(), *_other_names(), *(part for each in METHODS.values() for part in _method(each))])


def _laws() -> Iterator[str]:
    yield "## What each obeys\n\nEach `yes` is a property test, each `no` has a test with a counterexample.\n\n"
    yield "".join(f"- **{name}**: {words}.\n" for name, words in LAWS.items())
    yield f"\n| method | {' | '.join(LAWS)} | neutral settings |\n|---{'|---' * len(LAWS)}|---|\n"
    for method in METHODS.values():
        answers = " | ".join("yes" if law in method.obeys else "no" for law in LAWS)
        yield f"| `{method.name}` | {answers} | {_settings(method.neutral)} |\n"


def _other_names() -> Iterator[str]:
    yield "\n## Names of mergekit's\n\n| name | is |\n|---|---|\n"
    for name, other in OTHER_METHODS.items():
        yield f"| `{name}` | `{other.name}` with {_settings(other.settings)} |\n"


def _method(method: Method) -> Iterator[str]:
    fewest, most = method.experts
    number = f"{fewest}" if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
    base = "needs a base" if method.needs_base else "needs no base"
    chance = "; depends on a seed" if method.random else ""
    yield f"\n## `{method.name}`: {method.title}\n\nModels: {number}; {base}{chance}. Source: {method.source}.\n\n"
    yield f"```text\n{(sys.modules[method.merge.__module__].__doc__ or '').strip()}\n```\n\n"
    yield "| parameter | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in method.parameters.model_fields.items():
        others = [other for other, ours in method.parameters.other_names.items() if ours == name]
        shown = " or ".join(f"`{each}`" for each in [name, *others])
        meaning = " ".join((field.description or "").split())
        yield f"| {shown} | {_type(method, name, field)} | {_default(field)} | {meaning} |\n"
    for reference, settings in method.parameters.references.items():
        yield f"\n`reference: {reference}` sets {_settings(settings) if settings else 'nothing that differs'}.\n"


def _type(method: Method, name: str, field: FieldInfo) -> str:
    if name not in method.parameters.per_expert():
        bounds = range_words(field)
        return f"{type_words(field.annotation)}, {bounds}" if bounds else type_words(field.annotation)
    annotation = next(part for part in (field.annotation, *get_args(field.annotation)) if Ellipsis in get_args(part))
    limits = [option for option in get_args(get_args(annotation)[0]) if isinstance(option, FieldInfo)]
    words = ", ".join(["number, for each expert", *(range_words(limit) for limit in limits)])
    return f"{words}, or null" if type(None) in get_args(field.annotation) else words


def _default(field: FieldInfo) -> str:
    default = field.default
    return f"`{_plain(default)}`"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}: {_plain(value)}`" for name, value in settings.items())


def _plain(value: Any) -> str:
    """As a merge file has it."""
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(page(), end="")
