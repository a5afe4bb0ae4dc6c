"""Preference pairs as token ids, and one forward pass over both answers of each.

Legend: B pairs, L slots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.types import PreferencePair
from direct_rlhf.errors import DataError
from direct_rlhf.models.batches import BATCH_TOKENS, padded
from direct_rlhf.recipe.schema import DataSection
from direct_rlhf.train.parallel import Cut, everything

Which = Literal["reward", "cost"]  # a section of the recipe that trains a reward model


@dataclass(frozen=True)
class EncodedPair:
    """One pair as ids; both answers end with EOS."""

    pair: PreferencePair
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def of_kinds(pairs: Sequence[PreferencePair], kinds: Sequence[str], which: str) -> list[PreferencePair]:
    """The pairs of these kinds (all, if none is named). DataError if there are pairs and none of them fits."""
    kept = [pair for pair in pairs if not kinds or pair.kind in kinds]
    if pairs and not kept:
        found = ", ".join(sorted({pair.kind for pair in pairs}))
        raise DataError(
            f"{which}.kinds = {', '.join(kinds)}: no preference pair is of such a kind (the data have: {found}). "
            f"Name kinds of the data in {which}.kinds, or set `kind` of a source under data.preferences."
        )
    return kept


def encode_pairs(pairs: Sequence[PreferencePair], dialogue: DialogueFormat, section: DataSection) -> list[EncodedPair]:
    """Pairs as ids. A pair of which one side does not fit is left out: cutting it would hide what differs."""
    encoded = []
    for pair in pairs:
        chosen, rejected = (
            dialogue.encode_dialogue(
                pair.prompt,
                answer,
                max_prompt_tokens=section.max_prompt_tokens,
                max_answer_tokens=section.max_answer_tokens,
            )
            for answer in (pair.chosen, pair.rejected)
        )
        if chosen is not None and rejected is not None:
            encoded.append(EncodedPair(pair, chosen.prompt_ids, chosen.answer_ids, rejected.answer_ids))
    return encoded


@dataclass(frozen=True)
class PairBatch:
    """B pairs as 2B rows: first all chosen, then all rejected."""

    rows: list[int]  # which of the given pairs these are
    ids_BL: Tensor
    mask_BL: Tensor
    answer_BL: Tensor  # True on answer tokens
    counts: bool = True  # False: it keeps step with the other processes, and its loss must not count


def pair_batches(
    pairs: Sequence[EncodedPair], device: str, tokens: int = BATCH_TOKENS, cut: Cut = everything
) -> Iterator[PairBatch]:
    """``pairs`` in batches of like length and at most ``tokens`` slots; both answers of a pair share a batch.

    ``cut`` says which of them are this process's.
    """
    for rows, counts in cut([pair.length for pair in pairs], range(len(pairs)), tokens // 2):
        chunk = [pairs[row] for row in rows]
        sequences = [p.prompt_ids + p.chosen_ids for p in chunk] + [p.prompt_ids + p.rejected_ids for p in chunk]
        ids_BL, mask_BL = padded(sequences, device)
        prompt_B1 = torch.tensor([[len(p.prompt_ids)] for p in chunk * 2], device=device)
        answer_BL = mask_BL & (torch.arange(ids_BL.shape[1], device=device) >= prompt_B1)
        yield PairBatch(rows, ids_BL, mask_BL, answer_BL, counts)
