"""vLLM behind its own server: `/v1/completions` for answers, its development routes for weights.

What may pass is tried again: 408, 425, 429, 5xx, a timeout, a broken connection, a reply that is no JSON. The wait
doubles from 1 s up to 60 s and is never shorter than the server's `Retry-After`. Requests wait in daemon threads, so
that a signal is obeyed at once.

Weights go through a folder: pause, load, forget what is cached, resume. That every worker has loaded them is what the
server's 200 says. Where it knows versions (vLLM of summer 2026) the new one is named to it, and asked for again when
the answers are there: a server that was restarted, or given weights by somebody else, does not know it.
"""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from direct_rlhf.errors import BackendError, Interrupted
from direct_rlhf.recipe.schema import VllmSection
from direct_rlhf.rollout.vllm import LOWEST, Ask, Said, checked
from direct_rlhf.run.workers import (
    FIRST_WAIT,
    LONGEST_RETRY_AFTER,
    LONGEST_WAIT,
    in_threads,
    key_from,
    retry_after,
    without_key,
)

T = TypeVar("T")

STOPPED = "sampling was asked to stop; its answers are drawn again on resume"
RETRIED = frozenset({408, 425, 429})
ABSENT = frozenset({404, 405})
DEVELOPMENT = f"Start it with VLLM_SERVER_DEV_MODE=1 (vLLM {LOWEST} or newer), where only this run can reach it."


@dataclass(frozen=True)
class _Again:
    """A try that failed in a way that may pass."""

    detail: str
    retry_after: float = 0.0


@dataclass(frozen=True)
class _Refused:
    """A status that would come again."""

    status: int
    detail: str


