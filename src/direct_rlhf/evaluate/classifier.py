"""The offline toxicity classifier, in the one place that imports it.

The wheel of alt-profanity-check carries its model as a joblib file, which is code. It is loaded from the installed,
hash-checked package and from nowhere else.
"""

from collections.abc import Callable, Sequence

from direct_rlhf.errors import ConfigError

Scorer = Callable[[Sequence[str]], Sequence[float]]  # texts -> P(toxic)


def load_classifier(name: str) -> tuple[str, Scorer | None]:
    """(what is used, its scorer): profanity-check where it is installed, else the word list, which has no scorer.

    Errors: ConfigError if profanity-check is asked for by name and is not installed.
    """
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
