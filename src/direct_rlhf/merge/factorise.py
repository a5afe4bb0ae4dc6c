"""Singular values and vectors of differences, as exact as a float32 SVD or more so, mostly by matrix products.

Legend: M x N a matrix, R = min(M, N), K directions taken, L columns of a sketch, eps = 2^-23.

`exact` is LAPACK's SVD in the computing type. `auto` (float32 only) takes what follows and returns what `exact` does up
to the stated bounds:

* **Gram matrix** A^T A (or A A^T), in float64. It squares the condition number, but float64 has more than twice the
  digits of float32: a computed singular value is off by at most about R 2^-52 s_1^2 / s_i, and the vectors that are
  formed as A v / s are orthonormal to about R 2^-52 (s_1 / s_i)^2. Directions below the rank tolerance max(M, N) eps
  s_1 are never used, so both stay below 1e-5, and far below what float32 itself costs. Without `rank_cap` nothing
  bounds s_1 / s_i, so then it is not used.
* **Block power iteration** with Rayleigh-Ritz, for low rank (LoRA): only if the directions above the tolerance are few
  and each has converged, |A v - s u| <= 1e-7 s_1; given up for the Gram matrix otherwise.

Seconds measured on one core (EPYC 9004, MKL: 92 GFLOP/s in float32 products, 47 in float64), a third of the directions
taken, rank 16 for the power iteration:

                    1024 x 1024    4096 x 1024    2048 x 2048
    LAPACK, float32     .34            .68            2.3
    Gram matrix         .30            .45            2.2         of which the eigensolver .23, .23 and 1.8
    power iteration     .017           .06            .06

So products are most of the time only for oblong and for low-rank matrices; the eigensolver runs at 40 GFLOP/s (9 n^3),
85 % of the float64 product. Float64 is slow on accelerators that are not made for it: `svd: exact` then.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from direct_rlhf.randomness import generator

PANEL = 1024  # rows converted to float64 at a time
SKETCH, SPARE = 80, 16  # columns of the power iteration, and how many of them must stay below the tolerance
ROUNDS = 8
CONVERGED = 1e-7


@dataclass(frozen=True)
class Stored:
    """How a type stores a number."""

    digits: int  # binary, after the first
    integers: torch.dtype  # of the same width
    exponent: int  # the bits of the exponent


STORED = {
    torch.bfloat16: Stored(7, torch.int16, 0x7F80),
    torch.float16: Stored(10, torch.int16, 0x7C00),
    torch.float32: Stored(23, torch.int32, 0x7F800000),
}


@dataclass(frozen=True)
class Factors:
    """Leading directions of a matrix, sum_k s_k u_k v_k^T, the largest first."""

    u_MK: Tensor
    s_K: Tensor
    v_NK: Tensor


@dataclass(frozen=True)
class Spectrum:
    """Singular values, how many count, and their vectors on demand."""

    s_K: Tensor  # float64, the largest first; all R, or those that a sketch found
    rank: int  # directions above the tolerance
    leading: Callable[[int], Factors]


def spectrum(matrix_MN: Tensor, *, floor: float = 0.0, capped: bool = True, exact: bool = False) -> Spectrum:
    """The spectrum of a matrix; directions up to ``floor`` or the rank tolerance do not count.

    ``capped``: no direction beyond the rank will be asked for. ``exact``: LAPACK's SVD.

    Cases:  a zero matrix has rank 0. One whose every direction is at or below ``floor`` is taken without the floor:
            to lose an expert whole is worse than to keep its rounding. Values must be finite.
    """
    if matrix_MN.shape[0] < matrix_MN.shape[1]:
        return _swapped(spectrum(matrix_MN.T.contiguous(), floor=floor, capped=capped, exact=exact))
    if exact or not capped or matrix_MN.dtype == torch.float64:
        return _by_svd(matrix_MN, floor) or _by_gram(matrix_MN, floor)
    return _by_power(matrix_MN, floor) or _by_gram(matrix_MN, floor)


def rank_of(s_K: Tensor, shape: tuple[int, ...], dtype: torch.dtype, floor: float = 0.0) -> int:
    """#{s > max(max(M, N) eps s_1, floor)}; without the floor if it leaves nothing."""
    tolerance = max(shape) * torch.finfo(dtype).eps * float(s_K[0])
    above_floor = int((s_K > max(tolerance, floor)).sum())
    return above_floor or int((s_K > tolerance).sum())


