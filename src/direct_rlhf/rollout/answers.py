"""What becomes of sampled tokens: when an answer ends, what is kept of it, and the rollout at the end.

Legend: B answers, T response slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import DivergenceError
from direct_rlhf.rollout.fallback import left_padded
from direct_rlhf.rollout.stopping import INCOMPLETE, StopHit, StopTracker, TextStream
from direct_rlhf.rollout.types import FinishReason, Rollout, SampleKey, SamplingSettings


@dataclass(frozen=True)
class _Answer:
    """One finished answer; ``ids`` ends in a swapped-in EOS where ``n_actions`` is one less than its length."""

    ids: list[int]
    n_actions: int
    finish: FinishReason
    text: str


class Answers:
    """The growing answers to all prompts of one call of the sampler, by row."""

    def __init__(
        self,
        tokens: Tokens,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        settings: SamplingSettings,
        on_text: Callable[[int, str], None] | None = None,
    ) -> None:
        self._tokens, self._prompts, self._keys, self._settings = tokens, prompts, keys, settings
        self._on_text = on_text
        self._tracker = StopTracker(tokens, settings.stop_strings)
        self._streams = [TextStream(tokens, settings.stop_strings) for _ in prompts] if on_text else []
        self._done: dict[int, _Answer] = {}
        self._rows: list[list[int]] = []  # of each step, and
        self._logprobs: list[Tensor] = []  # what was drawn in it: fetched once, at the end

    def length(self, row: int) -> int:
        """Tokens drawn for a row so far."""
        return len(self._tracker.ids(row))

    def add(self, rows: Sequence[int], token_ids: Sequence[int], logprob_A: Tensor) -> list[int]:
        """One more token for each of ``rows``; which of them, as places in ``rows``, have ended with it."""
        self._rows.append(list(rows))
        self._logprobs.append(logprob_A)
        ended = []
        eos_ids, cap, push = self._tokens.eos_ids, self._settings.max_new_tokens, self._tracker.push
        for place, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):  # once a token: keep it short
            hit = push(row, token_id)
            if hit is not None or token_id in eos_ids or self.length(row) == cap:
                self._done[row] = self._answer(row, hit)
                ended.append(place)
            if self._on_text is not None:
                self._emit(row, self._on_text)
        return ended

    def rollout(self, policy_version: int, device: torch.device) -> Rollout:
        """All answers in row order; every row must have ended. DivergenceError names the prompt of a NaN."""
        answers = [self._done[row] for row in range(len(self._prompts))]
        prompt_ids, prompt_mask = left_padded(self._prompts, 0, max(map(len, self._prompts)))
        width = max(len(answer.ids) for answer in answers)
        length_B1, actions_B1 = (
            torch.tensor(numbers)[:, None]
            for numbers in ([len(answer.ids) for answer in answers], [answer.n_actions for answer in answers])
        )
        slot_T = torch.arange(width)
        action_BT = slot_T < actions_B1
        logprob_BT = torch.where(action_BT, self._logprob_table(width), 0.0)
        if not logprob_BT.isfinite().all():
            row, slot = (~logprob_BT.isfinite()).nonzero()[0].tolist()
            raise DivergenceError(
                f"sampling prompt {self._keys[row].prompt_id!r} gave a log-probability that is not finite at answer "
                f"token {slot}: the policy's logits hold NaN or inf. Resume from an earlier checkpoint with a smaller "
                "learning rate, or in float32"
            )
        return Rollout(
            prompt_ids_BP=prompt_ids.to(device),
            prompt_mask_BP=prompt_mask.to(device),
            response_ids_BT=torch.tensor([[*a.ids, *[0] * (width - len(a.ids))] for a in answers]).to(device),
            response_mask_BT=(slot_T < length_B1).to(device),
            action_mask_BT=action_BT.to(device),
            logprob_BT=logprob_BT.to(device),
            finish=tuple(answer.finish for answer in answers),
            texts=tuple(answer.text for answer in answers),
            keys=tuple(self._keys),
            policy_version=policy_version,
        )

    def _logprob_table(self, width: int) -> Tensor:
        """Of all drawn tokens, also those that a stop string took away again: [B, T] float32."""
        row_N = np.concatenate([np.asarray(rows) for rows in self._rows])
        logprob_N = torch.cat(self._logprobs).cpu()
        by_row_N = np.argsort(row_N, kind="stable")  # a row's tokens stay in their order
        counts_B = np.bincount(row_N, minlength=len(self._prompts))
        slot_N = np.arange(len(row_N)) - np.repeat(counts_B.cumsum() - counts_B, counts_B)
        table_BT = torch.zeros(len(self._prompts), max(int(counts_B.max()), width))
        table_BT[torch.from_numpy(row_N[by_row_N]), torch.from_numpy(slot_N)] = logprob_N[torch.from_numpy(by_row_N)]
        return table_BT[:, :width]

    def _emit(self, row: int, on_text: Callable[[int, str], None]) -> None:
        stream, answer = self._streams[row], self._done.get(row)
        text = stream.push(self._tracker.ids(row)) if answer is None else stream.finish(answer.text)
        if text:
            on_text(row, text)

    def _answer(self, row: int, hit: StopHit | None) -> _Answer:
        """What is kept of a row that has ended: by EOS, else by a stop string, else by the cap."""
        ids, n_actions, swapped = self._tracker.ids(row), len(self._tracker.ids(row)), []
        if ids[-1] in self._tokens.eos_ids:
            finish, text = FinishReason.EOS, self._tokens.decode(ids[:-1])
        elif hit is not None:
            finish, text = FinishReason.STOP, self._tokens.decode(ids)[: hit.position]
            if not self._settings.keep_stop:
                n_actions = max(hit.n_tokens_before, 1)
                swapped = [self._tokens.eos_id] if hit.n_tokens_before else []
        else:
            # A cap that cuts a character leaves bytes that are no text.
            finish, text = FinishReason.LENGTH, self._tokens.decode(ids).rstrip(INCOMPLETE)
        return _Answer(ids[:n_actions] + swapped, n_actions, finish, text)
