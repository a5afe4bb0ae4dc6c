"""Random numbers that depend on what they are for, not on what was drawn before them.

Each draw names its key (seed, purpose, iteration, id ...). Nothing has to be saved to resume, and neither batch mates
nor world size change a sample.
"""

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by SHA-256 of ``key``; equal keys give equal streams everywhere."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def permutation(size: int, *key: int | str) -> list[int]:
    """A shuffled 0 .. size-1 for ``key``."""
    return [int(i) for i in generator(*key).permutation(size)]


def cycle(size: int, start: int, count: int, *key: int | str) -> list[int]:
    """Items ``start`` .. ``start + count - 1`` of an endless pass over 0 .. size-1, reshuffled every epoch."""
    picked: list[int] = []
    while len(picked) < count:
        epoch, offset = divmod(start + len(picked), size)
        picked += permutation(size, *key, epoch)[offset : offset + count - len(picked)]
    return picked
