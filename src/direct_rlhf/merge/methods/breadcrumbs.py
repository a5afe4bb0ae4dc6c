"""Model Breadcrumbs: remove the outliers and the small change.

    of a row of n the int(gamma n) largest magnitudes are removed, the next max(1, int(beta n)) kept, the rest removed
    theta = theta_0 + alpha sum_i w_i tau^_i

A row is the last dimension; ties go to the lower index, which counts as larger. Where gamma and beta leave less than
int(beta n) entries, fewer are kept.

Defaults:   by row, alpha .4, beta .2, gamma .1 (the original's), sum, w 1. `elect` elects signs, as mergekit's
            breadcrumbs_ties.
References: original: these; mergekit: over the whole tensor, beta before gamma where both do not fit, beta 1 removes
            nothing, + where entries cancel. (Older mergekit removed everything at int(gamma n) = 0; not followed.)
Obeys:      order; experts equal to the base; alpha 0 or weights 0 give the base; adding X everywhere adds X; exact
            counts; gamma 0, beta 1 is task arithmetic; tau -> c tau scales the change (c > 0), tau -> -tau negates it.
Does not:   equal models (what is removed is lost); linear in the differences.
Source:     Davari and Belilovsky, arXiv 2312.06795.
"""

from torch import Tensor

from direct_rlhf.merge.consensus import merge_elected
from direct_rlhf.merge.deltas import Reader, computing, deltas, onto_base_summed, row_length
from direct_rlhf.merge.laws import HOMOGENEOUS
from direct_rlhf.merge.scopes import ranking, tensor_scope
from direct_rlhf.merge.selection import band_in_rows, kept, trim
from direct_rlhf.merge.types import Block, Grain, Method, Survey
from direct_rlhf.recipe.merge_methods import BreadcrumbsParameters


def merge(block: Block, parameters: BreadcrumbsParameters, survey: Survey | None = None) -> Tensor:
    readers = [
        _reader(read, block, expert, parameters) for expert, read in enumerate(deltas(block, computing(parameters)))
    ]
    row = row_length(block) if parameters.scope == "row" else 1
    if parameters.elect:
        return merge_elected(block, readers, parameters, row=row)
    return onto_base_summed(block, readers, parameters, mean=parameters.merge == "mean", row=row)


def counts(count: int, beta: float, gamma: float, *, beta_first: bool = False) -> tuple[int, int]:
    """How many of ``count`` are removed as outliers, and how many are kept after them."""
    outliers, keep = int(gamma * count), kept(beta, count)
    if beta_first:
        return (0 if keep == count else min(outliers, count - keep)), keep
    return outliers, min(keep, count - outliers)


def _reader(read: Reader, block: Block, expert: int, parameters: BreadcrumbsParameters) -> Reader:
    beta, gamma = (parameters.of(name, len(block.experts))[expert] for name in ("density", "gamma"))
    beta_first = parameters.reference == "mergekit"
    if parameters.scope == "row":
        row = row_length(block)
        return _by_row(read, row, *counts(row, beta, gamma, beta_first=beta_first))
    scope = tensor_scope(block, [read])
    outliers, keep = counts(scope.count, beta, gamma, beta_first=beta_first)
    order = ranking(scope, 0)
    outer, inner = order.cut(outliers + keep), order.cut(outliers)

    def in_band(start: int, end: int) -> Tensor:
        piece_n = read(start, end)
        return trim(piece_n, start, outer) - trim(piece_n, start, inner)

    return in_band


def _by_row(read: Reader, row: int, outliers: int, keep: int) -> Reader:
    def in_band(start: int, end: int) -> Tensor:
        piece_n = read(start, end)
        return piece_n.mul_(band_in_rows(piece_n.abs().view(-1, row), outliers, keep).view(-1))

    return in_band


def _grain(parameters: BreadcrumbsParameters) -> Grain:
    whole = parameters.scope == "tensor" or (parameters.elect and parameters.zero_sign == "majority")
    return Grain.TENSOR if whole else Grain.ROW


METHOD = Method(
    name="breadcrumbs",
    title="Model Breadcrumbs",
    source="arXiv 2312.06795",
    parameters=BreadcrumbsParameters,
    grain=_grain,
    merge=merge,
    obeys=HOMOGENEOUS | {"one", "equal"},
    neutral={"density": 1.0, "gamma": 0.0, "scale": 1.0, "merge": "mean"},
)