def rounding_floor(weight_MN: Tensor) -> float:
    """The largest singular value that rounding a stored weight matrix is expected to add to a difference, and a tenth.

        1.1 sigma (sqrt M + sqrt N),   sigma^2 = mean(ulp(x)^2) / 12,   ulp(x) = 2^(floor(log2 |x|) - digits)

    digits: 7 for bfloat16, 10 for float16, 23 for float32. An ulp of 0 for zeros and subnormal numbers; 0 for float64.
    """
    stored = STORED.get(weight_MN.dtype)
    if stored is None:
        return 0.0
    total = 0.0
    for start, end in _panels(len(weight_MN)):
        panel_PN = weight_MN[start:end].contiguous()
        power_PN = (panel_PN.view(stored.integers) & stored.exponent).view(panel_PN.dtype).double()  # 2^floor(log2 |x|)
        total += float(torch.linalg.vector_norm(power_PN).square())
    sigma = math.sqrt(total / weight_MN.numel() / 12) * 2.0**-stored.digits
    return 1.1 * sigma * sum(map(math.sqrt, weight_MN.shape))


def inverse_root(basis_MK: Tensor, rcond: float) -> Tensor:
    """(B^T B)^(-1/2) on the directions that a basis B really has: B times it is the nearest orthonormal matrix.

    Singular values of B up to rcond times the largest are directions that its parts share, and count as 0. Float64;
    from the Gram matrix of B, whose eigenvalues above rcond^2 are exact to K 2^-52 / rcond^2 (2e-7 at 1e-3 and 1024
    columns), or from the SVD of B where rcond is below 1e-4.
    """
    basis_MK = basis_MK.double()
    if rcond >= 1e-4:
        square_K, q_KK = torch.linalg.eigh(_gram(basis_MK), UPLO="L")
        d_K = square_K.clamp(min=0).sqrt()
    else:
        _, d_K, qt_KK = torch.linalg.svd(basis_MK, full_matrices=False)
        q_KK = qt_KK.T
    real = d_K > rcond * d_K.max()
    return q_KK[:, real] / d_K[real] @ q_KK[:, real].T


def polar(basis_MK: Tensor) -> Tensor:
    """P Q^T of B = P D Q^T: the nearest orthonormal matrix, not unique where B has dependent columns."""
    p_MK, _, qt_KK = torch.linalg.svd(basis_MK, full_matrices=False)
    return p_MK @ qt_KK


