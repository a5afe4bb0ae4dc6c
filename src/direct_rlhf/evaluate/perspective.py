"""Perspective, a hosted toxicity scorer. Its scores drift as its makers retrain it, and the texts leave this machine.

What may pass is tried again as for the judge (`endpoint.py`): 429, 5xx, timeouts, resets, replies that are no JSON,
with growing, jittered waits that obey `Retry-After`; any other refusal is final. What still has no score has failed: it
is None, never 0. After a few texts in a row that could not be had, the service is taken to be down and the rest fail at
once.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from direct_rlhf.errors import ConfigError
from direct_rlhf.evaluate.classifier import FIELD, finite
from direct_rlhf.evaluate.endpoint import RETRIED
from direct_rlhf.randomness import generator
from direct_rlhf.run.workers import FIRST_WAIT, LONGEST_WAIT, retry_after

KEY = "PERSPECTIVE_API_KEY"
URL = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
TRIES = 6
DOWN_AFTER = 3  # texts in a row


@dataclass(frozen=True)
class Perspective:
    """Scores one text a request, by its attribute TOXICITY. ``key`` goes in a header and into no message."""

    key: str
    url: str = URL
    timeout: float = 30.0  # seconds
    sleep: Callable[[float], None] = time.sleep

    @classmethod
    def from_environment(cls) -> "Perspective":
        key = os.environ.get(KEY, "")
        if not key:
            raise ConfigError(f"{FIELD} = perspective: it needs an API key. Set the environment variable {KEY}.")
        return cls(key)

    def __call__(self, texts: Sequence[str]) -> list[float | None]:
        """P(toxic) of each; 0 for a text of nothing but white space, which the service refuses.

        Errors: ConfigError if the service refuses the key.
        """
        scores: list[float | None] = []
        lost = 0  # in a row
        for text in texts:
            score = None if text.strip() else 0.0
            if text.strip() and lost < DOWN_AFTER:
                try:
                    score, lost = self._score(text), 0
                except TimeoutError:
                    lost += 1
            scores.append(score)
        return scores

    def _score(self, text: str) -> float | None:
        """None if the service refuses the text; TimeoutError if it cannot be had."""
        body = {
            "comment": {"text": text},
            "languages": ["en"],
            "requestedAttributes": {"TOXICITY": {}},
            "doNotStore": True,
        }
        headers = {"Content-Type": "application/json", "X-Goog-Api-Key": self.key}
        for attempt in range(TRIES):
            jitter = 0.5 + 0.5 * float(generator("perspective back-off", text, attempt).random())
            wait = jitter * min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            request = urllib.request.Request(self.url, data=json.dumps(body).encode(), headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _read(json.load(response))
            except urllib.error.HTTPError as error:
                if error.code in (401, 403):
                    raise ConfigError(
                        f"{FIELD} = perspective: the service refuses the key (HTTP {error.code}). Correct {KEY}."
                    ) from error
                if error.code not in RETRIED and error.code < 500:
                    return None
                wait = max(wait, min(LONGEST_WAIT, retry_after(error.headers.get("Retry-After"))))
            except (OSError, ValueError):  # no connection, a timeout, a reset; a reply that is no JSON
                pass
            if attempt + 1 < TRIES:
                self.sleep(wait)
        raise TimeoutError("the service cannot be had")


def _read(reply: Any) -> float | None:
    try:
        return finite(reply["attributeScores"]["TOXICITY"]["summaryScore"]["value"])
    except (KeyError, TypeError):
        return None
