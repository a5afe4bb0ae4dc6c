"""What the executor hands a merge method, and what a method says of itself.

A model is merged tensor by tensor. A method sees one tensor of every model at a time, or a block of its rows, as the
checkpoints hold them (float32, bfloat16 or float16), and returns the merged block in float32 (float64 if its parameters
ask for that precision); the executor casts once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from direct_rlhf.recipe.merge_methods import MethodParameters


class Grain(Enum):
    """The smallest piece of a tensor that a method can merge by itself."""

    ELEMENT = "element"  # any block of the flattened tensor
    ROW = "row"  # any block of whole rows (all of the last dimension)
    TENSOR = "tensor"  # the tensor as a whole


@dataclass(frozen=True)
class Block:
    """One tensor of every model, or a part of it.

    ``base`` and ``experts`` have one shape: [n] for ELEMENT (flattened), [rows, columns] for ROW (a vector is one
    row), the tensor's own for TENSOR.
    """

    name: str  # of the tensor, in the output
    base: Tensor | None  # None where the method needs none and the file names none
    experts: tuple[Tensor, ...]
    keys: tuple[str, ...]  # of the experts: what their random masks are drawn by; equal whatever the order
    shape: tuple[int, ...]  # of the whole tensor
    start: int = 0  # flat index of the first element within the whole tensor
    notes: dict[str, float] = field(default_factory=dict)  # `merge` puts here what a card should report of this tensor

    @property
    def is_matrix(self) -> bool:
        """Whether matrix methods treat it as one: two dimensions, and neither bias nor embedding nor head."""
        return len(self.shape) == 2 and not self.is_lookup

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of matrices, one for each expert of a mixture-of-experts layer."""
        return len(self.shape) == 3 and "expert" in self.name and not self.is_lookup

    @property
    def is_lookup(self) -> bool:
        """Whether it is a bias, an embedding or a head by its name."""
        return self.name.endswith("bias") or any(part in self.name for part in ("embed", "lm_head", "wte", "wpe"))


# The whole model, as often as asked for: every tensor as one block, with its parameters
Passes = Callable[[], Iterator[tuple[Block, Any]]]


@dataclass(frozen=True)
class Method:
    """A merge method: one small file each in `merge/methods/`, collected in `METHODS`."""

    name: str  # as in the merge file
    title: str  # as in tables
    source: str  # paper or convention
    parameters: type[MethodParameters]
    grain: Callable[[Any], Grain]  # of the parameters: a scope or an option may change it
    merge: Callable[[Block, Any, "Survey | None"], Tensor]  # block, parameters of this tensor -> block's shape
    obeys: frozenset[str]  # laws of `merge/laws.py`
    neutral: dict[str, Any] = field(default_factory=dict)  # settings under which `one` and `equal` are meant
    needs_base: bool = True
    experts: tuple[int, int | None] = (1, None)  # fewest and most
    random: bool = False  # its result depends on the seed
    # For options that need to see the whole model before the first tensor is merged (`scope: global`): a few passes
    # over all tensors, in memory bounded by a tensor of each model, give what `merge` is then handed. None: not needed.
    survey: Callable[[Passes], "Survey | None"] | None = None


@dataclass(frozen=True)
class Survey:
    """What a look over the whole model found, by name."""

    facts: dict[str, Any]
