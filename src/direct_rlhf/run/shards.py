"""The tensors of a checkpoint that several processes write: each its share, through torch's distributed checkpoint.

The files are safetensors (torch's storage for the Hugging Face format), so nothing in them is pickled; a header says
which part of its tensor each piece is. Any number of processes reads them.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Groups = Mapping[str, Mapping[str, Tensor]]

FILES = "shard-*.safetensors"  # torch's names for them


def is_shard(tensor: "Tensor") -> bool:
    """Whether a tensor is one process's part of a larger one (a DTensor)."""
    return hasattr(tensor, "to_local")


def local(tensor: "Tensor") -> "Tensor":
    """What of it this process holds."""
    part: Any = tensor
    return part.to_local() if is_shard(tensor) else tensor


def write(folder: Path, groups: "Groups", group: Any = None) -> None:
    """Every process writes its parts; tensors that all hold are written by one of them.

    All processes raise if one cannot write. ``group`` is the process group that they agree over.
    """
    from torch.distributed import checkpoint

    with _plain_errors():
        checkpoint.save(_flat(groups), storage_writer=_writer(folder), process_group=group)


class Later:
    """`write` in the background, from a copy made now. ``group`` is the process group's of this alone."""

    def __init__(self, folder: Path, groups: "Groups", group: Any) -> None:
        from torch.distributed import checkpoint

        with _plain_errors():
            self._future: Any = checkpoint.async_save(
                _flat(groups), storage_writer=_writer(folder), process_group=group
            )

    def done(self) -> bool:
        return bool(self._future.done())

    def result(self) -> None:
        """Waits for the end; raises what went wrong in one of the processes."""
        with _plain_errors():
            self._future.result()


def read(folder: Path, group: str, like: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """One group's tensors: parts as ``like`` has them under the same name, or whole ones on the CPU."""
    import torch
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    targets: dict[str, Any] = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        if name.startswith(f"{group}/"):
            model = like.get(name.removeprefix(f"{group}/"))
            if model is not None and is_shard(model):
                targets[name] = torch.empty_like(model.detach())
            else:
                targets[name] = torch.empty(facts.size, dtype=facts.properties.dtype)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one process reads what several wrote, which is meant
        checkpoint.load(targets, storage_reader=reader, no_dist=True)
    return {name.removeprefix(f"{group}/"): tensor for name, tensor in targets.items()}


def cut(whole: "Tensor", like: "Tensor") -> "Tensor":
    """This process's part of a whole tensor, cut as ``like`` is."""
    import torch

    part = whole
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(like.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            parts = part.chunk(mesh.size(axis), placement.dim)
            mine = mesh.get_local_rank(axis)
            part = parts[mine] if mine < len(parts) else part.narrow(placement.dim, 0, 0)
    found = torch.empty_like(like.detach())
    local(found).copy_(part)
    return found


def _flat(groups: "Groups") -> "dict[str, Any]":
    return {f"{group}/{name}": tensor.detach() for group, named in groups.items() for name, tensor in named.items()}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in a process, instead of torch's collection of it, which is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failures: dict[int, Any] = error.failures
        rank, (first, _) = min(failures.items(), key=lambda pair: pair[0])
        raise OSError(f"process {rank}: {first}") from first


def _writer(folder: Path) -> Any:
    from torch.distributed import checkpoint

    return checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
