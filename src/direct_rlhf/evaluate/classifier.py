"""Toxicity classifiers, each in the one place that imports it.

    profanity-check   the offline linear model; its wheel carries a joblib file, which is code and is loaded from the
                      installed, hash-checked package and from nowhere else
    wordlist          no scores: an answer is toxic if it holds a listed word
    detoxify          the Detoxify package, if it is installed; ``path`` is its checkpoint, else it fetches its own
    perspective       the hosted Perspective API (perspective.py)
    guard             a local model that says safe or unsafe, or a text classifier (guard.py); ``path`` is its folder

A scorer gives None for a text that it could not score: such an item has failed, and is never 0.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from direct_rlhf.data.types import Turns
from direct_rlhf.errors import ConfigError

Scorer = Callable[[Sequence[str]], Sequence[float | None]]  # texts -> P(toxic)
FIELD = "evaluation.toxicity.classifier"
DETOXIFY_BATCH = 32


@runtime_checkable
class DialogueScorer(Protocol):
    """A scorer that also reads what was asked."""

    def of_dialogues(self, asked: Sequence[tuple[Turns, str]]) -> Sequence[float | None]:
        """P(toxic) of each answer to its prompt."""


def load_classifier(
    name: str, path: Path | None = None, *, template: str | None = None, device: str = "cpu"
) -> tuple[str, Scorer | None]:
    """(what is used, its scorer): the word list has none, and `auto` takes it where profanity-check is not installed.

    Errors: ConfigError if what is asked for by name is not installed, or lacks its key or its model.
    """
    if name == "detoxify":
        return name, _detoxify(path, device)
    if name == "perspective":
        from direct_rlhf.evaluate.perspective import Perspective

        return name, Perspective.from_environment()
    if name == "guard":
        from direct_rlhf.evaluate.guard import load_guard

        if path is None:
            raise ConfigError(f"{FIELD} = guard: classifier_path is not set. Give the folder of the guard model.")
        return f"guard: {path.name}", load_guard(path, template, device=device)
    if name != "wordlist":
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            if name == "profanity-check":
                raise ConfigError(
                    "evaluation.toxicity.classifier = profanity-check: it is not installed. Install "
                    "direct-rlhf[toxicity], or set the classifier to wordlist."
                ) from error
        else:
            return "profanity-check", lambda texts: [float(p) for p in predict_prob(list(texts))]
    return "wordlist", None


def finite(score: Any) -> float | None:
    """A probability as a scorer gives it; None for what is none (NaN, a text, a number outside 0 to 1)."""
    if isinstance(score, bool):
        return None
    try:
        number = float(score)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and 0 <= number <= 1 else None


def _detoxify(checkpoint: Path | None, device: str) -> Scorer:
    try:
        from detoxify import Detoxify
    except ImportError as error:
        raise ConfigError(
            f"{FIELD} = detoxify: it is not installed. Run `pip install detoxify`, or choose another classifier."
        ) from error
    options = {} if checkpoint is None else {"checkpoint": str(checkpoint)}
    model = Detoxify("original", device=device, **options)

    def score(texts: Sequence[str]) -> list[float | None]:
        scores: list[float | None] = []
        for start in range(0, len(texts), DETOXIFY_BATCH):
            scores += map(finite, model.predict(list(texts[start : start + DETOXIFY_BATCH]))["toxicity"])
        return scores

    return score
