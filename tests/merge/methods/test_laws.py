"""Each method obeys the laws that it says it does (M4), and each other law has a counterexample."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from
from torch import Tensor

from direct_rlhf.errors import ConfigError
from direct_rlhf.merge.laws import LAWS
from direct_rlhf.merge.methods import METHODS
from merge.methods.blocks import KEYS, merged, tensors, whole

SEEDS = integers(0, 9999)
SHAPES = [(6, 9), (9, 6), (7, 7), (12,), (1,), ()]
Check = Callable[[str, int, Sequence[int]], None]


class BrokenError(AssertionError):
    """A law did not hold."""


def alike(actual: Tensor, expected: Tensor) -> None:
    if not torch.allclose(actual, expected, rtol=1e-6, atol=1e-7 * (1 + float(expected.abs().max()))):
        raise BrokenError


def the_same_bits(actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual.view(torch.int64), expected.view(torch.int64)):
        raise BrokenError


def number(method: str) -> int:
    return METHODS[method].experts[1] or 3


def case(method: str, seed: int, shape: Sequence[int]) -> tuple[Tensor | None, list[Tensor], Callable[..., Tensor]]:
    """(base, differences, merge of differences): for methods on weights the base is 0."""
    base, *deltas = tensors(seed, 1 + number(method), shape)
    if not METHODS[method].needs_base:
        base = torch.zeros_like(base)

    def of(deltas: Sequence[Tensor], base: Tensor = base, **options: object) -> Tensor:
        return merged(method, base, [base + delta for delta in deltas], **options)

    return base, deltas, of


def order(method: str, seed: int, shape: Sequence[int]) -> None:
    base, *experts = tensors(seed, 1 + number(method), shape)
    parameters = METHODS[method].parameters.model_validate({"precision": "float64"})
    own = {
        name: tuple(0.3 + 0.1 * i for i in range(len(experts)))
        for name in parameters.per_expert() - {"epsilon", "trim"}
    }
    turned = torch.randperm(len(experts), generator=torch.Generator().manual_seed(seed)).tolist()
    if turned == sorted(turned):
        turned = turned[::-1]
    results = []
    for places in (range(len(experts)), turned):
        mine = parameters.model_copy(update={name: tuple(values[i] for i in places) for name, values in own.items()})
        block = whole(base, [experts[i] for i in places], [KEYS[i] for i in places])
        if METHODS[method].experts == (2, 2):
            mine = mine.model_copy(update={"t": 0.3})
        results.append(METHODS[method].merge(block, mine, None))
    the_same_bits(*results)


def base(method: str, seed: int, shape: Sequence[int]) -> None:
    draw = torch.Generator().manual_seed(seed)
    factor = torch.tensor([0.0, -0.0, 1, -1], dtype=torch.float64)[torch.randint(4, shape, generator=draw)]
    start = tensors(seed, 1, shape)[0] * factor
    the_same_bits(merged(method, start, [start.clone() for _ in range(number(method))]), start)


def zero(method: str, seed: int, shape: Sequence[int]) -> None:
    start, deltas, of = case(method, seed, shape)
    if {"scale", "weight"} - METHODS[method].parameters.model_fields.keys():
        raise BrokenError
    the_same_bits(of(deltas, scale=0.0), start)
    the_same_bits(of(deltas, weight=(0.0,)), start)


def shift(method: str, seed: int, shape: Sequence[int]) -> None:
    start, deltas, of = case(method, seed, shape)
    more = tensors(seed + 1, 1, shape)[0]
    alike(of(deltas, base=start + more), of(deltas) + more)


def one(method: str, seed: int, shape: Sequence[int]) -> None:
    start, expert = tensors(seed, 2, shape)
    try:
        alike(merged(method, start, [expert], **METHODS[method].neutral), expert)
    except ConfigError as error:
        raise BrokenError from error


def equal(method: str, seed: int, shape: Sequence[int]) -> None:
    start, expert = tensors(seed, 2, shape)
    copies = [expert.clone() for _ in range(number(method))]
    alike(merged(method, start, copies, **METHODS[method].neutral), expert)


def scaling(method: str, seed: int, shape: Sequence[int]) -> None:
    start, deltas, of = case(method, seed, shape)
    factor = (0.5, 3.0, 8.0)[seed % 3]
    alike(of([factor * delta for delta in deltas]) - start, factor * (of(deltas) - start))


def negation(method: str, seed: int, shape: Sequence[int]) -> None:
    start, deltas, of = case(method, seed, shape)
    alike(of([-delta for delta in deltas]) - start, start - of(deltas))


def linear(method: str, seed: int, shape: Sequence[int]) -> None:
    start, deltas, of = case(method, seed, shape)
    others = tensors(seed + 1, len(deltas), shape)
    both = of([x + 2 * y for x, y in zip(deltas, others, strict=True)]) - start
    alike(both, of(deltas) - start + 2 * (of(others) - start))


CHECKS: dict[str, Check] = {
    "order": order, "base": base, "zero": zero, "shift": shift, "one": one, "equal": equal,
    "scaling": scaling, "negation": negation, "linear": linear,
}  # fmt: skip
OBEYED = [(method.name, law) for method in METHODS.values() for law in sorted(method.obeys)]
NOT_OBEYED = [(method.name, law) for method in METHODS.values() for law in LAWS if law not in method.obeys]


def test_every_law_has_a_check():
    assert CHECKS.keys() == LAWS.keys()


@pytest.mark.promise("M4")
@pytest.mark.parametrize(("method", "law"), OBEYED)
@given(seed=SEEDS, shape=sampled_from(SHAPES))
@settings(max_examples=25)
def test_a_method_obeys_the_laws_that_it_says_it_does(method, law, seed, shape):
    CHECKS[law](method, seed, shape)


@pytest.mark.promise("M4")
@pytest.mark.parametrize(("method", "law"), NOT_OBEYED)
def test_a_law_that_a_method_does_not_obey_has_a_counterexample(method, law):
    assert any(breaks(law, method, seed) for seed in range(20))


def breaks(law: str, method: str, seed: int) -> bool:
    try:
        CHECKS[law](method, seed, (6, 9))
    except BrokenError:
        return True
    return False