class Server:
    """A running `vllm serve`."""

    def __init__(self, section: VllmSection, *, first_wait: float = FIRST_WAIT) -> None:
        """Errors: ConfigError if the environment variable with the key is not set."""
        assert section.url is not None
        self._section, self._first_wait = section, first_wait
        self._address = section.url.rstrip("/").removesuffix("/v1")
        self._key = key_from(section.api_key_env, "rollout.vllm.api_key_env", "the vLLM server")
        self._model = section.model or ""
        self._knows_versions = True

    @property
    def name(self) -> str:
        return f"vLLM server {self._address}"

    def connect(self, longest: int, should_stop: Callable[[], bool]) -> str:
        """Is it there, with one model that takes ``longest`` tokens of prompt and answer? The model's name."""
        body = self._wait(should_stop, partial(self._must, "/v1/models", None))
        served = {str(card["id"]): card for card in _list(body, "data") if isinstance(card, Mapping) and "id" in card}
        if self._model not in served and not (self._section.model is None and len(served) == 1):
            wanted = "no model is named" if self._section.model is None else f"not {self._model}"
            raise BackendError(
                f"{self.name}: serves {', '.join(sorted(served)) or 'no model'}, and {wanted}. "
                "Set rollout.vllm.model to one of them."
            )
        self._model = self._section.model or next(iter(served))
        room = served[self._model].get("max_model_len")
        if isinstance(room, int) and room < longest:
            raise BackendError(
                f"{self.name}: takes {room} tokens, and the longest prompt with its answer has {longest}. Start it "
                f"with --max-model-len {longest}."
            )
        return self._model

    def load(self, folder: Path, version: str, should_stop: Callable[[], bool]) -> None:
        self._wait(should_stop, partial(self._load, folder, version))

    def replies(
        self, asks: Sequence[Ask], sampling: Mapping[str, Any], vocabulary: int, should_stop: Callable[[], bool]
    ) -> list[Said]:
        works = [partial(self._reply, ask, sampling, vocabulary) for ask in asks]
        return in_threads(works, self._section.concurrency, should_stop, stopped=STOPPED)

    def confirm(self, version: str, should_stop: Callable[[], bool]) -> None:
        if not self._knows_versions:
            return
        found = self._wait(should_stop, partial(self._call, "/weight_info", None))
        if isinstance(found, _Refused):
            self._knows_versions = False
            return
        said = found.get("weight_version") if isinstance(found, Mapping) else found
        if said != version:
            raise BackendError(
                f"{self.name}: its weights are {said!r}, and {version!r} were loaded before it was asked. It was "
                "started again, or somebody else loads weights into it. Nothing was trained on its answers; give the "
                "run a server of its own and go on with --resume."
            )

    def rest(self) -> bool:
        return True

    def close(self) -> None:
        return

    def _wait(self, should_stop: Callable[[], bool], work: Callable[[threading.Event], T]) -> T:
        return in_threads([work], 1, should_stop, stopped=STOPPED)[0]

    def _load(self, folder: Path, version: str, stopping: threading.Event) -> None:
        """A server whose loading failed stays paused: its weights are of two kinds."""
        self._must("/pause", {}, stopping, absent=DEVELOPMENT)
        loading = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._must(
            "/collective_rpc",
            loading,
            stopping,
            absent=DEVELOPMENT,
            hint=f"It must be vLLM {LOWEST} or newer, see {folder} under this path (rollout.vllm.weights), and serve "
            "the recipe's model.base. Start it again: it is paused, with weights of two kinds.",
        )
        emptied = self._must("/reset_prefix_cache", {}, stopping, absent=DEVELOPMENT)
        if isinstance(emptied, Mapping) and emptied.get("success") is False:
            raise BackendError(f"{self.name}: did not forget what it has cached of the weights before. Start it again.")
        self._must("/resume", {}, stopping, absent=DEVELOPMENT)
        named = self._call("/update_weight_version", {"new_version": version}, stopping)
        self._knows_versions = not isinstance(named, _Refused)

    def _reply(self, ask: Ask, sampling: Mapping[str, Any], vocabulary: int, stopping: threading.Event) -> Said:
        body = {
            "model": self._model,
            "prompt": list(ask.ids),
            "max_tokens": ask.max_tokens,
            "seed": ask.seed,
            "return_token_ids": True,
            **sampling,
        }
        found = self._must("/v1/completions", body, stopping)
        choices = _list(found, "choices")
        choice = choices[0] if choices and isinstance(choices[0], Mapping) else {}
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise BackendError(
                f"{self.name}: its reply holds no token ids (return_token_ids). Use vLLM {LOWEST} or newer, without a "
                f"proxy that drops them. It began: {without_key(json.dumps(found), self._key)[:120]}"
            )
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise BackendError(
                f"{self.name}: its reply holds no log-probabilities of the sampled tokens. Start it without a limit on "
                "them (--max-logprobs), and use no proxy that drops them."
            )
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            raise BackendError(
                f"{self.name}: it went on from other tokens than it was sent. Start it without anything that changes "
                "prompts."
            )
        if choice.get("finish_reason") not in ("stop", "length"):
            raise BackendError(
                f"{self.name}: it broke an answer off ({choice.get('finish_reason')}). Does somebody else pause it? "
                "Give the run a server of its own and go on with --resume."
            )
        return checked(Said(ids, [float(value) for value in values]), vocabulary, self.name)

    def _must(
        self, path: str, body: Mapping[str, Any] | None, stopping: threading.Event, *, absent: str = "", hint: str = ""
    ) -> Any:
        """The answer of a route that there must be."""
        found = self._call(path, body, stopping, final=500 if hint else 0)
        if not isinstance(found, _Refused):
            return found
        todo = absent if found.status in ABSENT and absent else hint
        if found.status in (401, 403):
            todo = "Put its key into an environment variable and name that in rollout.vllm.api_key_env."
        raise BackendError(f"{self.name}: {path} gave {found.status}: {found.detail or 'no word'}. {todo}".rstrip())

    def _call(self, path: str, body: Mapping[str, Any] | None, stopping: threading.Event, *, final: int = 0) -> Any:
        """POST (GET without a body), with further tries; JSON, None for an empty reply, or a refusal.

        ``final`` is a status that counts as one.
        """
        attempt = 0
        while True:
            found = self._attempt(path, body, final)
            if not isinstance(found, _Again):
                return found
            if attempt == self._section.retries or found.retry_after > LONGEST_RETRY_AFTER:
                raise BackendError(
                    f"{self.name}: {path} failed {attempt + 1} times, the last time with: {found.detail}. Is it "
                    "running, and within reach? Nothing was trained meanwhile; start it and go on with --resume."
                )
            stopping.wait(max(found.retry_after, min(LONGEST_WAIT, self._first_wait * 2**attempt)))
            if stopping.is_set():
                raise Interrupted("waiting for vLLM was broken off")
            attempt += 1

    def _attempt(self, path: str, body: Mapping[str, Any] | None, final: int) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self._section.timeout) as response:
                text = response.read()
            return json.loads(text) if text.strip() else None
        except urllib.error.HTTPError as error:
            said = without_key(error.read().decode(errors="replace"), self._key)
            if error.code != final and (error.code in RETRIED or error.code >= 500):
                return _Again(f"status {error.code} ({said})", retry_after(error.headers.get("Retry-After")))
            return _Refused(error.code, said)
        except (OSError, HTTPException, ValueError) as error:  # no connection, a timeout, a reply cut off; no JSON
            return _Again(without_key(str(error), self._key) or type(error).__name__)


def _list(body: Any, name: str) -> list[Any]:
    found = body.get(name) if isinstance(body, Mapping) else None
    return found if isinstance(found, list) else []
