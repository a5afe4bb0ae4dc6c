"""A judge behind a server that speaks the OpenAI chat protocol.

What may pass is tried again: 408, 409, 425, 429, 5xx, a timeout, a broken connection, a reply that is no such JSON, an
empty reply. The wait doubles from 1 s up to 60 s, with jitter, and is never shorter than the server's `Retry-After`.
Every other refusal (400, 401, 403 ...) is final at once. A request that failed for good is a failed item and no score;
after GIVE_UP_AFTER of them in a row the evaluation stops, to go on when the server does.

The `openai` library's own retries are off: they know no budget and no request to stop.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from direct_rlhf.errors import Interrupted, JudgeError
from direct_rlhf.evaluate.chats import Keep, Reply, Request
from direct_rlhf.randomness import generator
from direct_rlhf.recipe.schema import JudgeSection
from direct_rlhf.run.workers import (
    FIRST_WAIT,
    LONGEST_RETRY_AFTER,
    LONGEST_WAIT,
    in_threads,
    key_from,
    retry_after,
    without_key,
)

GIVE_UP_AFTER = 8  # failed requests in a row
CHARACTERS_PER_TOKEN = 2  # fewer than any common text has, so that a guess of tokens is never too low
OF_ONE_REQUEST = frozenset({"http_400", "http_413", "http_422"})  # too long, say; if none is answered, of the settings
RETRIED = frozenset({408, 409, 425, 429})
GO_ON = "Judgments that are there are kept and not paid for again; go on with --resume."


@dataclass(frozen=True)
class _Again:
    """A try that failed in a way that may pass."""

    word: str
    detail: str
    retry_after: float = 0.0


class Budget:
    """Calls and money that may still be spent. Each request counts, also one that is tried again."""

    def __init__(self, max_calls: int | None, max_cost: float | None, *, calls: int = 0, cost: float = 0.0) -> None:
        self.max_calls, self.max_cost, self.calls, self.cost = max_calls, max_cost, calls, cost
        self._lock = threading.Lock()

    def take(self, most: float) -> None:
        """Sets aside one call that costs ``most`` at the most. Errors: JudgeError if that passes a cap."""
        with self._lock:
            place = "evaluation.conversation.judging"
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise JudgeError(
                    f"judge: the cap of {self.max_calls} calls is reached. {GO_ON} Raise {place}.max_calls before."
                )
            if self.max_cost is not None and self.cost + most > self.max_cost:
                raise JudgeError(
                    f"judge: {self.cost:.4g} of the cap of {self.max_cost:g} are spent, and the next call may cost "
                    f"{most:.4g}. {GO_ON} Raise {place}.max_cost before."
                )
            self.calls += 1
            self.cost += most

    def settle(self, most: float, real: float) -> None:
        """What the call really cost takes the place of what was set aside."""
        with self._lock:
            self.cost += real - most


class EndpointChat:
    """Requests to a server, several at a time; replies are the same for any number of them."""

    def __init__(
        self,
        section: JudgeSection,
        budget: Budget,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        pause: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``pause`` waits some seconds and returns at once when the judge is to stop; ``clock`` reads dates in headers.

        Errors: ConfigError if the environment variable with the key is not set.
        """
        import openai

        self.name = f"endpoint ({section.model})"
        self._section, self._budget, self._should_stop, self._clock = section, budget, should_stop, clock
        self._pause = pause
        place = "evaluation.conversation.judging.api_key_env"
        self._key = key_from(section.api_key_env, place, "the judge's server")
        self._client = openai.OpenAI(
            base_url=section.base_url, api_key=self._key or "none", max_retries=0, timeout=section.timeout
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        section = self._section
        return {
            "endpoint": section.base_url,
            "model": section.model,
            "temperature": section.temperature,
            "max_tokens": section.max_tokens,
        }

    def replies(self, requests: Sequence[Request], keep: Keep) -> list[Reply]:
        """As the protocol says. At a stop or an error, what is under way is waited for: it is paid already.

        A second signal waits for nothing.
        """
        lost, answered = 0, False  # failed requests in a row; whether any was answered

        def seen(reply: Reply) -> None:
            nonlocal lost, answered
            answered = answered or not reply.failure
            if not reply.failure:
                lost = 0
            elif not (answered and reply.failure in OF_ONE_REQUEST):
                lost += 1
            if lost >= GIVE_UP_AFTER:
                raise JudgeError(
                    f"judge {self._section.base_url}: {lost} requests in a row failed, the last with "
                    f"{reply.failure} ({reply.detail}). {GO_ON}"
                )

        works = [partial(self._reply, index, request, keep) for index, request in enumerate(requests)]
        stopped = f"the judge was stopped on request. {GO_ON}"
        return in_threads(works, self._section.concurrency, self._should_stop, stopped=stopped, seen=seen, finish=True)

    def _reply(self, index: int, request: Request, keep: Keep, stopping: threading.Event) -> Reply:
        """One request with its further tries. A reply is kept before this worker sends anything else."""
        pause = self._pause or stopping.wait
        attempt = 0
        while True:
            if stopping.is_set():
                raise Interrupted(f"the judge was stopped. {GO_ON}")
            found = self._attempt(request)
            if isinstance(found, _Again):
                if attempt < self._section.retries and found.retry_after <= LONGEST_RETRY_AFTER:
                    pause(self._delay(request, attempt, found.retry_after))
                    attempt += 1
                    continue
                found = Reply(failure=found.word, detail=found.detail)
            keep(index, found)
            return found

    def _delay(self, request: Request, attempt: int, retry_after: float) -> float:
        """Between half and all of the doubled wait, so that requests that failed together do not return together."""
        jitter = 0.5 + 0.5 * float(generator("judge back-off", request.sha256, attempt).random())
        return max(retry_after, jitter * min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))

    def _attempt(self, request: Request) -> Reply | _Again:
        import openai

        most = self._most(request)
        self._budget.take(most)
        real = most  # what broke off may have been paid for
        try:
            raw = self._client.chat.completions.with_raw_response.create(**self._body(request))
            found = self._read(request, raw.http_response.text)
            real = found.cost if isinstance(found, Reply) else most
            return found
        except openai.APITimeoutError:
            return _Again("timeout", f"no reply in {self._section.timeout:g} s")
        except openai.APIStatusError as error:
            real = 0.0
            word, said = f"http_{error.status_code}", without_key(str(error), self._key)
            if error.status_code in RETRIED or error.status_code >= 500:
                return _Again(word, said, retry_after(error.response.headers.get("retry-after"), self._clock))
            return Reply(failure=word, detail=said)
        except openai.APIConnectionError as error:
            return _Again("connection", without_key(f"{error} {error.__cause__ or ''}", self._key))
        except (openai.APIError, ValueError) as error:
            return _Again("bad_reply", without_key(str(error), self._key))
        finally:
            self._budget.settle(most, real)

    def _body(self, request: Request) -> dict[str, Any]:
        section = self._section
        body: dict[str, Any] = {
            "model": section.model,
            "messages": [{"role": role, "content": text} for role, text in request.messages],
            section.limit_field: section.max_tokens,
        }
        return body if section.temperature is None else {**body, "temperature": section.temperature}

    def _read(self, request: Request, text: str) -> Reply | _Again:
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            content, finish = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            return _Again(
                "bad_reply", without_key(f"{type(error).__name__}: {error}; it began: {text[:80]!r}", self._key)
            )
        cost = self._cost(request, body.get("usage"), str(content or ""))
        if isinstance(content, str) and content.strip():
            return Reply(content, "length" if finish == "length" else "stop", cost=cost)
        if finish == "length":  # the cap went into thoughts that are not shown; another try would end the same
            return Reply("", "length", cost=cost)
        if finish == "content_filter":
            return Reply("", "content_filter", cost=cost)
        return _Again("empty_reply", "the reply holds no text")

    def _cost(self, request: Request, usage: object, content: str) -> float:
        """From the server's own count of tokens; from the number of characters where it gives none."""
        counts = usage if isinstance(usage, Mapping) else {}
        read, written = counts.get("prompt_tokens"), counts.get("completion_tokens")
        if not isinstance(read, int) or not isinstance(written, int):
            read, written = _characters(request) / CHARACTERS_PER_TOKEN, len(content) / CHARACTERS_PER_TOKEN
        return self._price(read, written)

    def _most(self, request: Request) -> float:
        return self._price(_characters(request) / CHARACTERS_PER_TOKEN, self._section.max_tokens)

    def _price(self, read: float, written: float) -> float:
        return (read * (self._section.price_in or 0.0) + written * (self._section.price_out or 0.0)) / 1e6


def _characters(request: Request) -> int:
    return sum(len(text) for _, text in request.messages)
