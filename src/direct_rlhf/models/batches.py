"""Sequences of unlike lengths as padded batches that waste little.

Legend: B sequences, L slots (right-padded).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BATCH_TOKENS = 1024  # padded slots of one forward and backward
SCORE_FACTOR = 4  # a forward that keeps nothing for a backward takes so many times the slots


def padded(sequences: Sequence[Sequence[int]], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, L] and their mask [B, L]."""
    longest = max(map(len, sequences))
    ids_BL = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in sequences])
    length_B1 = torch.tensor([[len(row)] for row in sequences])
    return ids_BL.to(device), (torch.arange(longest) < length_B1).to(device)


def by_length(lengths: Sequence[int], rows: Sequence[int], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """``rows`` in chunks of like length, longest last; a padded chunk holds at most ``tokens`` slots (or one row)."""
    chunk: list[int] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if chunk and (len(chunk) + 1) * lengths[row] > tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
