"""Several processes: where the models lie (FSDP2), and who computes what.

The batch of an optimiser step is the recipe's, however many processes there are. Its rows are dealt out by tokens; each
process sums its own rows' losses, divided by the tokens (or pairs) of the whole batch, and gradients and statistics are
summed over the processes. What needs no gradient each process computes by itself, on gathered weights.

With one process nothing is sharded and every share is the whole.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from direct_rlhf.models.batches import by_length
from direct_rlhf.models.forward import backbone
from direct_rlhf.models.packed import packs
from direct_rlhf.models.recompute import layers_of, recompute_layers
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.models.sharded import INSIDE
from direct_rlhf.recipe.schema import ParallelSection
from direct_rlhf.run.context import StageContext
from direct_rlhf.run.world import World

M = TypeVar("M", bound=nn.Module)

# (rows of a forward pass, whether they count), from the lengths of all rows, the rows to cut, and the slots of a pass
Cut = Callable[[Sequence[int], Sequence[int], int], Iterator[tuple[list[int], bool]]]


@dataclass(frozen=True)
class Layout:
    """Where the models of a stage lie."""

    world: World
    section: ParallelSection
    device: str
    dtype: str  # what is computed in

    @classmethod
    def of(cls, ctx: StageContext) -> "Layout":
        return cls(ctx.world, ctx.recipe.parallel, ctx.device, ctx.recipe.model.dtype)

    @property
    def loads_on(self) -> str:
        """Where a model is loaded, before it is put where it shall lie: a whole one need not fit on the device."""
        return self.device if self.world.size == 1 else "cpu"

    def trained(self, module: M) -> M:
        """A model that is trained, or a head of one, in place."""
        if self.section.activation_checkpointing:
            recompute_layers(module)
        return module if self.world.size == 1 else self._sharded(module)

    def frozen(self, module: M) -> M:
        """A model that is not trained, in place."""
        if self.world.size == 1:
            return module
        return self._sharded(module) if self.section.shard_frozen else module.to(self.device)

    @cached_property
    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        size, shared = self.world.size, self.section.shard_size or self.world.size
        kind = torch.device(self.device).type
        if shared == size:
            return init_device_mesh(kind, (size,))
        return init_device_mesh(kind, (size // shared, shared), mesh_dim_names=("copies", "shards"))

    def _sharded(self, module: M) -> M:
        """One group of weights for each layer, one for a scalar head, which stays in float32, and one for the rest."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        half = torch.bfloat16 if self.dtype == "bfloat16" and not isinstance(module, nn.Linear) else None
        computes = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)

        def shard(part: Any, policy: MixedPrecisionPolicy, *, keeps: bool) -> None:
            fully_shard(part, mesh=self._mesh, mp_policy=policy, reshard_after_forward=not keeps)
            part.set_gradient_divide_factor(1.0)  # gradients are summed: losses are divided by the whole batch
            part.set_force_sum_reduction_for_comms(True)
            setattr(part, INSIDE, lambda function, *arguments: function(*arguments))
            register_fsdp_forward_method(part, INSIDE)

        if not isinstance(module, nn.Linear):
            packs(backbone(module.trunk if isinstance(module, ScalarModel) else module))  # tried while it is whole
        for layer in layers_of(module):
            shard(layer, computes, keeps=not self.section.reshard_after_forward)
        if isinstance(module, ScalarModel):
            shard(module.head, MixedPrecisionPolicy(cast_forward_inputs=False), keeps=True)
        shard(module, computes, keeps=True)
        whole: Any = module
        getattr(whole, INSIDE)(lambda: None)  # FSDP takes the first module that runs for the outermost one
        whole.reshard()
        return module


def deal(lengths: Sequence[int], rows: Sequence[int], size: int) -> list[list[int]]:
    """``rows`` to ``size`` processes: the longest first, each to the one with the fewest tokens so far."""
    parts: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, part) for part in range(size)]
    for row in sorted(rows, key=lambda row: -lengths[row]):
        load, part = heapq.heappop(loads)
        parts[part].append(row)
        heapq.heappush(loads, (load + lengths[row], part))
    return parts


def everything(lengths: Sequence[int], rows: Sequence[int], slots: int) -> Iterator[tuple[list[int], bool]]:
    """The cut of one process."""
    return ((chunk, True) for chunk in by_length(lengths, rows, slots))


def to_train(world: World) -> Cut:
    """This process's share of a step. All processes get equally many passes, for each is one that they make together.

    Who has fewer repeats a short row first, whose loss must not count.
    """

    def cut(lengths: Sequence[int], rows: Sequence[int], slots: int) -> Iterator[tuple[list[int], bool]]:
        parts = [list(by_length(lengths, part, slots)) for part in deal(lengths, rows, world.size)]
        mine = parts[world.rank]
        stand_in = min(rows, key=lambda row: lengths[row])
        for _ in range(max(map(len, parts)) - len(mine)):
            yield [stand_in], False
        yield from ((chunk, True) for chunk in mine)

    return everything if world.size == 1 else cut


def to_measure(world: World) -> Cut:
    """This process's share of what is computed on gathered weights, each by itself."""

    def cut(lengths: Sequence[int], rows: Sequence[int], slots: int) -> Iterator[tuple[list[int], bool]]:
        return everything(lengths, deal(lengths, rows, world.size)[world.rank], slots)

    return everything if world.size == 1 else cut


def spread(world: World, lengths: Sequence[int], work: Callable[[list[int]], Tensor]) -> Tensor:
    """``work(rows)``, one result for each row, of all rows in order: each process computes its share, all get all.

    ``lengths`` are what the rows cost. Weights that are used must be gathered. An error or a stop in one process is one
    in all.
    """
    rows = list(range(len(lengths)))
    if world.size == 1 or not rows:
        return work(rows)
    mine = deal(lengths, rows, world.size)[world.rank]
    part = world.together(lambda: work(mine) if mine else None)
    shares = [share for share in world.gather({"rows": mine, "found": part}) if share["rows"]]
    found = torch.cat([share["found"] for share in shares])
    order = torch.tensor([row for share in shares for row in share["rows"]])
    return torch.empty_like(found).index_copy(0, order, found)
