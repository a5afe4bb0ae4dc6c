"""log P(continuation | context) of many requests; what contexts have in common is computed once.

Equal contexts are one tree with all their continuations; trees that share a long beginning, such as a block of worked
examples, grow from one trunk whose keys and values are kept. Legend: N target tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from direct_rlhf.evaluate.trees import TokenTree, attention_reach, hidden_at, in_batches, logit_chunks, takes_trees
from direct_rlhf.evaluate.trunks import GrownTrunk, Ids, find_trunks, in_rows, takes_trunks
from direct_rlhf.models.memory import ChunkSize

GROUP_TOKENS = (
    512  # continuation tokens after one copy of a context that is not longer: attention grows with the square
)

Request = tuple[Sequence[int] | Ids, Sequence[int]]  # (context ids, continuation ids), the context not empty


@dataclass(frozen=True)
class Score:
    """Of one continuation: the sum of its tokens' log-probabilities in nats (NaN if the model gives none)."""

    logprob: float
    greedy: bool  # each token was the argmax


@dataclass
class _Group:
    """A context and the continuations asked about it."""

    context: Ids
    own_window: bool  # longer than the model's attention reaches, so that only its own mask is right: never packed
    requests: list[int] = field(default_factory=list)
    continuations: list[Sequence[int]] = field(default_factory=list)

    @property
    def grown(self) -> int:
        return sum(len(continuation) - 1 for continuation in self.continuations)

    def tree(self, skip: int = 0) -> tuple[TokenTree, list[int]]:
        """The context after ``skip`` tokens with the continuations, and the slots that predict their tokens."""
        tree = TokenTree.chain(self.context[skip:].tolist())
        last = len(tree.ids) - 1
        before = [slot for ids in self.continuations for slot in (last, *tree.grow(last, list(ids[:-1])))]
        return tree, before


def score_continuations(
    model: Any,
    requests: Sequence[Request],
    *,
    batch: ChunkSize,
    share: bool = True,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Scores in the order of the requests; an empty continuation has no score (NaN).

    ``share=False`` is the plain path, one sequence a request. At most ``batch.size`` contexts are in a forward;
    ``on_batch`` is told how many requests a batch finished (and may raise to stop).
    Units:   nats, summed in float32 over float32 log-probabilities.
    Errors:  OutOfMemoryError where one context does not fit.
    """
    share = share and batch.run(lambda size: takes_trees(model))
    groups = _groups(requests, share, attention_reach(model))
    scores = [Score(float("nan"), False)] * len(requests)
    for scored, found in _scored(model, groups, batch, share):
        for index, one in zip([index for group in scored for index in group.requests], found, strict=True):
            scores[index] = one
        on_batch(len(found))
    on_batch(sum(not continuation for _, continuation in requests))
    return scores


def _groups(requests: Sequence[Request], share: bool, reach: int | None) -> list[_Group]:
    """Requests by context, where ``share`` and the attention window allow it; else each by itself."""
    groups: list[_Group] = []
    open_group: dict[bytes, _Group] = {}
    for index, (context, continuation) in enumerate(requests):
        if not continuation:
            continue
        ids = np.asarray(context, dtype=np.int32)
        key = ids.tobytes()
        beyond = reach is not None and len(ids) + len(continuation) - 1 > reach
        group = open_group.get(key)
        if group is None or beyond or group.grown + len(continuation) > max(GROUP_TOKENS, len(ids)):
            group = _Group(ids, own_window=beyond)
            groups.append(group)
            if share and not beyond:
                open_group[key] = group
        group.requests.append(index)
        group.continuations.append(continuation)
    return groups


def _scored(
    model: Any, groups: Sequence[_Group], batch: ChunkSize, share: bool
) -> Iterator[tuple[list[_Group], list[Score]]]:
    """All groups, batch by batch, with the scores of their requests, group by group."""
    free = [group for group in groups if not group.own_window]
    trunks, alone = find_trunks([group.context for group in free]) if share else ([], list(range(len(free))))
    if trunks and not batch.run(lambda size: takes_trunks(model)):
        trunks, alone = [], list(range(len(free)))
    for trunk in trunks:
        pool = [free[i] for i in trunk.members]
        ids = pool[0].context[: trunk.length].tolist()
        grown = batch.run(partial(_grown, model, ids))
        yield from _batches(model, pool, batch, grown, skip=trunk.length)
        del grown
    yield from _batches(model, [free[i] for i in alone], batch)
    yield from _batches(model, [group for group in groups if group.own_window], batch)


def _grown(model: Any, ids: Sequence[int], size: int) -> GrownTrunk:
    return GrownTrunk(model, ids)


def _batches(
    model: Any, pool: Sequence[_Group], batch: ChunkSize, grown: GrownTrunk | None = None, skip: int = 0
) -> Iterator[tuple[list[_Group], list[Score]]]:
    planted = [group.tree(skip) for group in pool]
    trees = [tree for tree, _ in planted]

    def work(chosen: list[int]) -> list[Score]:
        asked = [trees[i] for i in chosen], [planted[i][1] for i in chosen]
        hidden_NH = grown.hidden_at(*asked) if grown else hidden_at(model, *asked, packed=True)
        return _scores(model, hidden_NH, [ids for i in chosen for ids in pool[i].continuations])

    device = next(model.parameters()).device
    in_turn = in_rows(trees, device, batch, work) if grown else in_batches(model, trees, batch, work)
    for chosen, found in in_turn:
        yield [pool[i] for i in chosen], found


@torch.inference_mode()
def _scores(model: Any, hidden_NH: Tensor, continuations: Sequence[Sequence[int]]) -> list[Score]:
    """Scores of continuations, given the states that predict their tokens."""
    target_N = torch.tensor([token for ids in continuations for token in ids], device=hidden_NH.device)
    logprob_N, greedy_N = _score_targets(model, hidden_NH, target_N)
    member_N = torch.tensor([m for m, ids in enumerate(continuations) for _ in ids])
    total_M = torch.zeros(len(continuations)).index_add(0, member_N, logprob_N)
    wrong_M = torch.zeros(len(continuations)).index_add(0, member_N, (~greedy_N).float())
    return [Score(total, wrong == 0) for total, wrong in zip(total_M.tolist(), wrong_M.tolist(), strict=True)]


def _score_targets(model: Any, hidden_NH: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability, is the argmax) of each target, on the host."""
    logprobs, greedy = [], []
    start = 0
    for logits_nV in logit_chunks(model, hidden_NH):
        target_n = target_N[start : start + len(logits_nV)]
        chosen_n = logits_nV.gather(-1, target_n.unsqueeze(-1)).squeeze(-1)
        logprobs.append(chosen_n - logits_nV.logsumexp(dim=-1))
        greedy.append(logits_nV.argmax(dim=-1) == target_n)
        start += len(logits_nV)
    return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()
