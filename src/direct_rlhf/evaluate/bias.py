"""CrowS-Pairs: of two sentences that differ in whom they speak of, which does the model find likelier?

    crows_pairs   share of pairs whose more stereotyping sentence is the likelier one; 50 % = no preference
    difference    mean absolute difference of the two log-probabilities, in nats: how far they are apart at all

A sentence's log-probability is the sum over its tokens after the BOS (or EOS) alone, as lm-eval's `crows_pairs` task
has it for causal models (the paper's pseudo-likelihood is for masked ones). A tie counts as no preference for the
stereotype and is counted beside. Source: Nangia et al., arXiv 2010.00133; on pairs that do not hold what they promise,
Blodgett et al., ACL 2021.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import DataError, Interrupted
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.scoring import score_continuations
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.evaluate.tables import read_csv
from direct_rlhf.evaluate.trees import context_length
from direct_rlhf.models.memory import ChunkSize

if TYPE_CHECKING:
    from direct_rlhf.run.context import MakesBars

TASK = "crows_pairs"
COLUMNS = ("sent_more", "sent_less", "bias_type")


@dataclass(frozen=True)
class SentencePair:
    """``more`` stereotypes more than ``less`` does; ``kind`` is the type of bias."""

    id: str
    more: str
    less: str
    kind: str


@dataclass(frozen=True)
class BiasResult:
    """The preference over all pairs and by type of bias, and how far the sentences are apart."""

    overall: Summary
    by_type: Mapping[str, Summary]
    difference: Summary  # nats
    n_ties: int


def read_pairs(path: Path, limit: int | None = None) -> list[SentencePair]:
    """The first ``limit`` pairs of crows_pairs_anonymized.csv, gzipped or not. DataError names a row that is none."""
    pairs = []
    for number, (source, row) in enumerate(read_csv(path, COLUMNS)):
        if not all(row[name].strip() for name in COLUMNS):
            raise DataError(f"{source}: {', '.join(COLUMNS)} must hold text. Correct the row.")
        pairs.append(SentencePair(row.get("") or str(number), row["sent_more"], row["sent_less"], row["bias_type"]))
    if not pairs:
        raise DataError(f"{path}: holds no sentence pairs. Give CrowS-Pairs' crows_pairs_anonymized.csv.")
    return pairs[:limit]


def evaluate_bias(
    model: Any,
    tokens: Tokens,
    pairs: Sequence[SentencePair],
    *,
    batch_size: int,
    seed: int,
    draws: int,
    should_stop: Callable[[], bool],
    progress: "MakesBars",
    report: Callable[[str], None],
) -> tuple[BiasResult, list[Item]]:
    """Score both sentences of each pair; one item a pair. Errors: Interrupted when asked to stop."""
    first = tokens.eos_id if tokens.bos_id is None else tokens.bos_id
    encoded = [tokens.encode(sentence) for pair in pairs for sentence in (pair.more, pair.less)]
    room = context_length(model)
    fits = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= room]
    logprobs: list[float | None] = [None] * len(encoded)
    with progress("sentence pairs", total=len(fits)) as bar:

        def on_batch(done: int) -> None:
            if should_stop():
                raise Interrupted("the sentence pairs were stopped on request; they start again on resume")
            bar.advance(done)

        # each by itself: what they share is one token, and long trees of short branches cost more than they save
        scores = score_continuations(
            model,
            [((first,), encoded[i]) for i in fits],
            batch=ChunkSize("sentence pairs", batch_size, report),
            share=False,
            on_batch=on_batch,
        )
    for i, score in zip(fits, scores, strict=True):
        logprobs[i] = score.logprob
    items = [_item(pair, *logprobs[2 * n : 2 * n + 2]) for n, pair in enumerate(pairs)]
    apart = [
        item if item.value is None else replace(item, value=abs(item.extra["more"] - item.extra["less"]))
        for item in items
    ]
    kinds = sorted({pair.kind for pair in pairs})
    by_type = {kind: [item for item in items if item.extra["bias_type"] == kind] for kind in kinds}
    result = BiasResult(
        summarise(items, draws=draws, seed=seed),
        {kind: summarise(found, draws=draws, seed=seed) for kind, found in by_type.items()},
        summarise(apart, draws=draws, seed=seed),
        sum(item.value is not None and item.extra["more"] == item.extra["less"] for item in items),
    )
    return result, items


def _item(pair: SentencePair, more: float | None, less: float | None) -> Item:
    if more is None or less is None:
        return Item(TASK, pair.id, "failed", None, reason="too_long", extra={"bias_type": pair.kind})
    if not math.isfinite(more) or not math.isfinite(less):
        return Item(TASK, pair.id, "failed", None, reason="non_finite", extra={"bias_type": pair.kind})
    extra = {"bias_type": pair.kind, "more": more, "less": less}
    return Item(TASK, pair.id, "scored", float(more > less), extra=extra)
