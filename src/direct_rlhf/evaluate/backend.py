"""lm-eval's model interface over our own forward and sampler. Importing this module imports lm_eval."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import ConfigError
from direct_rlhf.evaluate.generate import Ask, generate
from direct_rlhf.evaluate.scoring import Request, score_continuations
from direct_rlhf.evaluate.trees import context_length
from direct_rlhf.models.memory import ChunkSize

DEFAULT_NEW_TOKENS = 256  # lm-eval's own default of max_gen_toks
NEUTRAL = {"top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0}  # accepted, since these values have no effect

DocKey = tuple[str, int]  # (task, document)
Ids = Sequence[int] | NDArray[np.int32]
Pair = tuple[tuple[str, str], Ids, list[int]]  # (texts, context ids, continuation ids)


@dataclass
class Notes:
    """What happened to documents beyond the results that lm-eval takes."""

    failures: dict[DocKey, str] = field(default_factory=dict)  # reason, a short fixed word
    finish: dict[DocKey, str] = field(default_factory=dict)  # of generated answers: eos, stop or length
    boundary_merges: Counter[str] = field(default_factory=Counter)  # task -> requests with a token across the border
    truncated: Counter[str] = field(default_factory=Counter)  # task -> requests that the context length cut on the left
    capped: Counter[str] = field(default_factory=Counter)  # task -> answers whose cap the context length lowered


class LanguageModelBackend(TemplateLM):
    """Scores and generates for lm-eval. Results keep the order of the requests.

    A request whose log-probability is not finite, or whose answer could not be sampled, is noted in ``notes.failures``;
    what lm-eval computes from it must not be used.
    ``on_done`` is told how many requests are finished, and may raise to stop; ``working`` is entered while the model
    runs.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tokens,
        *,
        batch: ChunkSize,
        seed: int,
        share: bool = True,
        on_done: Callable[[int], None] = lambda done: None,
        working: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.batch = batch
        self.seed = seed
        self.share = share
        self.on_done = on_done
        self.working = working
        self.notes = Notes()

    @property
    def max_length(self) -> int:
        return context_length(self.model)

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.eos_id if self.tokens.bos_id is None else self.tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of content; the BOS comes first where the tokenizer itself puts one, unless the flag is False."""
        return self.tokens.encode(string, bos=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = self._encode_pairs(requests)
        results = self._loglikelihood_tokens(pairs)
        for request, (_, context, continuation), (logprob, _) in zip(requests, pairs, results, strict=True):
            if len(context) + len(continuation) > self.max_length + 1:
                self.notes.truncated[str(request.task_name)] += 1
            if not math.isfinite(logprob):
                too_long = len(continuation) > self.max_length
                self.notes.failures[_key(request)] = "continuation_too_long" if too_long else "non_finite"
        return results

    def _encode_pairs(self, requests: Sequence[Instance]) -> list[Pair]:
        """lm-eval's own rule: trailing spaces go to the continuation, both are encoded as one and cut by count.

        A text that several requests have is encoded once; an empty context is the prefix token.
        """
        texts = []
        for context, continuation in (request.args for request in requests):
            stripped = context.rstrip()
            texts.append((stripped, context[len(stripped) :] + continuation))
        contexts = list(dict.fromkeys(context for context, _ in texts if context))
        ids_of = {
            context: np.array(ids, dtype=np.int32)
            for context, ids in zip(contexts, self.tokens.encode_many(contexts, bos=True), strict=True)
        }
        wholes = self.tokens.encode_many((context + continuation for context, continuation in texts), bos=True)
        pairs: list[Pair] = []
        for request, (context, continuation), whole in zip(requests, texts, wholes, strict=True):
            if context:
                ids = ids_of[context]
                merged = not np.array_equal(ids, whole[: len(ids)])
                self.notes.boundary_merges[str(request.task_name)] += merged
                pairs.append((request.args, ids, whole[len(ids) :]))
            else:
                own = self.tok_encode(continuation, add_special_tokens=False)
                if own[:1] == [self.prefix_token_id]:
                    del own[0]
                pairs.append((request.args, [self.prefix_token_id], own))
        return pairs

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        cut = [_truncate(context, continuation, self.max_length) for _, context, continuation in requests]
        with self.working():
            scores = score_continuations(self.model, cut, batch=self.batch, share=self.share, on_batch=self.on_done)
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each token once, the first given the prefix token; long texts in windows with maximal context."""
        windows: list[Pair] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(pair)
                windows.append((("", ""), context, continuation))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += logprob
        for request, total in zip(requests, totals, strict=True):
            if not math.isfinite(total):
                self.notes.failures[_key(request)] = "non_finite"
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation up to the earliest of ``until``, greedy unless the task says do_sample."""
        groups: dict[GenerationSettings, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(generation_settings(request.args[1], str(request.task_name)), []).append(index)
        texts = [""] * len(requests)
        for settings, members in groups.items():
            # lm-eval refuses where the answer's cap leaves no room for the prompt; here each has at least half
            new_tokens = min(settings.max_new_tokens, self.max_length // 2)
            room = self.max_length - new_tokens
            if new_tokens < settings.max_new_tokens:
                self.notes.capped.update(str(requests[i].task_name) for i in members)
            asks = [Ask(self._prompt(requests[i], room), "/".join(map(str, _key(requests[i])))) for i in members]
            with self.working():
                answers = generate(
                    self.model,
                    self.tokens,
                    asks,
                    max_new_tokens=new_tokens,
                    temperature=settings.temperature,
                    stop_strings=settings.until,
                    batch=self.batch,
                    seed=self.seed,
                    on_done=self.on_done,
                )
            for i, answer in zip(members, answers, strict=True):
                texts[i] = answer.text
                if answer.failure:
                    self.notes.failures[_key(requests[i])] = answer.failure
                else:
                    self.notes.finish[_key(requests[i])] = answer.finish
        return texts

    def _prompt(self, request: Instance, room: int) -> tuple[int, ...]:
        ids = self.tok_encode(request.args[0])
        self.notes.truncated[str(request.task_name)] += len(ids) > room
        return tuple(ids[-room:]) or (self.prefix_token_id,)


@dataclass(frozen=True)
class GenerationSettings:
    """What a task's ``generation_kwargs`` ask for."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float  # 0 = greedy


