"""Every merge method by its name in a merge file."""

from collections.abc import Iterator
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor

from direct_rlhf.merge.methods import (
    breadcrumbs,
    consensus_ta,
    dare,
    della,
    iso,
    linear,
    model_stock,
    pcb,
    r_tsvm,
    slerp,
    task_arithmetic,
    ties,
    tsv_m,
    wudi,
)
from direct_rlhf.merge.types import Block, Method, Passes, Survey


def in_order_of_keys(block: Block, parameters: Any) -> tuple[Block, Any]:
    """Experts, and what the parameters have for each, sorted by key.

    Sums of floats depend on their order, and a sum that is 0 in one order may be 1e-9 in another and elect a sign.
    """
    order = sorted(range(len(block.keys)), key=lambda i: block.keys[i])
    if order == list(range(len(order))):
        return block, parameters
    own = {
        name: tuple(values[i] for i in order)
        for name in parameters.per_expert()
        if (values := getattr(parameters, name)) is not None and len(values) == len(order)
    }
    experts, keys = tuple(block.experts[i] for i in order), tuple(block.keys[i] for i in order)
    return replace(block, experts=experts, keys=keys), parameters.model_copy(update=own)


def _without_order(method: Method) -> Method:
    """The method made independent of the order of the experts, to the last bit."""

    @wraps(method.merge)
    def merge(block: Block, parameters: Any, survey: Survey | None = None) -> Tensor:
        return method.merge(*in_order_of_keys(block, parameters), survey)

    def survey(passes: Passes) -> Survey | None:
        def sorted_passes() -> Iterator[tuple[Block, Any]]:
            return (in_order_of_keys(block, parameters) for block, parameters in passes())

        return method.survey(sorted_passes) if method.survey else None

    return replace(method, merge=merge, survey=survey if method.survey else None)


_SYMMETRIC = [
    linear.METHOD,
    task_arithmetic.METHOD,
    ties.METHOD,
    dare.LINEAR,
    dare.TIES,
    della.METHOD,
    breadcrumbs.METHOD,
    model_stock.METHOD,
    consensus_ta.METHOD,
    pcb.METHOD,
    tsv_m.METHOD,
    iso.COMMON,
    iso.COMMON_AND_SPECIFIC,
    wudi.METHOD,
    r_tsvm.METHOD,
]
METHODS: dict[str, Method] = {method.name: method for method in [*map(_without_order, _SYMMETRIC), slerp.METHOD]}
