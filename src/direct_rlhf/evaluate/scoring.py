"""log P(continuation | context) of many requests; contexts that are equal are computed once.

Legend: N target tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from direct_rlhf.evaluate.trees import TokenTree, attention_reach, hidden_at, in_batches, logit_chunks, takes_trees
from direct_rlhf.models.memory import ChunkSize

GROUP_TOKENS = (
    512  # continuation tokens after one copy of a context that is not longer: attention grows with the square
)

Request = tuple[Sequence[int], Sequence[int]]  # (context ids, continuation ids), the context not empty


@dataclass(frozen=True)
class Score:
    """Of one continuation: the sum of its tokens' log-probabilities in nats (NaN if the model gives none)."""

    logprob: float
    greedy: bool  # each token was the argmax


@dataclass
class _Group:
    """A context and the continuations asked about it, as one tree."""

    tree: TokenTree
    own_window: bool  # longer than the model's attention reaches, so that only its own mask is right: never packed
    requests: list[int] = field(default_factory=list)
    before: list[list[int]] = field(default_factory=list)  # of each request: the slots that predict its tokens
    grown: int = 0  # continuation tokens in the tree

    def add(self, index: int, context_length: int, continuation: Sequence[int]) -> None:
        last = context_length - 1
        self.before.append([last, *self.tree.grow(last, list(continuation[:-1]))])
        self.requests.append(index)
        self.grown += len(continuation) - 1


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
    for own_window in (False, True):
        pool = [group for group in groups if group.own_window is own_window]
        score = partial(_score_groups, model, pool, requests)
        for members, found in in_batches([group.tree for group in pool], batch, score):
            indices = [index for member in members for index in pool[member].requests]
            for index, one in zip(indices, found, strict=True):
                scores[index] = one
            on_batch(len(indices))
    on_batch(sum(not continuation for _, continuation in requests))
    return scores


def _groups(requests: Sequence[Request], share: bool, reach: int | None) -> list[_Group]:
    """Requests by context, where ``share`` and the attention window allow it; else each by itself."""
    groups: list[_Group] = []
    open_group: dict[tuple[int, ...], _Group] = {}
    for index, (context, continuation) in enumerate(requests):
        if not continuation:
            continue
        key = tuple(context)
        beyond = reach is not None and len(context) + len(continuation) - 1 > reach
        group = open_group.get(key)
        if group is None or beyond or group.grown + len(continuation) > max(GROUP_TOKENS, len(context)):
            group = _Group(TokenTree.chain(context), own_window=beyond)
            groups.append(group)
            if share and not beyond:
                open_group[key] = group
        group.add(index, len(context), continuation)
    return groups


@torch.inference_mode()
def _score_groups(
    model: Any, pool: Sequence[_Group], requests: Sequence[Request], chosen: Sequence[int]
) -> list[Score]:
    """Scores of the requests of the ``chosen`` groups, group by group."""
    groups = [pool[i] for i in chosen]
    members = [requests[index][1] for group in groups for index in group.requests]
    slots = [[slot for before in group.before for slot in before] for group in groups]
    hidden_NH = hidden_at(model, [group.tree for group in groups], slots, packed=True)
    target_N = torch.tensor([token for continuation in members for token in continuation], device=hidden_NH.device)
    logprob_N, greedy_N = _score_targets(model, hidden_NH, target_N)
    member_N = torch.tensor([m for m, continuation in enumerate(members) for _ in continuation])
    total_M = torch.zeros(len(members)).index_add(0, member_N, logprob_N)
    wrong_M = torch.zeros(len(members)).index_add(0, member_N, (~greedy_N).float())
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
