"""The sampler: any Hugging Face causal language model, a key-value cache, exact log-probabilities.

    fill free rows with prompts -> one token for every running row -> take out what ended -> again

Models of the Llama family run in our own decoder (`decoder.py`), where a waiting prompt takes a finished answer's row
at once; any other runs through its own forward (`fallback.py`), batch after batch. A sample depends on its key and its
prompt alone: each row draws its uniforms from its own counter-based stream, and a token is the inverse of the
cumulative distribution at its uniform.

Legend: B answers, A rows in the batch, V vocabulary.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.rollout.answers import Answers
from direct_rlhf.rollout.decoder import Decoder, supports
from direct_rlhf.rollout.fallback import ModelDecoder
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings

POLL_EVERY = 4  # steps between two looks at should_stop
REFILL = 0.125  # share of the rows that must be free before prompts take them: one forward for several prompts
KEEP_ABOVE = 0.875  # share of running rows down to which finished ones stay: taking them out must pay
BLOCKS = 64  # of the vocabulary, into which the cumulative distribution is cut

SamplerPath = Literal["fast", "cached", "uncached"]
SAMPLERS: dict[SamplerPath, str] = {
    "fast": "our own decoder",
    "cached": "the model's own forward with a key-value cache (our decoder does not know this architecture)",
    "uncached": "the model's own forward without a cache, which is slow (it keeps a state of its own)",
}


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
    answers = Answers(tokens, prompts, keys, settings, on_text)
    longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with _eval_mode(model), torch.inference_mode():
        for decoder, rows in _batches(model, tokens, longest_first, prompts, settings, batch_size):
            sampling = _Sampling(decoder, answers, rows, prompts, keys, settings, batch_size or len(rows))
            while sampling.goes_on:
                if should_stop is not None and sampling.n_steps % POLL_EVERY == 0 and should_stop():
                    raise Interrupted("sampling was asked to stop; its answers are drawn again on resume, the same")
                ended = sampling.advance()
                if on_step is not None:
                    on_step(ended)
    with torch.inference_mode(False):  # what goes on into training must not be an inference tensor
        return answers.rollout(policy_version, model.device)


def sampler_path(model: PreTrainedModel) -> SamplerPath:
    """How `sample` runs a model.

    fast: our own decoder; cached: the model's forward with a dynamic key-value cache; uncached: right, and slowest.
    """
    if supports(model):
        return "fast"
    return "cached" if ModelDecoder(model, pad_id=0, max_new_tokens=1).cached else "uncached"


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
    if uniform_A is not None and temperature != 1:
        logits_AV = logits_AV / temperature
    largest_A1 = logits_AV.amax(-1, keepdim=True)
    weight_AV = (logits_AV - largest_A1).exp_()
    if uniform_A is None:
        token_A1, total_A1 = logits_AV.argmax(-1, keepdim=True), weight_AV.sum(-1, keepdim=True)
    else:
        token_A1, total_A1 = _inverse(weight_AV, uniform_A[:, None])
    logprob_A1 = logits_AV.gather(-1, token_A1) - largest_A1 - total_A1.log()
    return token_A1[:, 0], logprob_A1[:, 0]


def _inverse(weight_AV: Tensor, uniform_A1: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative weight passes uniform * total, and the total: [A, 1] each.

    First the block of the vocabulary is found, then the token in it: two short cumulative sums instead of a long one.
    """
    rows, vocabulary = weight_AV.shape
    size = -(-vocabulary // BLOCKS)
    if vocabulary % size:
        weight_AV = torch.nn.functional.pad(weight_AV, (0, -vocabulary % size))
    weight_ANS = weight_AV.view(rows, -1, size)
    upto_AN = weight_ANS.sum(-1).cumsum(-1)
    total_A1 = upto_AN[:, -1:]
    aim_A1 = uniform_A1 * total_A1
    block_A1 = torch.searchsorted(upto_AN, aim_A1, right=True).clamp_(max=upto_AN.shape[1] - 1)  # NaN: beyond the end
    before_A1 = torch.where(block_A1 > 0, upto_AN.gather(1, (block_A1 - 1).clamp_(min=0)), 0.0)
    within_AS = weight_ANS.gather(1, block_A1[:, :, None].expand(-1, -1, size))[:, 0]
    upto_AS = within_AS.cumsum(-1)
    # Rounding may put the aim at or beyond the block's own sum: then it is the last token with any weight.
    aim_A1 = torch.minimum(aim_A1 - before_A1, upto_AS[:, -1:].nextafter(torch.zeros_like(total_A1)))
    place_A1 = torch.searchsorted(upto_AS, aim_A1, right=True).clamp_(max=size - 1)
    return (block_A1 * size + place_A1).clamp_(max=vocabulary - 1), total_A1


class _Sampling:
    """Runs a decoder until all of ``rows`` have ended; ``advance`` draws one token for every row in the batch."""

    def __init__(
        self,
        decoder: Decoder | ModelDecoder,
        answers: Answers,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        settings: SamplingSettings,
        capacity: int,
    ) -> None:
        self.n_steps = 0
        self._decoder, self._answers, self._prompts, self._settings = decoder, answers, prompts, settings
        self._waiting = deque(rows)
        self._capacity = capacity
        self._places: list[int | None] = []  # the row of the request in each of the decoder's rows; None: it has ended
        self._token_A = torch.empty(0, dtype=torch.int64, device=decoder.device)  # drawn last, of each place
        self._uniform: dict[int, np.ndarray] = {}
        if settings.temperature > 0:
            self._uniform = dict(zip(rows, uniforms([keys[row] for row in rows], settings.max_new_tokens), strict=True))

    @property
    def goes_on(self) -> bool:
        return bool(self._waiting) or any(row is not None for row in self._places)

    def advance(self) -> int:
        """One token for each running row, then prompts into the rows that became free; how many answers ended."""
        self.n_steps += 1
        ended = 0
        if any(row is not None for row in self._places):  # none is where all answers ended with their first token
            ended = self._draw(range(len(self._places)), self._decoder.step(self._token_A))
        free = [place for place, row in enumerate(self._places) if row is None]
        running = len(self._places) - len(free)
        if self._waiting and (not running or (self._decoder.refills and len(free) >= REFILL * self._capacity)):
            return ended + self._fill(free)
        if free and running <= KEEP_ABOVE * len(self._places):
            self._take_out(free)
        return ended

    def _fill(self, free: Sequence[int]) -> int:
        """Waiting prompts into free places and new ones, and the first token of their answers."""
        places = [*free, *range(len(self._places), self._capacity)][: len(self._waiting)]
        if not places:
            return 0
        self._places += [None] * (max(places) + 1 - len(self._places))
        for place in places:
            self._places[place] = self._waiting.popleft()
        prompts = [self._prompts[row] for row in map(self._places.__getitem__, places) if row is not None]
        logits_AV = self._decoder.prefill(places, prompts)
        more = len(self._places) - len(self._token_A)
        self._token_A = torch.nn.functional.pad(self._token_A, (0, more))
        return self._draw(places, logits_AV)

    def _draw(self, places: Sequence[int], logits_AV: Tensor) -> int:
        """Draw for these places; those whose answer ended become free."""
        rows = [self._places[place] for place in places]
        uniform_A = None
        if self._uniform:
            drawn = [0.0 if row is None else self._uniform[row][self._answers.length(row)] for row in rows]
            uniform_A = torch.tensor(drawn, dtype=torch.float32).to(logits_AV.device)
        token_A, logprob_A = draw(logits_AV, uniform_A, self._settings.temperature)
        if len(places) == len(self._places):
            self._token_A = token_A
        else:
            self._token_A[torch.tensor(places, device=token_A.device)] = token_A
        running = [i for i, row in enumerate(rows) if row is not None]
        if len(running) < len(rows):
            token_A, logprob_A = (x[torch.tensor(running, device=x.device)] for x in (token_A, logprob_A))
        ended = self._answers.add([row for row in rows if row is not None], token_A.tolist(), logprob_A)
        freed = [places[running[i]] for i in ended]
        for place in freed:
            self._places[place] = None
        if freed:
            self._decoder.rest(freed)
        return len(freed)

    def _take_out(self, free: Sequence[int]) -> None:
        """Take the rows that ended out of the batch, moving as few as can be."""
        n = len(self._places) - len(free)
        kept = list(range(n))
        holes = [place for place in free if place < n]
        last = [place for place in range(n, len(self._places)) if self._places[place] is not None]
        for hole, place in zip(holes, last, strict=True):
            kept[hole] = place
        if n:
            self._decoder.keep(kept)
        self._places = [self._places[place] for place in kept]
        self._token_A = self._token_A[torch.tensor(kept, dtype=torch.int64, device=self._token_A.device)]


def _batches(
    model: PreTrainedModel,
    tokens: Tokens,
    rows: Sequence[int],
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    batch_size: int | None,
) -> Iterator[tuple[Decoder | ModelDecoder, list[int]]]:
    """A decoder with all rows, or one after the other with those that it runs together."""
    if supports(model):
        longest, capacity = max(map(len, prompts)), min(batch_size or len(rows), len(rows))
        slots = longest + settings.max_new_tokens
        yield Decoder(model, rows=capacity, slots=slots, longest=longest, refills=capacity < len(rows)), list(rows)
        return
    cached = sampler_path(model) == "cached"
    groups: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        groups[0 if cached else len(prompts[row])].append(row)  # without a cache there may be no mask either
    for group in groups.values():
        size = batch_size or len(group)
        for start in range(0, len(group), size):
            decoder = ModelDecoder(model, pad_id=tokens.pad_id, max_new_tokens=settings.max_new_tokens)
            yield decoder, group[start : start + size]


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
