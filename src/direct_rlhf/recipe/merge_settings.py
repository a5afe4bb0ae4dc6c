"""A parameter's value for each tensor: one number, a list over the layers, or values by tensor name.

    0.5                                             everywhere
    [0, 0.5, 1]                                     over the layers, interpolated linearly
    [{filter: mlp, value: [0, 1]}, {value: 0.5}]    the first whose filter is in the tensor's name (`*`, or none: any)

Shape and meaning are mergekit's: layer i of L lies at depth i/(L-1), a single layer at 1, and what belongs to no layer
(embeddings, final norm, head) at 0.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from direct_rlhf.recipe.fields import KeyPath

Scalar = bool | int | float | str | None
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Setting:
    """The cases of one parameter, in order: (filter, values over the layers)."""

    cases: tuple[tuple[str | None, tuple[Scalar, ...]], ...]

    def fits(self, tensor: str) -> bool:
        """Whether a filter fits a tensor."""
        return any(wanted in (None, "*") or wanted in tensor for wanted, _ in self.cases)

    def at(self, tensor: str, depth: float) -> Scalar:
        """The value for a tensor; None if no filter fits it (or if None is what the file says)."""
        for wanted, values in self.cases:
            if wanted in (None, "*") or wanted in tensor:
                return _between(values, depth)
        return None

    @property
    def everywhere(self) -> bool:
        """Whether it is one value for all tensors."""
        return len(self.cases) == 1 and self.cases[0][0] in (None, "*") and len(self.cases[0][1]) == 1


def _between(values: tuple[Scalar, ...], depth: float) -> Scalar:
    if len(values) == 1:
        return values[0]
    place = depth * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    share = place - low
    return (1 - share) * values[low] + share * values[low + 1]  # type: ignore[operator]  # lists hold numbers only


def layer_of(tensor: str) -> int | None:
    """The layer that a tensor belongs to, by the first number in its name."""
    found = _LAYER.search(tensor)
    return int(found[1]) if found else None


def depths(tensors: Iterable[str]) -> dict[str, float]:
    """The depth of each tensor of a model."""
    layers = {name: layer_of(name) for name in tensors}
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    return {name: 0.0 if layer is None else layer / last if last else 1.0 for name, layer in layers.items()}


@dataclass(frozen=True)
class Written:
    """A setting as a file gives it: its cases, the place of each value, and what is wrong with its shape."""

    setting: Setting
    values: tuple[tuple[KeyPath, Any], ...]
    problems: tuple[tuple[KeyPath, Any, str], ...]  # path, value, what it must be


def read_setting(value: Any, path: KeyPath) -> Written:
    """The setting that a file gives at ``path``."""
    cases: list[tuple[str | None, tuple[Scalar, ...]]] = []
    values: list[tuple[KeyPath, Any]] = []
    problems: list[tuple[KeyPath, Any, str]] = []
    for wanted, given, place in _cases(value, path, problems):
        listed = list(given) if isinstance(given, list) else [given]
        places = [(*place, index) for index in range(len(listed))] if isinstance(given, list) else [place]
        if not listed:
            problems.append((place, given, "must not be an empty list"))
        for where, one in zip(places, listed, strict=True):
            if len(listed) > 1 and (isinstance(one, bool) or not isinstance(one, int | float)):
                problems.append((where, one, "must be a number: a list goes over the layers"))
            elif isinstance(one, dict | list):
                problems.append((where, one, "must be one value, a list over the layers, or a list of {filter, value}"))
            else:
                values.append((where, one))
        cases.append((wanted, tuple(listed)))
    return Written(Setting(tuple(cases)), tuple(values), tuple(problems))


def _cases(
    value: Any, path: KeyPath, problems: list[tuple[KeyPath, Any, str]]
) -> Iterator[tuple[str | None, Any, KeyPath]]:
    """(filter, value, place of the value) of each case."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(case, dict) for case in value)
    if not is_list and not isinstance(value, dict):
        yield None, value, path
        return
    for case, here in [(case, (*path, i)) for i, case in enumerate(value)] if is_list else [(value, path)]:
        wanted = case.get("filter")
        if "value" not in case or not case.keys() <= {"filter", "value"}:
            problems.append((here, case, "must have a value, and perhaps a filter, and nothing else"))
        elif wanted is not None and (not isinstance(wanted, str) or not wanted):
            problems.append(((*here, "filter"), wanted, "must be text: a part of the names of tensors"))
        else:
            yield wanted, case["value"], (*here, "value")
