"""The sampler: any Hugging Face causal language model, left-padded batches, a key-value cache, exact log-probabilities.

Legend: B answers, P prompt slots (left-padded), T response slots (right-padded), A rows still in the batch,
S attended slots (prompt and response so far), V vocabulary.

A sample depends on its key and its prompt alone: each row draws its uniforms from its own counter-based stream, and
a token is the inverse of the cumulative distribution at its uniform.
"""

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError, DivergenceError, Interrupted
from direct_rlhf.rollout.stopping import INCOMPLETE, StopHit, StopTracker, TextStream
from direct_rlhf.rollout.types import FinishReason, Rollout, SampleKey, SamplingSettings

POLL_EVERY = 4  # steps between two looks at should_stop
COMPACT_BELOW = 0.75  # share of running rows at which finished rows leave the batch: a copy of the cache must pay

SamplerPath = Literal["cached", "uncached"]


@dataclass(frozen=True)
class _Answer:
    """One finished answer; ``ids`` ends in a swapped-in EOS where ``n_actions`` is one less than its length."""

    ids: list[int]
    n_actions: int
    logprobs: list[float]  # of the actions
    finish: FinishReason
    text: str


def sample(
    model: PreTrainedModel,
    tokens: Tokens,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[SampleKey],
    settings: SamplingSettings,
    *,
    policy_version: int = 0,
    batch_size: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Rollout:
    """One answer to each prompt, in the order of the prompts.

    How an answer ends, what is kept of it, and which of that is an action:

        sampled EOS                    all ids with the EOS; all actions
        stop string, swapped (default) tokens that begin before it, actions, then one EOS that is none
        stop string, nothing before it its first sampled token, an action
        stop string, ``keep_stop``     all ids; all actions
        cap                            all ids; all actions

    Args:    ``model`` is put in eval mode while sampling, under inference mode. ``keys`` name the random streams.
             ``batch_size`` bounds the rows of one forward (None: all at once); it changes no sample.
             ``should_stop`` is asked every few steps. ``on_text(row, text)`` gets text as soon as it is certain.
             ``on_step(n)`` is called after each step with the number of answers that ended in it.
    Returns: a Rollout on the model's device; T is the longest answer (up to the cap, plus a swapped-in EOS).
    Units:   log-probabilities in nats, float32, of logits / temperature; temperature 0 takes the largest logit and
             gives log-probabilities at temperature 1.
    Errors:  ValueError if prompts and keys do not fit or a prompt is empty; ConfigError if the model has too few
             positions; Interrupted when asked to stop; DivergenceError if a log-probability is not finite.
    """
    _check(model, prompts, keys, settings)
    forward = _Forward(model)
    longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    answers: dict[int, _Answer] = {}
    with _eval_mode(model):
        for rows in _chunks(longest_first, prompts, batch_size, equal_lengths=forward.path == "uncached"):
            decoding = _Decoding(forward, tokens, rows, prompts, keys, settings, on_text)
            while decoding.n_running:
                if should_stop is not None and decoding.step % POLL_EVERY == 0 and should_stop():
                    raise Interrupted("sampling was asked to stop; its answers are drawn again on resume, the same")
                ended = decoding.advance()
                if on_step is not None:
                    on_step(ended)
            answers.update(decoding.answers)
    ordered = [answers[row] for row in range(len(prompts))]
    return _rollout(prompts, ordered, keys, policy_version, forward.device)


def sampler_path(model: PreTrainedModel) -> SamplerPath:
    """``cached`` where the model works with a dynamic key-value cache, else ``uncached``: right, and slower."""
    return _Forward(model).path


def uniforms(keys: Sequence[SampleKey], n: int) -> np.ndarray:
    """The first ``n`` uniforms of each key's stream, float32 [B, n] in [0, 1).

    Philox keyed by SHA-256 of the key's four parts; shorter draws are the start of longer ones. The largest float32
    below 1 becomes its neighbour, so that u * total < total for every float32 total.
    """
    drawn = np.empty((len(keys), n), dtype=np.float32)
    for row, key in enumerate(keys):
        name = repr((key.seed, key.prompt_id, key.iteration, key.index)).encode()
        counter = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8")
        drawn[row] = np.random.Generator(np.random.Philox(key=counter)).random(n, dtype=np.float32)
    return np.minimum(drawn, np.float32(1 - 2**-23))


def draw(logits_AV: Tensor, uniform_A: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability.

        token = min {v: sum_{w <= v} p_w > u};   p = softmax(logits / temperature);   no uniform: argmax

    Cases:   a token of probability 0 is never drawn; NaN logits give a NaN log-probability.
    Shapes:  logits [A, V], any float type; uniform [A] float32. Returns int64 [A] and float32 [A].
    """
    logits_AV = logits_AV.float()
    if uniform_A is None:
        token_A1 = logits_AV.argmax(-1, keepdim=True)
    elif temperature != 1:
        logits_AV = logits_AV / temperature
    largest_A1 = logits_AV.amax(-1, keepdim=True)
    weight_AV = (logits_AV - largest_A1).exp_()
    if uniform_A is not None:
        cumulative_AV = weight_AV.cumsum(-1)
        token_A1 = torch.searchsorted(cumulative_AV, uniform_A[:, None] * cumulative_AV[:, -1:], right=True)
        token_A1.clamp_(max=logits_AV.shape[-1] - 1)  # NaN compares as beyond the end
    logprob_A1 = logits_AV.gather(-1, token_A1) - largest_A1 - weight_AV.sum(-1, keepdim=True).log()
    return token_A1[:, 0], logprob_A1[:, 0]


class _Forward:
    """Calls a model for the logits of the last slot, with the arguments that its architecture knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PEFT wrapper hides them
        known = inspect.signature(base.forward).parameters
        self.model = model
        self.device = model.device
        self.takes_mask, self.takes_positions = "attention_mask" in known, "position_ids" in known
        self.takes_cache_switch = "use_cache" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.path: SamplerPath = "uncached"
        if {"past_key_values", "attention_mask"} <= known.keys() and not getattr(base, "_is_stateful", False):
            # Only of these is it known that rows can be taken out, whatever a subclass keeps beside keys and values.
            layers = DynamicCache(config=model.config).layers
            if {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
                self.path = "cached"

    def new_cache(self) -> DynamicCache | None:
        return DynamicCache(config=self.model.config) if self.path == "cached" else None

    def __call__(self, ids: Tensor, mask_AS: Tensor, position: Tensor, cache: DynamicCache | None) -> Tensor:
        """Logits [A, V] after the last of ``ids``; with a cache, ``ids`` are only the slots that are new to it."""
        arguments: dict[str, Any] = {"input_ids": ids, **self.last_only}
        if self.takes_mask:
            arguments["attention_mask"] = mask_AS
        if self.takes_positions:
            arguments["position_ids"] = position
        if self.takes_cache_switch:
            arguments["use_cache"] = cache is not None
        if cache is not None:
            arguments["past_key_values"] = cache
        logits: Tensor = self.model(**arguments).logits
        return logits[:, -1]


class _Decoding:
    """Decodes one batch of prompts; ``advance`` samples one token for every row in the batch."""

    def __init__(
        self,
        forward: _Forward,
        tokens: Tokens,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        settings: SamplingSettings,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.step = 0
        self.answers: dict[int, _Answer] = {}
        self._forward, self._tokens, self._settings, self._on_text = forward, tokens, settings, on_text
        self._keys = keys
        self._rows = list(rows)  # row of the request in each slot of the batch
        self._running = [True] * len(rows)
        self.n_running = len(rows)
        self._tracker = StopTracker(tokens, settings.stop_strings)
        self._streams = {row: TextStream(tokens, settings.stop_strings) for row in rows} if on_text else {}
        self._logprobs: dict[int, list[float]] = {row: [] for row in rows}

        chosen = [prompts[row] for row in rows]
        # A mask that hides nothing is dropped, and PyTorch's CPU attention for grouped queries is 3 times slower in
        # bfloat16 without one: one more padding slot keeps it.
        spare = forward.path == "cached" and forward.device.type == "cpu"
        ids_AS, mask_AS = left_padded(chosen, tokens.pad_id, max(map(len, chosen)) + spare)
        self._cache = forward.new_cache()
        self._ids = ids_AS.to(forward.device)
        self._n_slots = ids_AS.shape[1]
        # One allocation for all steps: a mask that grows is a copy a step.
        more = torch.ones(len(rows), settings.max_new_tokens, dtype=torch.int64)
        self._mask = torch.cat([mask_AS.long(), more], dim=1).to(forward.device)
        self._position = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._uniform_AT: Tensor | None = None
        if settings.temperature > 0:
            drawn = uniforms([keys[row] for row in rows], settings.max_new_tokens)
            self._uniform_AT = torch.from_numpy(drawn).to(forward.device)

    @torch.inference_mode()
    def advance(self) -> int:
        """Sample a token for each row and take out the rows that ended; how many did."""
        end = self._n_slots + self.step
        new = self._ids.shape[1]  # all prompt slots first, then one a step (all, without a cache)
        logits_AV = self._forward(self._ids, self._mask[:, :end], self._position[:, end - new : end], self._cache)
        uniform_A = None if self._uniform_AT is None else self._uniform_AT[:, self.step]
        token_A, logprob_A = draw(logits_AV, uniform_A, self._settings.temperature)
        self.step += 1
        ended = self._record(token_A.tolist(), logprob_A.tolist())
        token_A1 = token_A[:, None]
        self._ids = token_A1 if self._cache is not None else torch.cat([self._ids, token_A1], dim=1)
        if 0 < self.n_running <= COMPACT_BELOW * len(self._rows):
            self._compact()
        return ended

    def _record(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> int:
        ended = 0
        eos_ids, is_last = self._tokens.eos_ids, self.step == self._settings.max_new_tokens
        for slot, row in enumerate(self._rows):  # once a token: keep it short
            if not self._running[slot]:
                continue
            token_id = token_ids[slot]
            self._logprobs[row].append(logprobs[slot])
            hit = self._tracker.push(row, token_id)
            if token_id in eos_ids or hit is not None or is_last:
                self.answers[row] = self._answer(row, hit)
                self._running[slot] = False
                ended += 1
            if self._on_text is not None:
                self._emit(row)
        self.n_running -= ended
        return ended

    def _emit(self, row: int) -> None:
        stream, answer = self._streams[row], self.answers.get(row)
        text = stream.push(self._tracker.ids(row)) if answer is None else stream.finish(answer.text)
        if text and self._on_text is not None:
            self._on_text(row, text)

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
        logprobs = self._logprobs[row][:n_actions]
        if not np.isfinite(logprobs).all():
            raise DivergenceError(
                f"sampling prompt {self._keys[row].prompt_id!r} gave a log-probability that is not finite at answer "
                f"token {int(np.argmin(np.isfinite(logprobs)))}: the policy's logits hold NaN or inf. Resume from an "
                "earlier checkpoint with a smaller learning rate, or in float32"
            )
        return _Answer(ids[:n_actions] + swapped, n_actions, logprobs, finish, text)

    def _compact(self) -> None:
        """Take the rows that ended out of the batch."""
        kept = [slot for slot, running in enumerate(self._running) if running]
        index_A = torch.tensor(kept, device=self._ids.device)
        self._rows = [self._rows[slot] for slot in kept]
        self._running = [True] * len(kept)
        self._ids, self._mask, self._position = (x[index_A] for x in (self._ids, self._mask, self._position))
        if self._uniform_AT is not None:
            self._uniform_AT = self._uniform_AT[index_A]
        if self._cache is not None:
            self._cache.batch_select_indices(index_A)


def left_padded(sequences: Sequence[Sequence[int]], pad_id: int, width: int) -> tuple[Tensor, Tensor]:
    """Ids (int64) and mask (bool), both [B, width], padded on the left."""
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in sequences])
    lengths = torch.tensor([len(row) for row in sequences])
    return ids, torch.arange(width) >= width - lengths[:, None]


def _rollout(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[_Answer],
    keys: Sequence[SampleKey],
    policy_version: int,
    device: torch.device,
) -> Rollout:
    prompt_ids, prompt_mask = left_padded(prompts, 0, max(map(len, prompts)))
    width = max(len(answer.ids) for answer in answers)
    slot_T = torch.arange(width)
    length_B = torch.tensor([len(answer.ids) for answer in answers])
    n_actions_B = torch.tensor([answer.n_actions for answer in answers])

    def right_padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)

    return Rollout(
        prompt_ids_BP=prompt_ids.to(device),
        prompt_mask_BP=prompt_mask.to(device),
        response_ids_BT=right_padded([answer.ids for answer in answers], torch.int64).to(device),
        response_mask_BT=(slot_T < length_B[:, None]).to(device),
        action_mask_BT=(slot_T < n_actions_B[:, None]).to(device),
        logprob_BT=right_padded([answer.logprobs for answer in answers], torch.float32).to(device),
        finish=tuple(answer.finish for answer in answers),
        texts=tuple(answer.text for answer in answers),
        keys=tuple(keys),
        policy_version=policy_version,
    )


def _chunks(
    rows: Sequence[int], prompts: Sequence[Sequence[int]], batch_size: int | None, *, equal_lengths: bool
) -> Iterator[list[int]]:
    """Rows in batches; of one prompt length each where the model may not understand padding."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        groups[len(prompts[row]) if equal_lengths else 0].append(row)
    for group in groups.values():
        size = batch_size or len(group)
        yield from (group[start : start + size] for start in range(0, len(group), size))


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], keys: Sequence[SampleKey], settings: SamplingSettings
) -> None:
    if not prompts or len(prompts) != len(keys):
        raise ValueError(f"one key for each of at least one prompt expected, got {len(prompts)} and {len(keys)}")
    if not all(prompts):
        raise ValueError(f"prompt {next(i for i, p in enumerate(prompts) if not p)} has no token: start it with BOS")
    if settings.max_new_tokens < 1 or settings.temperature < 0:
        raise ValueError(f"max_new_tokens must be at least 1 and temperature at least 0, got {settings}")
    n_positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if n_positions is not None and longest + settings.max_new_tokens > n_positions:
        raise ConfigError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new tokens do not fit the model's "
            f"{n_positions} positions: lower data.max_prompt_tokens or the cap on new tokens"
        )