def _by_svd(matrix_MN: Tensor, floor: float) -> Spectrum | None:
    """LAPACK's; None if it does not converge."""
    try:
        u_MR, s_R, vt_RN = torch.linalg.svd(matrix_MN, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix_MN.device.type == "cpu":
            return None  # its other driver is not in torch
        u_MR, s_R, vt_RN = torch.linalg.svd(matrix_MN, full_matrices=False, driver="gesvd")

    def leading(count: int) -> Factors:
        return Factors(u_MR[:, :count].double(), s_R[:count].double(), vt_RN[:count].T.double())

    return Spectrum(s_R.double(), rank_of(s_R, matrix_MN.shape, matrix_MN.dtype, floor), leading)


def _by_gram(matrix_MN: Tensor, floor: float) -> Spectrum:
    square_N, v_NN = torch.linalg.eigh(_gram(matrix_MN), UPLO="L")
    s_N = square_N.clamp_(min=0).sqrt_().flip(0)

    def leading(count: int) -> Factors:
        v_NK, s_K = v_NN[:, v_NN.shape[1] - count :].flip(1), s_N[:count]
        return Factors(_product(matrix_MN, v_NK).div_(s_K), s_K, v_NK)

    return Spectrum(s_N, rank_of(s_N, matrix_MN.shape, matrix_MN.dtype, floor), leading)


def _by_power(matrix_MN: Tensor, floor: float) -> Spectrum | None:
    """The few directions above the tolerance; None if they are many, or have not converged soon."""
    if min(matrix_MN.shape) < 4 * SKETCH:
        return None
    random = generator("sketch", matrix_MN.shape[1]).standard_normal((matrix_MN.shape[1], SKETCH), dtype="float32")
    rows_LN = torch.linalg.qr(matrix_MN @ torch.from_numpy(random).to(matrix_MN.device)).Q.T @ matrix_MN
    rows_LN = rows_LN.double()
    square_L, w_LL = torch.linalg.eigh(rows_LN @ rows_LN.T)
    rank = rank_of(square_L.clamp(min=0).sqrt().flip(0), matrix_MN.shape, matrix_MN.dtype, floor)
    if rank > SKETCH - SPARE:  # most matrices end here, after a look in float32
        return None
    rows_LN = w_LL.flip(1)[:, : rank + SPARE].T @ rows_LN
    for _ in range(ROUNDS):
        u_ML = torch.linalg.qr(_product(matrix_MN, rows_LN.T)).Q
        rows_LN = _product_from_left(u_ML, matrix_MN)
        square_L, w_LL = torch.linalg.eigh(rows_LN @ rows_LN.T)
        s_L, w_LL = square_L.clamp_(min=0).sqrt_().flip(0), w_LL.flip(1)
        rank = rank_of(s_L, matrix_MN.shape, matrix_MN.dtype, floor)
        if rank > len(s_L) - SPARE // 2:
            return None
        u_MK, s_K = u_ML @ w_LL[:, :rank], s_L[:rank]
        v_NK = (w_LL[:, :rank].T @ rows_LN).T / s_K
        if rank == 0 or (_product(matrix_MN, v_NK) - u_MK * s_K).norm(dim=0).max() <= CONVERGED * s_K[0]:
            return _known(Factors(u_MK, s_K, v_NK), s_L)
    return None


def _known(factors: Factors, s_L: Tensor) -> Spectrum:
    def leading(count: int) -> Factors:
        return Factors(factors.u_MK[:, :count], factors.s_K[:count], factors.v_NK[:, :count])

    return Spectrum(s_L, len(factors.s_K), leading)


def _gram(matrix_MN: Tensor) -> Tensor:
    """The lower triangle of A^T A in float64, by blocks of columns: five eighths of the products."""
    columns = matrix_MN.shape[1]
    width = max(1, math.ceil(columns / 4))
    gram_NN = torch.zeros(columns, columns, dtype=torch.float64, device=matrix_MN.device)
    for start, end in _panels(len(matrix_MN)):
        panel_PN = matrix_MN[start:end].double()
        for left in range(0, columns, width):
            right = min(left + width, columns)
            gram_NN[left:, left:right].addmm_(panel_PN[:, left:].T, panel_PN[:, left:right])
    return gram_NN


def _product(matrix_MN: Tensor, x_NK: Tensor) -> Tensor:
    """A X in float64. MKL needs up to nine times as long for some layouts of a narrow X: hence the copy."""
    x_NK = x_NK.contiguous()
    out_MK = torch.empty(len(matrix_MN), x_NK.shape[1], dtype=torch.float64, device=matrix_MN.device)
    for start, end in _panels(len(matrix_MN)):
        torch.mm(matrix_MN[start:end].double(), x_NK, out=out_MK[start:end])
    return out_MK


def _product_from_left(x_MK: Tensor, matrix_MN: Tensor) -> Tensor:
    """X^T A in float64."""
    x_KM = x_MK.T.contiguous()
    out_KN = torch.zeros(len(x_KM), matrix_MN.shape[1], dtype=torch.float64, device=matrix_MN.device)
    for start, end in _panels(len(matrix_MN)):
        out_KN.addmm_(x_KM[:, start:end], matrix_MN[start:end].double())
    return out_KN


def _panels(rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, PANEL):
        yield start, min(start + PANEL, rows)


def _swapped(transposed: Spectrum) -> Spectrum:
    def leading(count: int) -> Factors:
        found = transposed.leading(count)
        return Factors(found.v_NK, found.s_K, found.u_MK)

    return Spectrum(transposed.s_K, transposed.rank, leading)
