"""Tensors out of mapped checkpoints and into the files of the result."""

import math
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from direct_rlhf.merge.checkpoints import LowRank, TensorPlace
from direct_rlhf.merge.layout import Layout
from direct_rlhf.merge.plan import ModelTensor

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Mapped:
    """Checkpoint files in memory, as the system pages them in: nothing is copied, and what is done with can go."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[mmap.mmap, Tensor]] = {}
        self._lock = threading.Lock()

    def tensor(self, place: TensorPlace) -> Tensor:
        """The tensor at a place: a view of its file, not to be written to."""
        dtype = DTYPES[place.dtype]
        if place.start == place.end:
            return torch.empty(place.shape, dtype=dtype)
        bytes_n = self._file(place.file)[1][place.start : place.end]
        if place.start % dtype.itemsize:  # files of other writers need not be aligned
            bytes_n = bytes_n.clone()
        return bytes_n.view(dtype).reshape(place.shape)

    def let_go(self) -> None:
        """Gives all pages back to the system; what is read later comes in again, from its cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            with self._lock:
                files = list(self._files.values())
            for mapped, _ in files:
                mapped.madvise(mmap.MADV_DONTNEED)

    def _file(self, path: Path) -> tuple[mmap.mmap, Tensor]:
        with self._lock:
            if path not in self._files:
                with path.open("rb") as opened:
                    # private, so that torch may have a writable view of a file that is only read
                    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
                self._files[path] = mapped, torch.frombuffer(mapped, dtype=torch.uint8)
            return self._files[path]

    def read(self, tensor: ModelTensor) -> Tensor:
        """A model's tensor as it is stored, or in float32 with its adapter on it."""
        stored = self.tensor(tensor.place)
        return stored if tensor.low_rank is None else self._adapted(stored, tensor.low_rank)

    def _adapted(self, stored: Tensor, low_rank: LowRank) -> Tensor:
        """W + scale B A, the whole tensor at once, so that blocks and threads do not change its rounding."""
        update = self.tensor(low_rank.b).float() @ self.tensor(low_rank.a).float()
        return (update.T if low_rank.transposed else update).mul_(low_rank.scale).add_(stored)


class Output:
    """The files of the result, of full length from the start; tensors are written at their places in any order."""

    def __init__(self, folder: Path, layout: Layout, files: Mapping[str, int]) -> None:
        self.folder, self.layout, self._files = folder, layout, files

    @classmethod
    @contextmanager
    def create(cls, folder: Path, layout: Layout) -> Iterator["Output"]:
        """Makes the files; on leaving, without an error, the disk has them."""
        files: dict[str, int] = {}
        try:
            for name, shard in layout.shards.items():
                files[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                _reserve(files[name], shard.size)
                _write(files[name], memoryview(shard.header), 0)
            yield cls(folder, layout, files)
            for descriptor in files.values():
                os.fsync(descriptor)
        finally:
            for descriptor in files.values():
                os.close(descriptor)

    def write(self, name: str, first: int, tensor: Tensor) -> None:
        """Elements of a tensor, from its flat index ``first`` on, in the type that it is stored in."""
        if tensor.numel():
            file, start = self.layout.places[name]
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            _write(self._files[file], content.data, start + first * tensor.element_size())


def _reserve(descriptor: int, size: int) -> None:
    """Room on the disk, so that one that is full says so at the start."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _write(descriptor: int, content: memoryview, at: int) -> None:
    while content:  # pwrite() may take less than it is given
        written = os.pwrite(descriptor, content, at)
        content, at = content[written:], at + written


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every element is finite, and still is in ``dtype``."""
    if not tensor.numel():
        return True
    extremes = torch.stack(torch.aminmax(tensor)).to(dtype)  # NaN, too, comes through
    return all(map(math.isfinite, extremes.tolist()))
