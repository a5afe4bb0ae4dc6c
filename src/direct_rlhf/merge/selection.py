"""Keeping the k largest magnitudes, exactly: of equal ones, those at the lower index.

Legend: n elements, R rows, C columns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

SCAN = 1 << 18  # elements a step of the search looks at: its histogram of 2^15 counts must be small beside them
DIGIT = 16  # bits found in one pass
LOWEST = -(1 << (DIGIT - 1))  # first digit of a negative number

SHARE = 16  # of each piece, one in so many elements is in the sample
MARGIN = 0.005  # of all elements: ranks that are looked at on either side of where the sample has the wanted one
FEW = 1 << 12  # elements that are looked at without a sample
MOST = 1 << 24  # elements that may be near: 12 bytes are held for each, twice while they are joined


class Scan(Protocol):
    """A tensor or a model, piece by piece, in order, as often as asked for."""

    def __call__(self, share: int = 1) -> Iterable[tuple[int, Tensor]]:
        """(flat start, piece); of each piece the first 1 / ``share``, rounded up."""


def first_of(start: int, end: int, share: int) -> int:
    """Where the first 1 / ``share`` of [start, end) ends."""
    return start - (start - end) // share


@dataclass(frozen=True)
class Cut:
    """Where "the k largest" end: larger magnitudes are kept, and of those equal to ``value`` what is before ``end``."""

    value: float  # the k-th largest magnitude; 0 keeps everything
    end: float  # flat index

    def after(self, count: int) -> "Cut":
        """The same cut for what starts ``count`` elements later."""
        return Cut(self.value, self.end - count)


EVERYTHING = Cut(0.0, inf)
NOTHING = Cut(inf, -inf)


def kept(density: float, count: int) -> int:
    """How many of ``count`` a density keeps: max(1, int(density count))."""
    return max(1, int(density * count))


class Ranking:
    """The exact order of a scan's values, or of their magnitudes, without sorting them.

    A sample says near which value the n-th largest is; one pass counts what is above and collects what is near, with
    its place. Where the answer is not among that (a sample that misleads, too much to hold, another device than the
    processor), a radix search finds it in memory of 2^16 counts: numbers are ordered as their bits are, so one
    histogram finds the first 16 bits, and one of the numbers that begin with these the next 16; two passes for float32,
    and part of a third where equal elements are divided.
    """

    def __init__(self, scan: Scan, count: int, *, signed: bool = False) -> None:
        self._scan, self._count, self._signed = scan, count, signed

    def cut(self, keep: int, *, ties: bool = True) -> Cut:
        """The cut that keeps the ``keep`` largest (and all that equal the last, without ``ties``).

        Cases:   keep >= count: everything; keep 0: nothing; NaN counts as the largest.
        """
        if keep >= self._count:
            return EVERYTHING
        if keep <= 0:
            return NOTHING
        found = self._nth(keep)
        value = _number(found.bits, self._kind[0])
        if not ties or found.wanted == found.equal:
            return Cut(value, inf)
        return Cut(value, found.end or _end_of(self._scan, value, found.wanted))

    def value(self, n: int) -> float:
        """The n-th largest value."""
        return _number(self._nth(n).bits, self._kind[0])

    def _nth(self, n: int) -> "_Found":
        return self._among_near(n) or self._by_digits(n)

    @cached_property
    def _kind(self) -> tuple[torch.dtype, torch.device]:
        first_n = next(iter(self._scan(SHARE)))[1]
        return first_n.dtype, first_n.device

    @property
    def _lowest(self) -> int:
        """The lowest first digit; magnitudes have half of them."""
        return LOWEST if self._signed else 0

    def _bits(self, share: int = 1) -> Iterator[Tensor]:
        return (_ordered_bits(piece_n, self._signed) for _, piece_n in self._scan(share))

    @property
    def _shift(self) -> int:
        """Bits after the first digit."""
        return _width(self._kind[0]) - DIGIT

    def _first_digits(self, share: int) -> Tensor:
        """How often each first digit occurs, from the lowest on."""
        digits = ((bits_n >> self._shift) - self._lowest for bits_n in self._bits(share))
        return _count(digits, (1 << DIGIT - 1) - self._lowest)

    @cached_property
    def _digits(self) -> Tensor:
        """Those of all elements: one pass, for all questions."""
        return self._first_digits(1)

    @cached_property
    def _sample(self) -> Tensor:
        """Of each first digit and all larger ones, how often they occur in the sample."""
        return self._first_digits(SHARE).flip(0).cumsum(0).flip(0)

    def _near(self, n: int) -> tuple[int, int] | None:
        """The bits between which the n-th largest is looked for; None if there are too many."""
        if 2 * MARGIN * self._count > MOST:
            return None
        lowest, highest = self._lowest, (1 << DIGIT - 1) - 1
        if self._count > FEW:
            at_least = self._sample
            size = int(at_least[0])
            rank, margin = n / self._count * size, MARGIN * size + 1.5 * size**0.5  # three standard deviations
            low = int(torch.count_nonzero(at_least >= rank + margin)) - 1
            high = int(torch.count_nonzero(at_least >= rank - margin))
            low, high = max(low, 0), min(high, len(at_least) - 1)
            above = int(at_least[high + 1]) if high + 1 < len(at_least) else 0
            if (int(at_least[low]) - above) * SHARE > MOST:
                return None
            lowest, highest = lowest + low, lowest + high
        return lowest << self._shift, (highest + 1 << self._shift) - 1

    def _among_near(self, n: int) -> "_Found | None":
        """The n-th largest, if it is among those of ``_near``."""
        near = self._near(n) if self._kind[1].type == "cpu" else None
        if near is None:
            return None
        collected: list[tuple[np.ndarray, np.ndarray]] = []
        above = held = 0
        for start, piece_n in self._scan():
            bits = _ordered_bits(piece_n, self._signed).numpy()
            above += int(np.count_nonzero(bits > near[1]))
            distance = (bits - bits.dtype.type(near[0])).view(f"u{bits.itemsize}")  # what is below is far above
            places = np.flatnonzero(distance <= near[1] - near[0])
            collected.append((bits[places], places + start))
            held += len(places)
            if held > 2 * MOST:
                return None
        wanted = n - above
        if not 0 < wanted <= held:
            return None
        bits, places = (np.concatenate(parts) for parts in zip(*collected, strict=True))
        nth = np.sort(bits)[held - wanted]  # six times as fast as np.partition where many are equal
        equal = places[bits == nth]
        wanted -= int(np.count_nonzero(bits > nth))
        return _Found(int(nth), wanted, len(equal), int(equal[wanted - 1]) + 1)

    def _by_digits(self, n: int) -> "_Found":
        """The n-th largest, one digit after the other."""
        prefix, wanted, equal = 0, n, 0
        for shift in range(self._shift, -1, -DIGIT):
            if shift == self._shift:
                counts, lowest = self._digits, self._lowest
            else:
                alike = (_beginning_with(bits_n, shift + DIGIT, prefix) for bits_n in self._bits())
                counts, lowest = _count(((bits_n >> shift) & ((1 << DIGIT) - 1) for bits_n in alike), 1 << DIGIT), 0
            above = counts.flip(0).cumsum(0)  # of each digit and all larger ones
            place = int(torch.searchsorted(above, wanted))
            digit = len(counts) - 1 - place
            equal = int(counts[digit])
            wanted -= int(above[place]) - equal
            prefix = prefix << DIGIT | (digit + lowest)
        return _Found(prefix, wanted, equal)


def trim(piece_n: Tensor, start: int, cut: Cut) -> Tensor:
    """``piece_n``, which starts at flat index ``start``, with 0 for what the cut does not keep."""
    if cut.value == 0:
        return piece_n
    if cut.value == inf:
        return torch.zeros_like(piece_n)
    below = float(torch.nextafter(torch.tensor(cut.value, dtype=piece_n.dtype), torch.tensor(0.0, dtype=piece_n.dtype)))
    if start + len(piece_n) <= cut.end:
        return hardshrink(piece_n, below)
    if start >= cut.end:
        return hardshrink(piece_n, cut.value)
    divided = int(cut.end) - start
    return torch.cat([hardshrink(piece_n[:divided], below), hardshrink(piece_n[divided:], cut.value)])


def band_in_rows(magnitude_RC: Tensor, skip: int, keep: int) -> Tensor:
    """bool [R, C]: of each row all but the ``skip`` largest, and of these the ``keep`` largest.

    Of equal entries the one at the lower column counts as larger.
    """
    if magnitude_RC.device.type != "cpu":
        return _band_by_sort(magnitude_RC, skip, keep)
    magnitude, columns = magnitude_RC.numpy(), magnitude_RC.shape[1]
    places = [columns - end for end in (skip, skip + keep) if 0 < end < columns]
    # A second place to partition at costs numpy more than a sort
    ordered = np.partition(magnitude, places[0], axis=1) if len(places) == 1 else np.sort(magnitude, axis=1)
    inner, outer = (_largest_in_rows(magnitude, ordered, end) for end in (skip, skip + keep))
    return torch.from_numpy(outer ^ inner)


def by_rank_in_rows(magnitude_RC: Tensor, value_C: Tensor) -> Tensor:
    """[R, C]: ``value_C[0]`` where each row is smallest, ``value_C[-1]`` where it is largest; of equal entries the
    lower column ranks higher."""
    packable = magnitude_RC.device.type == "cpu" and magnitude_RC.dtype == torch.float32
    order_RC = _order_packed(magnitude_RC) if packable else _order_by_sort(magnitude_RC).flip(1)
    return torch.empty_like(magnitude_RC).scatter_(1, order_RC, value_C.expand_as(magnitude_RC))


def _order_packed(magnitude_RC: Tensor) -> Tensor:
    """int64 [R, C]: the columns by rising magnitude; float32 on a processor.

    One number for magnitude and place sorts faster than an argsort (14 ns an element against 18), and has no ties.
    """
    columns = magnitude_RC.shape[1]
    packed = magnitude_RC.numpy().view(np.uint32).astype(np.uint64) << np.uint64(32)
    packed |= np.arange(columns - 1, -1, -1, dtype=np.uint64)
    packed.sort(axis=1)
    packed &= np.uint64(0xFFFFFFFF)
    return torch.from_numpy(packed.view(np.int64)).neg_().add_(columns - 1)


def _order_by_sort(magnitude_RC: Tensor) -> Tensor:
    """int64 [R, C]: the columns by falling magnitude, on any device."""
    return magnitude_RC.sort(dim=1, descending=True, stable=True).indices


def _band_by_sort(magnitude_RC: Tensor, skip: int, keep: int) -> Tensor:
    band_RK = _order_by_sort(magnitude_RC)[:, skip : skip + keep]
    return torch.zeros_like(magnitude_RC, dtype=torch.bool).scatter_(1, band_RK, True)


@dataclass(frozen=True)
class _Found:
    bits: int  # in order
    wanted: int  # how many elements equal to it are among the largest
    equal: int  # how many there are
    end: int | None = None  # flat index just after the last wanted one, if known


def _count(digits: Iterable[Tensor], span: int) -> Tensor:
    """How often each digit occurs; short pieces are counted together."""
    counts = torch.zeros(span, dtype=torch.int64)
    waiting: list[Tensor] = []
    for digits_n in digits:
        waiting.append(digits_n)
        if sum(map(len, waiting)) >= SCAN:
            counts += torch.bincount(torch.cat(waiting), minlength=span).cpu()
            waiting = []
    return counts + torch.bincount(torch.cat(waiting), minlength=span).cpu() if waiting else counts


def _width(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _ordered_bits(piece_n: Tensor, signed: bool) -> Tensor:
    """Integers in the order of the values, or of the magnitudes."""
    width = _width(piece_n.dtype)
    bits_n, no_sign = piece_n.view(torch.int64 if width == 64 else torch.int32), (1 << (width - 1)) - 1
    return bits_n ^ ((bits_n >> (width - 1)) & no_sign) if signed else bits_n & no_sign


def _number(bits: int, dtype: torch.dtype) -> float:
    """The number that has these ordered bits."""
    width = _width(dtype)
    own = bits ^ ((1 << (width - 1)) - 1) if bits < 0 else bits
    return float(torch.tensor(own, dtype=torch.int64 if width == 64 else torch.int32).view(dtype))


def _beginning_with(bits_n: Tensor, shift: int, prefix: int) -> Tensor:
    if bits_n.device.type == "cpu":
        bits = bits_n.numpy()
        return torch.from_numpy(bits[(bits >> shift) == prefix])
    return bits_n[(bits_n >> shift) == prefix]


def _end_of(scan: Scan, magnitude: float, count: int) -> int:
    """Flat index just after the ``count``-th element of this magnitude."""
    for start, piece_n in scan():
        places = np.flatnonzero(piece_n.abs().cpu().numpy() == magnitude)
        if len(places) >= count:
            return start + int(places[count - 1]) + 1
        count -= len(places)
    raise AssertionError("the pieces changed between two passes")


def _largest_in_rows(magnitude: np.ndarray, ordered: np.ndarray, keep: int) -> np.ndarray:
    """The ``keep`` largest of each row; ``ordered`` has the ``keep``-th largest in its place."""
    columns = magnitude.shape[1]
    if keep <= 0 or keep >= columns:
        return np.full(magnitude.shape, keep > 0)
    last_R1 = ordered[:, columns - keep, None]
    chosen = magnitude >= last_R1
    surplus_R = np.count_nonzero(chosen, axis=1) - keep
    if surplus_R.any():
        _drop_surplus(chosen, magnitude == last_R1, surplus_R)
    return chosen


def _drop_surplus(chosen: np.ndarray, equal: np.ndarray, surplus_R: np.ndarray) -> None:
    """Take the last ``surplus_R`` of each row's ``equal`` elements out of ``chosen``."""
    places = np.flatnonzero(equal)
    row = places // equal.shape[1]
    number_R = np.bincount(row, minlength=len(equal))
    nth = np.arange(len(places)) - (np.cumsum(number_R) - number_R)[row]  # which of its row's equal elements
    chosen.reshape(-1)[places[nth >= (number_R - surplus_R)[row]]] = False
