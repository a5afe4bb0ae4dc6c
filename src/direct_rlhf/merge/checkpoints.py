"""What a model folder holds, from its config and the headers of its files: names, types, shapes, places. No weight.

Only safetensors are read: an 8-byte length, a JSON header with the offsets of every tensor, then the bytes.
"""

import json
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from direct_rlhf.errors import MergeError
from direct_rlhf.run.atomic import read_json

FLOATS = {"F32": 4, "BF16": 2, "F16": 2}  # what is merged, with bytes an element
OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # counters and masks: copied
SIZES = FLOATS | OTHERS
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # by the names of merge files
LARGEST_HEADER = 100_000_000  # bytes, as the format has it
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a file."""

    file: Path
    dtype: str  # as the format writes it: F32, BF16, F16 ...
    shape: tuple[int, ...]
    start: int  # first byte, in the file
    end: int

    def rows(self, first: int, last: int) -> "TensorPlace":
        """Rows [first, last) of it."""
        row = (self.end - self.start) // self.shape[0] if self.shape[0] else 0
        start = self.start + first * row
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, end=start + (last - first) * row)


@dataclass(frozen=True)
class LowRank:
    """A LoRA update of a tensor: scale B A."""

    a: TensorPlace  # [rank, inputs]
    b: TensorPlace  # [outputs, rank]
    scale: float
    transposed: bool  # the tensor is [inputs, outputs], as GPT-2's layers and embeddings are


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, and an adapter on it."""

    ref: str  # as the merge file names it
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorPlace]
    commit: str | None = None  # of a hub model
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    adapter: Path | None = None

    @cached_property
    def is_tied(self) -> bool | None:
        """Whether head and embeddings are one tensor; None where the config does not say so."""
        said = self.config.get("tie_word_embeddings")
        return bool(said) if isinstance(said, bool) else None

    def without(self, names: AbstractSet[str]) -> "Checkpoint":
        """The model as if it did not store these tensors."""
        return replace(self, tensors={n: place for n, place in self.tensors.items() if n not in names})

    @property
    def tokenizer_folders(self) -> tuple[Path, ...]:
        """Where its tokenizer may be, the first that has one: an adapter may bring its own."""
        return (self.adapter, self.folder) if self.adapter else (self.folder,)


def read_config(folder: Path, ref: str) -> dict[str, Any]:
    """config.json. Errors: MergeError if it is not there, names no model, or is that of a quantised one."""
    if not (folder / "config.json").is_file():
        raise MergeError(f"{ref}: no model: {folder} has no config.json. Name a model's folder.")
    config = _json(folder / "config.json", ref)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise MergeError(
            f"{ref}: {folder / 'config.json'} names no model_type. It must be that of a transformers model."
        )
    if config.get("quantization_config"):
        raise MergeError(f"{ref}: it is quantised (quantization_config). Merge the model it was made from.")
    return config


def read_tensors(folder: Path, ref: str) -> dict[str, TensorPlace]:
    """The places of all tensors of a model, whatever its shards.

    Errors: MergeError if there are no safetensors, a file of the index is missing or cut, or a type is not known.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = _json(index, ref).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MergeError(f"{ref}: {index} has no weight_map. Fetch the model again.")
        files = sorted(set(map(str, weight_map.values())))
    elif (folder / "model.safetensors").is_file():
        weight_map, files = None, ["model.safetensors"]
    else:
        raise MergeError(_no_safetensors(folder, ref))
    found: dict[str, TensorPlace] = {}
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise MergeError(
                f"{ref}: {index} names {name!r}, which is no safetensors file of this folder. It is not read."
            )
        if not (folder / name).is_file():
            raise MergeError(f"{ref}: {name} is missing in {folder}, though its index names it. Fetch the model again.")
        found |= read_header(folder / name, ref)
    if weight_map is not None and (lost := weight_map.keys() - found.keys()):
        raise MergeError(f"{ref}: {min(lost)} is in the index but in no file of {folder}. Fetch the model again.")
    return found


def _no_safetensors(folder: Path, ref: str) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{ref}: its weights are {pickles[0]}, a pickle, which can run code and is not read. Convert it: load the "
            "model with transformers and save_pretrained it, or fetch a revision with safetensors."
        )
    return f"{ref}: no weights in {folder} (looked for model.safetensors and {INDEX})."


def read_header(file: Path, ref: str) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file. Errors: MergeError, with the file, if it is cut or damaged."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, LARGEST_HEADER))
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise _damaged(file, ref) from error
    places = places_in(file, entries, 8 + length, ref)
    if max((place.end for place in places.values()), default=0) > size:
        raise _damaged(file, ref)
    return places


def places_in(file: Path, header: Any, data: int, ref: str) -> dict[str, TensorPlace]:
    """The tensors of a file by its header; ``data`` is where its bytes begin. Errors: as ``read_header``."""
    found = {}
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in entries.items():
            start, end = map(int, entry["data_offsets"])
            found[name] = TensorPlace(file, entry["dtype"], tuple(map(int, entry["shape"])), data + start, data + end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, ref) from error
    for name, place in found.items():
        if place.dtype not in SIZES:
            raise MergeError(
                f"{ref}: {name} is stored as {place.dtype}. Merged are F32, BF16 and F16: convert the model first."
            )
        if place.start < data or place.end - place.start != math.prod(place.shape) * SIZES[place.dtype]:
            raise _damaged(file, ref)
    return found


def _damaged(file: Path, ref: str) -> MergeError:
    return MergeError(f"{ref}: {file} is damaged or cut off. Fetch it again.")


def _json(path: Path, ref: str) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:  # DataError is a ValueError
        raise MergeError(f"{ref}: {path} cannot be read ({error}). Fetch it again.") from error
