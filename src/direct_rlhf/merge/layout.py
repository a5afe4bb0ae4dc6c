"""Where each tensor of the result lies: shards, headers and offsets, known before a byte is written."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from direct_rlhf.merge.checkpoints import SIZES

ALIGNMENT = 8  # bytes: of the header, as the format's own writer has it


@dataclass(frozen=True)
class Stored:
    """A tensor of the result."""

    name: str
    dtype: str  # as the format writes it
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """A file of the result."""

    header: bytes  # with the length before it
    size: int  # of the whole file


@dataclass(frozen=True)
class Layout:
    """All files of weights, and the place of each tensor."""

    shards: Mapping[str, Shard]  # by file name
    places: Mapping[str, tuple[str, int]]  # tensor -> (file name, first byte)
    n_parameters: int

    @property
    def n_bytes(self) -> int:
        return sum(shard.size for shard in self.shards.values())

    @property
    def index(self) -> dict[str, object] | None:
        """The content of the index; None where there is one file."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: file for name, (file, _) in sorted(self.places.items())}
        total = sum(shard.size - len(shard.header) for shard in self.shards.values())
        return {"metadata": {"total_parameters": self.n_parameters, "total_size": total}, "weight_map": weight_map}


def lay_out(tensors: Iterable[Stored], shard_bytes: int) -> Layout:
    """Tensors in order, a new file where the next would make one larger than ``shard_bytes`` (a tensor is never cut).

    Within a file the widest types come first, so that every tensor is aligned.
    """
    groups: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.n_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.n_bytes
    shards: dict[str, Shard] = {}
    places: dict[str, tuple[str, int]] = {}
    for number, group in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards[file] = _shard(file, sorted(group, key=lambda tensor: -SIZES[tensor.dtype]), places)
    return Layout(shards, places, sum(math.prod(tensor.shape) for group in groups for tensor in group))


def _shard(file: str, tensors: list[Stored], places: dict[str, tuple[str, int]]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for tensor in tensors:
        starts[tensor.name] = end
        end += tensor.n_bytes
        offsets = [starts[tensor.name], end]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places.update({name: (file, len(header) + start) for name, start in starts.items()})
    return Shard(header, len(header) + end)
