"""Nested values as named tensors and something JSON can hold, and back: no pickle."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from direct_rlhf.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def pack(nested: Any) -> "tuple[dict[str, Tensor], Any]":
    """Splits nested dicts, lists, tuples and plain values into named tensors and something JSON can hold.

    ``unpack(*pack(x))`` equals ``x`` exactly: key types, tuples, None, bools, every bit of floats and tensors. Plain
    JSON values stay as they are. Tensors are named after their place (``state/0/exp_avg``).
    Errors: CheckpointError, with the place, for NaN and for other types.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(nested, (), tensors)


def unpack(tensors: "Mapping[str, Tensor]", packed: Any) -> Any:
    """The inverse of ``pack``."""
    if isinstance(packed, list):
        return [unpack(tensors, value) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if "$tensor" in packed:
        return tensors[packed["$tensor"]]
    if "$tuple" in packed:
        return tuple(unpack(tensors, value) for value in packed["$tuple"])
    if "$dict" in packed:
        return {unpack(tensors, key): unpack(tensors, value) for key, value in packed["$dict"]}
    if "$float" in packed:
        return float(packed["$float"])
    return {key: unpack(tensors, value) for key, value in packed.items()}


def _encode(value: Any, place: tuple[str, ...], tensors: "dict[str, Tensor]") -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise CheckpointError(f"state: {'/'.join(place)} is NaN and is not saved")
        return {"$float": repr(float(value))} if math.isinf(value) else float(value)
    if isinstance(value, (list, tuple)):
        parts = [_encode(part, (*place, str(i)), tensors) for i, part in enumerate(value)]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(part, (*place, key), tensors) for key, part in value.items()}
        pairs = value.items()
        return {"$dict": [[_encode(k, place, {}), _encode(part, (*place, str(k)), tensors)] for k, part in pairs]}
    from torch import Tensor  # late: a state without tensors needs no torch

    if isinstance(value, Tensor):
        name = "/".join(place) or "value"
        while name in tensors:  # the keys 0 and "0" share a place
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    raise CheckpointError(f"state: {'/'.join(place)} is a {type(value).__name__}, which cannot be stored")
