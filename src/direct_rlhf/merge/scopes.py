"""What "the largest" ranges over: one tensor, or the whole model in a few passes and in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.deltas import Reader, pieces
from direct_rlhf.merge.selection import SCAN, Cut, Ranking, first_of, kept, trim
from direct_rlhf.merge.types import Block, Passes

ReadersOf = Callable[[Block, Any], Sequence[Reader]]  # of a tensor and its parameters


@dataclass(frozen=True)
class Stretch:
    """Elements [start, end) of a tensor, which start at ``flat`` in the scope, and every expert's reader."""

    flat: int
    start: int
    end: int
    readers: Sequence[Reader]


@dataclass(frozen=True)
class Scope:
    """A tensor or a model, in stretches, as often as asked for; of each the first 1 / share."""

    count: int  # elements
    stretches: Callable[[int], Iterator[Stretch]]


def tensor_scope(block: Block, readers: Sequence[Reader]) -> Scope:
    """One tensor."""

    def stretches(share: int) -> Iterator[Stretch]:
        for start, end in pieces(block.experts[0], size=SCAN):
            yield Stretch(start, start, first_of(start, end, share), readers)

    return Scope(block.experts[0].numel(), stretches)


def model_scope(passes: Passes, readers_of: ReadersOf) -> tuple[Scope, dict[str, int]]:
    """All tensors one after the other, and where each begins."""
    begins: dict[str, int] = {}
    count = 0
    for block, _ in passes():
        begins[block.name] = count
        count += block.experts[0].numel()

    def stretches(share: int) -> Iterator[Stretch]:
        for block, parameters in passes():
            for stretch in tensor_scope(block, readers_of(block, parameters)).stretches(share):
                yield Stretch(begins[block.name] + stretch.start, stretch.start, stretch.end, stretch.readers)

    return Scope(count, stretches), begins


def shared_setting(passes: Passes, *names: str) -> Any:
    """The parameters of a model's first tensor.

    Errors: MergeError if ``names``, where the scope is the model, are not the same in all tensors, or the scope itself.
    """
    first: Any = None
    for block, parameters in passes():
        first = first or parameters
        for name in names if parameters.scope == "global" else ("scope",):
            if getattr(parameters, name) != getattr(first, name):
                raise MergeError(
                    f"{block.name}: {name} differs from other tensors', but scope: global ranks the entries of all "
                    f"tensors together: give one {name}, or scope: tensor"
                )
    return first


def cuts(scope: Scope, densities: Sequence[float], at_cut: str) -> list[Cut]:
    """Where each expert's largest end."""
    return [cut(scope, expert, density, at_cut) for expert, density in enumerate(densities)]


def cut(scope: Scope, expert: int, density: float, at_cut: str) -> Cut:
    """Where an expert's largest end: after max(1, int(density n)) entries, or after all that equal the next one."""
    if at_cut == "all":
        return ranking(scope, expert).cut(int(density * scope.count) + 1, ties=False)
    return ranking(scope, expert).cut(kept(density, scope.count))


def ranking(scope: Scope, expert: int) -> Ranking:
    """The order of an expert's magnitudes."""

    def scan(share: int = 1) -> Iterator[tuple[int, Tensor]]:
        for stretch in scope.stretches(share):
            yield stretch.flat, stretch.readers[expert](stretch.start, stretch.end)

    return Ranking(scan, scope.count)


def trimmed(readers: Sequence[Reader], cuts: Sequence[Cut]) -> list[Reader]:
    """The readers with 0 for what the cuts do not keep."""
    return [_trimmed(read, cut) for read, cut in zip(readers, cuts, strict=True)]


def _trimmed(read: Reader, cut: Cut) -> Reader:
    return lambda start, end: trim(read(start, end), start, cut)
