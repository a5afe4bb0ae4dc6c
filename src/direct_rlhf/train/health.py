"""Collapse detectors: what a PPO run looks like when it goes wrong, said in words with cause and remedy.

Statistics are per iteration over B answers; detectors look at the last few iterations.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

WINDOW = 3  # iterations in a row before a detector speaks


@dataclass(frozen=True)
class Alert:
    """One finding: a fixed name, what was seen, the usual cause, and what to do."""

    name: str
    seen: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen} Usual cause: {self.cause} What to do: {self.remedy}"


FAULTS = {
    "gradient_spike": (
        "an odd batch, or a learning rate at its limit.",
        "look at the batch; set optimiser.skip_spikes=true to leave such steps out, or lower the learning rate.",
    ),
    "nonfinite_step": (
        "numbers ran over: an odd batch, or a learning rate that is too high.",
        "the step was left out; look at the batch, or lower the learning rate.",
    ),
    "diverged": (
        "a learning rate that is too high, or a batch with numbers that run over.",
        "look at the batch; lower the learning rate; go on from the last checkpoint with --resume.",
    ),
}


def fault_alert(name: str, seen: str, batch: Sequence[str]) -> dict[str, Any]:
    """The line of alerts.jsonl for a fault of one optimiser step; ``batch`` are the ids of what it was trained on."""
    cause, remedy = FAULTS[name]
    return {**asdict(Alert(name, seen, cause, remedy)), "batch": list(batch)}


def text_statistics(texts: Sequence[str], prompt_ids: Sequence[str]) -> dict[str, float]:
    """Diversity of B answers.

    distinct_2            share of word pairs that are unique, over all answers
    repeated_4gram_rate   mean share of an answer's word 4-grams that repeat an earlier one of the same answer
    duplicate_rate        share of answers equal to the answer of another prompt
    rate_empty            share of answers without a word
    """
    words = [text.split() for text in texts]
    pairs = [pair for row in words for pair in pairwise(row)]
    repeated = []
    for row in words:
        grams = list(zip(row, row[1:], row[2:], row[3:], strict=False))
        if grams:
            repeated.append(1 - len(set(grams)) / len(grams))
    prompts_of: dict[str, set[str]] = {}
    for text, prompt in zip(texts, prompt_ids, strict=True):
        prompts_of.setdefault(" ".join(text.split()), set()).add(prompt)
    counts = Counter(" ".join(text.split()) for text in texts)
    duplicated = sum(n for text, n in counts.items() if len(prompts_of[text]) > 1)
    n = max(len(texts), 1)
    return {
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
        "repeated_4gram_rate": sum(repeated) / len(repeated) if repeated else 0.0,
        "duplicate_rate": duplicated / n,
        "rate_empty": sum(not row for row in words) / n,
    }


def detect(
    history: Sequence[Mapping[str, float]], *, cap: int, kl_target: float, mismatch_limit: float = math.inf
) -> list[Alert]:
    """Alerts that hold in each of the last `WINDOW` iterations' metrics (oldest first); shorter histories give none.

    ``mismatch_limit``: of KL(sampler || trainer), nats per token, where another engine samples.
    """
    if len(history) < WINDOW:
        return []
    recent = history[-WINDOW:]
    first = history[0]

    def always(test: str, limit: float, *, above: bool = True) -> bool:
        return all((row[test] > limit) if above else (row[test] < limit) for row in recent)

    last, alerts = recent[-1], []
    if always("kl_sequence", -0.5, above=False):
        alerts.append(
            Alert(
                "negative_kl",
                f"The KL to the reference is {last['kl_sequence']:.2f} nats, below 0 for {WINDOW} iterations.",
                "sampling and scoring differ (temperature, masks), or EOS is suppressed.",
                "stop the run; compare ppo.sampling with what the sampler was given.",
            )
        )
    if all(row.get("mismatch_kl", 0.0) > mismatch_limit for row in recent):
        alerts.append(
            Alert(
                "sampler_mismatch",
                f"Sampler and trainer are {last['mismatch_kl']:.3g} nats per token apart, over {mismatch_limit:g}.",
                "the engine's weights are stale, or its type, quantization, temperature or log-probability mode differ "
                "from the trainer's.",
                "serve the model in model.dtype with --logprobs-mode processed_logprobs; see the how-to on vLLM.",
            )
        )
    if always("kl_sequence", 2 * kl_target):
        alerts.append(
            Alert(
                "kl_high",
                f"The KL to the reference is {last['kl_sequence']:.1f} nats, over twice its target of {kl_target:g}.",
                "the learning rate is too high for the KL weight.",
                "lower ppo.optimiser.learning_rate or raise ppo.kl.coefficient.",
            )
        )
    if always("length_mean", 2.5, above=False):
        alerts.append(
            Alert(
                "eos_only",
                f"Answers have shrunk to {last['length_mean']:.1f} tokens on average.",
                "the reward model likes empty or very short answers.",
                "look at the fitness card's empty-answer line; set ppo.length.min_response_tokens.",
            )
        )
    elif always("length_mean", 0.3 * first["length_mean"], above=False):
        alerts.append(
            Alert(
                "shrinking",
                f"Answers are {last['length_mean']:.0f} tokens long, {first['length_mean']:.0f} at the start.",
                "short answers score higher; for a rambling base this may be what you want.",
                "read samples.jsonl; if answers are cut short, set ppo.length.min_response_tokens.",
            )
        )
    if always("rate_length_cut", 0.8) and len(history) > 2 * WINDOW:
        alerts.append(
            Alert(
                "never_ends",
                f"{last['rate_length_cut']:.0%} of the answers still run into the cap of {cap} tokens.",
                "nothing tells the policy to stop.",
                "add dialogue.stop_strings, set ppo.length.overlong_buffer, or raise ppo.sampling.max_new_tokens.",
            )
        )
    elif always("length_mean", 1.8 * first["length_mean"]) and always("length_mean", 0.5 * cap):
        alerts.append(
            Alert(
                "length_spike",
                f"Answers have grown from {first['length_mean']:.0f} to {last['length_mean']:.0f} tokens.",
                "the reward model pays for length.",
                "look at the fitness card's length correlation; set ppo.length.per_token_penalty.",
            )
        )
    if always("repeated_4gram_rate", 0.5):
        alerts.append(
            Alert(
                "repetition",
                f"{last['repeated_4gram_rate']:.0%} of the word 4-grams repeat within an answer.",
                "the policy has found a loop that the reward model likes.",
                "look at the fitness card's repetition line; raise ppo.kl.coefficient.",
            )
        )
    if always("duplicate_rate", 0.6) and last["kl_sequence"] > first["kl_sequence"] + 1:
        alerts.append(
            Alert(
                "one_answer",
                f"{last['duplicate_rate']:.0%} of the answers are given to several different prompts.",
                "mode collapse: one text scores well everywhere (often a refusal).",
                "raise ppo.kl.coefficient; give the reward model pairs where that text is the rejected one.",
            )
        )
    if always("reward_std", 1e-3, above=False):
        alerts.append(
            Alert(
                "flat_reward",
                f"All answers get nearly the same reward (standard deviation {last['reward_std']:.1e}).",
                "the reward model does not tell answers apart, or every answer is cut by the cap.",
                "run `direct-rlhf reward check`; look at rate_length_cut.",
            )
        )
    return alerts