def generation_settings(kwargs: Mapping[str, Any], task: str) -> GenerationSettings:
    """ConfigError for a setting that would be ignored: a number made under other settings is another number."""
    left = {key: value for key, value in kwargs.items() if NEUTRAL.get(key) != value}
    until = left.pop("until", ())
    new_tokens = [left.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in left]
    temperature = float(left.pop("temperature", 0.0) or 0.0)
    samples = bool(left.pop("do_sample", temperature > 0))
    if left:
        raise ConfigError(
            f"task {task}: generation_kwargs {', '.join(sorted(left))} are not known here. Known are until, "
            "max_gen_toks, do_sample and temperature. Remove them from the task, or leave the task out."
        )
    return GenerationSettings(
        until=(until,) if isinstance(until, str) else tuple(text for text in until if text),
        max_new_tokens=int(new_tokens[0]) if new_tokens else DEFAULT_NEW_TOKENS,
        temperature=(temperature or 1.0) if samples else 0.0,
    )


def _truncate(context: Ids, continuation: list[int], max_length: int) -> Request:
    """lm-eval's cut: of context + continuation the last max_length + 1 ids, so that the context loses from the left.

    A continuation that leaves no room for any context gets no score.
    """
    room = max_length + 1 - len(continuation)
    return (context[-room:], continuation) if room > 0 else (context, [])


def _key(request: Instance) -> DocKey:
    return str(request.task_name), int(request.doc_id or 0)
