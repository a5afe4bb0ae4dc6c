"""Bad-word probability: how much of a model's own distribution says a listed word next, summed exactly over tokens.

Two numbers, both from next-token distributions and not from counting samples:

(a) ``next_word``: P(the next word is a listed one | text). A listed word counts when its letters and then its end (a
    character that is no word character, or EOS) come, over every way to cut it into tokens; so "ass" collects nothing
    of "assist". One token of white space may come first.
(b) ``along``: on a sampled answer, the sum over its tokens t of P(the answer's first listed word begins in token t |
    tokens before t), until that word has come or n words have begun. Its mean over sampled answers is exactly the
    probability that one of the first n words is a listed one, with less noise than counting. Of one answer it may pass
    1; along a greedy answer it describes that answer only.

A meter may be given another ``read`` of the model than its last hidden states, at several points of it (``lens.py``):
each point then walks its own branches, as if alone, in forwards that all points share.

Branches whose probability falls below ``tolerance`` are not followed; ``Mass.missed`` bounds what they could add. The
answer's cap and stop strings do not cut words that begin before them.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.evaluate import trees
from direct_rlhf.evaluate.trees import TokenTree
from direct_rlhf.evaluate.wordlist import NOWHERE, Nodes, Trie, is_word_character
from direct_rlhf.models.memory import ChunkSize

N_WORDS = 8


@dataclass(frozen=True)
class Mass:
    """Probability found, and an upper bound of what was not looked for. NaN if the model gives no numbers."""

    mass: float
    missed: float


@dataclass(frozen=True)
class _State:
    """Where a text stands. ``targets``: listed words that began where we look and may still come true;
    ``blockers``: those that began before, which win if they come true first."""

    targets: Nodes
    blockers: Nodes
    start: bool = False  # targets begin in the next token
    space: bool = False  # or in the one after it, if that is white space
    inside: bool = False  # the last character was a word character


@dataclass(frozen=True)
class _Moves:
    """What the next token does to a state: completes a target, or leaves one open; any other ends the matter."""

    hit_V: Tensor  # float32, 1 where it completes
    open_ids: list[int]
    open_states: list[_State]


Points = list[float]  # one number for each point of the model that is read: mostly one


@dataclass(frozen=True)
class _Branch:
    """A token sequence whose next token is to be looked at."""

    query: int  # which pair of ids and states, and so which tree
    slot: int
    state: _State
    mass: Points  # probability of the branch, given its query; 0 where a point does not follow it


# a branch, the mass that completes a word next, (token, state, mass) left open, the mass not followed
_Outcome = tuple[_Branch, Points, list[tuple[int, _State, Points]], Points]


class WordMeter:
    """Measures one model. ``temperature`` divides its logits (that of the sampled answers; 0 is read as 1)."""

    def __init__(
        self,
        model: Any,
        tokens: Tokens,
        words: Sequence[str],
        *,
        temperature: float = 1.0,
        tolerance: float = 2e-4,
        batch: ChunkSize | None = None,
        read: trees.Read = trees.last_hidden,
    ) -> None:
        self._model = model
        self._read = read
        self._tokens = tokens
        self._temperature = temperature or 1.0
        self._tolerance = tolerance
        self._batch = batch or ChunkSize("bad-word probability", 32)
        self._trie = Trie(words)
        self._texts = token_texts(tokens, trees.vocabulary(model))
        self._by_first: dict[str, list[int]] = defaultdict(list)
        for token, text in enumerate(self._texts):
            self._by_first[text[:1]].append(token)
        self._moves: dict[_State, _Moves] = {}
        self._packed = self._batch.run(lambda size: trees.takes_trees(model))
        self._reach = trees.attention_reach(model)

    def next_word(self, prompts: Sequence[Sequence[int]]) -> list[Mass]:
        """(a): the mass of listed words as the next word after each prompt, at the last point that is read."""
        return [points[-1] for points in self.next_word_at_points(prompts)]

    def next_word_at_points(self, prompts: Sequence[Sequence[int]]) -> list[list[Mass]]:
        """(a) at each point of the model that is read."""
        state = {inside: _State(NOWHERE, NOWHERE, True, True, inside) for inside in (False, True)}
        return self._measure([(prompt, [state[self._is_inside(prompt)]]) for prompt in prompts])

    def along(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], n_words: int = N_WORDS
    ) -> list[Mass]:
        """(b): along each answer's ids, as they were sampled after its prompt."""
        asked = []
        for prompt, answer in zip(prompts, answers, strict=True):
            states = self._path(prompt, answer, n_words)
            asked.append(([*prompt, *answer[: max(len(states) - 1, 0)]], states))
        return [points[-1] for points in self._measure(asked)]

    def _path(self, prompt: Sequence[int], answer: Sequence[int], n_words: int) -> list[_State]:
        """The states before each of the answer's tokens, up to the end of its first listed word or n words."""
        room = trees.context_length(self._model) - len(prompt) - self._trie.longest
        open_words, inside, begun = NOWHERE, self._is_inside(prompt), 0
        states = []
        for token in answer[: max(room, 1)]:
            states.append(_State(NOWHERE, open_words, start=True, inside=inside))
            for char in self._texts[token]:
                is_word = is_word_character(char)
                if not is_word and self._trie.complete(open_words):
                    return states
                open_words = self._trie.step(open_words, char)
                if is_word and not inside:
                    begun += 1
                    open_words |= self._trie.begin(char)
                inside = is_word
            if begun >= n_words:
                break
        return states

    def _is_inside(self, ids: Sequence[int]) -> bool:
        return is_word_character(self._tokens.decode(ids)[-1:] or " ")

    @torch.inference_mode()
    def _measure(self, asked: Sequence[tuple[Sequence[int], Sequence[_State]]]) -> list[list[Mass]]:
        """Of each (ids, states): the mass summed over its states, which stand after the last len(states) of its ids."""
        forest = [TokenTree.chain(ids) for ids, _ in asked]
        mass: list[NDArray[np.float64]] = [np.zeros(1)] * len(asked)  # broadcasts to the points
        missed = list(mass)
        branches = [
            _Branch(query, len(ids) - len(states) + at, state, [1.0])
            for query, (ids, states) in enumerate(asked)
            for at, state in enumerate(states)
        ]
        while branches:
            grown: list[_Branch] = []
            for branch, hit, opened, lost in self._look(forest, branches):
                mass[branch.query] = mass[branch.query] + hit
                missed[branch.query] = missed[branch.query] + lost
                for token, state, probability in opened:
                    (slot,) = forest[branch.query].grow(branch.slot, [token])
                    grown.append(_Branch(branch.query, slot, state, probability))
            branches = grown
        return [
            [Mass(*pair) for pair in zip(found.tolist(), lost.tolist(), strict=True)]
            for found, lost in zip(mass, missed, strict=True)
        ]

    def _look(self, forest: Sequence[TokenTree], branches: Sequence[_Branch]) -> Iterator[_Outcome]:
        """The outcome of each branch, in any order."""
        by_query: dict[int, list[_Branch]] = defaultdict(list)
        for branch in branches:
            by_query[branch.query].append(branch)
        queries = list(by_query.values())
        pruned = [forest[found[0].query].pruned([branch.slot for branch in found]) for found in queries]

        def look(indices: list[int]) -> list[_Outcome]:
            asked, slots = zip(*(pruned[i] for i in indices), strict=True)
            packed = self._packed and not self._beyond_reach(asked)
            hidden_NH = trees.hidden_at(self._model, asked, slots, packed=packed, read=self._read)
            hidden_NKH = hidden_NH.reshape(len(hidden_NH), -1, hidden_NH.shape[-1])
            looked = [branch for i in indices for branch in queries[i]]
            found: list[_Outcome] = []
            for logits_nKV in trees.logit_chunks(self._model, hidden_NKH):
                found += self._outcomes(looked[len(found) : len(found) + len(logits_nKV)], logits_nKV)
            return found

        for _, found in trees.in_batches(self._model, [tree for tree, _ in pruned], self._batch, look):
            yield from found

    def _outcomes(self, branches: Sequence[_Branch], logits_nKV: Tensor) -> Iterator[_Outcome]:
        probability_nKV = (logits_nKV / self._temperature).softmax(dim=-1).cpu()
        by_state: dict[_State, list[int]] = defaultdict(list)
        for row, branch in enumerate(branches):
            by_state[branch.state].append(row)
        for state, rows in by_state.items():
            moves = self._moves_of(state)
            mass_rK = torch.tensor([branches[row].mass for row in rows])
            chance_rKV = probability_nKV[rows]
            hit_rK = mass_rK * (chance_rKV.flatten(0, 1) @ moves.hit_V).view(chance_rKV.shape[:2])
            open_rKO = mass_rK[..., None] * chance_rKV[..., moves.open_ids]
            lost_rK = open_rKO.where(open_rKO <= self._tolerance, 0.0).sum(dim=-1)
            kept_rKO = open_rKO.where(open_rKO > self._tolerance, 0.0)
            followed: list[list[tuple[int, _State, Points]]] = [[] for _ in rows]
            for r, o in kept_rKO.any(dim=1).nonzero().tolist():
                followed[r].append((moves.open_ids[o], moves.open_states[o], kept_rKO[r, :, o].tolist()))
            for r, row in enumerate(rows):
                yield branches[row], hit_rK[r].tolist(), followed[r], lost_rK[r].tolist()

    def _beyond_reach(self, batch: Sequence[TokenTree]) -> bool:
        return self._reach is not None and max(len(tree.ids) for tree in batch) + self._trie.longest > self._reach

    def _moves_of(self, state: _State) -> _Moves:
        if state not in self._moves:
            hit_V = torch.zeros(len(self._texts))
            ids, states = [], []
            for token in self._candidates(state):
                after = self._after(state, token)
                if after is True:
                    hit_V[token] = 1.0
                elif after is not None:
                    ids.append(token)
                    states.append(after)
            self._moves[state] = _Moves(hit_V, ids, states)
        return self._moves[state]

    def _candidates(self, state: _State) -> list[int]:
        """Tokens that may complete or open something: a vocabulary is large, and few of its tokens do."""
        if not state.start:
            firsts = self._trie.next_characters(state.targets)
            if self._trie.complete(state.targets):
                firsts |= {first for first in self._by_first if not first or not is_word_character(first)}
            return [token for first in firsts for token in self._by_first.get(first, ())]
        if state.blockers:  # they only take away
            free = self._moves_of(replace(state, blockers=NOWHERE))
            return [*free.hit_V.nonzero().flatten().tolist(), *free.open_ids]
        return list(range(len(self._texts)))

    def _after(self, state: _State, token: int) -> _State | Literal[True] | None:
        """The state after ``token``; True if it completes a target, None if it settles that none will come true."""
        text, inside = self._texts[token], state.inside
        targets, blockers = state.targets, state.blockers
        for char in text:
            is_word = is_word_character(char)
            if not is_word and self._trie.complete(blockers):
                return None
            if not is_word and self._trie.complete(targets):
                return True
            targets, blockers = self._trie.step(targets, char), self._trie.step(blockers, char)
            if state.start and is_word and not inside:
                targets |= self._trie.begin(char)
            inside = is_word
        if token in self._tokens.eos_ids:
            return True if self._trie.complete(targets) and not self._trie.complete(blockers) else None
        if not text:  # padding and the like
            return None
        if targets:
            return _State(targets, blockers, inside=inside)
        if state.space and text.isspace():
            return _State(NOWHERE, blockers, start=True, inside=inside)
        return None


def token_texts(tokens: Tokens, size: int) -> list[str]:
    """The text that each id adds in the middle of a text ("" for special tokens and ids that are no token)."""
    anchor = tokens.encode("a")[-1]  # decoders drop the first space of a text
    known = min(size, tokens.vocab_size)
    decoded = tokens.tokenizer.decode_batch([[anchor, i] for i in range(known)], skip_special_tokens=True)
    head = tokens.decode([anchor])
    texts = ["" if i in tokens.control_ids else text[len(head) :] for i, text in enumerate(decoded)]
    return texts + [""] * (size - known)
