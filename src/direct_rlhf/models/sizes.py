"""How many bytes numbers take as they are stored: pure arithmetic, without torch."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

NF4_BLOCK, NF4_NESTED = 64, 256  # weights to a scale; scales to a scale of their own
NF4_TABLES = 4 * (16 + 256 + 1)  # of each weight: the 16 levels, the levels of the scales, their offset
MOMENT_BLOCK, MOMENT_SMALL = 256, 4096  # elements to a scale; tensors below this keep float32 moments
MOMENT_TABLES = 2 * 4 * 256  # the levels of both moments, once for an optimiser


def nf4_bytes(n: int) -> int:
    """A weight of ``n`` elements in 4 bits, its scales in 8 bits (QLoRA's double quantisation, arXiv 2305.14314)."""
    scales = -(-n // NF4_BLOCK)
    return -(-n // 2) + scales + 4 * -(-scales // NF4_NESTED) + NF4_TABLES


def moment_bytes(n: int, kind: str) -> int:
    """AdamW's two moments of a tensor of ``n`` elements: float32, or (``adamw_8bit``) 8 bits with scales.

    Source: block-wise quantisation, arXiv 2110.02861, in bitsandbytes' sizes.
    """
    if kind == "adamw" or n < MOMENT_SMALL:
        return 8 * n
    return 2 * (n + 4 * -(-n // MOMENT_BLOCK))
