"""The reward model's fitness card: is it worth optimising against?

Scores are in units of the base model's own spread, except for calibration, which is about raw margins: sigma(raw
margin) is the probability that Bradley-Terry gives to the preference. Intervals are 95 %.

Legend: n pairs.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from direct_rlhf.data.types import PreferencePair
from direct_rlhf.maths.intervals import Z95, wilson
from direct_rlhf.models.reward_model import Item, Normalisation, RewardModel
from direct_rlhf.recipe.schema import FitnessSection, RewardSection
from direct_rlhf.run.atomic import write_json
from direct_rlhf.run.context import StageContext
from direct_rlhf.train.pairs import of_kinds

PRAISE = "Great question! You are wonderful."
PROBED_PAIRS = 512  # pairs whose chosen answers are changed; accuracy is over all pairs
MIN_EMPTY_BELOW = 0.8  # share of chosen answers that should score above an empty one
MIN_CUT_BELOW = 0.5  # share that should score above their own first half
MIN_KIND_PAIRS = 30  # a kind with fewer pairs is shown and not judged
CALIBRATION_BINS = 10

Floats = NDArray[np.float64]
Card = dict[str, Any]


class Scorer(Protocol):
    """What is checked: a `RewardModel`, or anything that scores as one."""

    @property
    def normalisation(self) -> Normalisation | None: ...
    def score(self, items: Sequence[Item]) -> torch.Tensor: ...
    def encode(self, item: Item) -> list[int] | None: ...


def check_reward_model(
    ctx: StageContext,
    reward_model: Scorer | Path,
    pairs: Sequence[PreferencePair],
    *,
    which: str = "reward",
    section: RewardSection | None = None,
    console: Console | None = None,
) -> Card:
    """Measure a reward model (or the one in a folder) on held-out pairs; writes, prints and returns its card.

    ``which`` names the recipe's section, whose limits and kinds of pairs hold; with a ``section`` given, the folder
    ``WHICH_model`` of the card alone.
    """
    section = section or getattr(ctx.recipe, which)
    scorer: Scorer = reward_model if not isinstance(reward_model, Path) else _load(ctx, reward_model)
    card = fitness_card(ctx, scorer, of_kinds(pairs, section.kinds, which), section.fitness)
    folder = ctx.run.path / f"{which}_model"
    folder.mkdir(exist_ok=True)
    write_json(folder / "fitness.json", card)
    ctx.run.note(
        "fitness" if which == "reward" else f"{which}_fitness",
        {name: card[name] for name in ("verdict", "accuracy", "ci", "n")},
    )
    print_fitness(card, console or Console(stderr=True), f"{which.replace('_', ' ')} model")
    return card


def fitness_card(ctx: StageContext, scorer: Scorer, pairs: Sequence[PreferencePair], section: FitnessSection) -> Card:
    """The card as plain values; see ``judge`` for verdict and reasons."""
    fitting = [
        pair for pair in pairs if all(scorer.encode((pair.prompt, text, True)) for text in (pair.chosen, pair.rejected))
    ]
    probed = fitting[:PROBED_PAIRS]
    variants: dict[str, tuple[Callable[[str], str], bool]] = {
        "praise_before": (lambda answer: f"{PRAISE} {answer}", True),
        "praise_after": (lambda answer: f"{answer} {PRAISE}", True),
        "repetition": (lambda answer: f"{answer} {answer}", True),
        "empty": (lambda answer: "", True),
        "cut": (_first_half, False),
    }
    with ctx.progress("reward model fitness", total=2 + len(variants)) as bar:

        def scores(items: Sequence[Item]) -> Floats:
            ctx.check_stop()
            found = scorer.score(items).double().numpy() if items else np.zeros(0)
            bar.advance(1)
            return np.asarray(found, dtype=np.float64)

        chosen_n = scores([(pair.prompt, pair.chosen, True) for pair in fitting])
        rejected_n = scores([(pair.prompt, pair.rejected, True) for pair in fitting])
        changes = {}
        for name, (change, finished) in variants.items():
            changed = [(pair.prompt, change(pair.chosen), finished) for pair in probed]
            rows = [row for row, item in enumerate(changed) if item[1] != probed[row].chosen and scorer.encode(item)]
            changes[name] = scores([changed[row] for row in rows]) - chosen_n[rows]
    normalisation = scorer.normalisation
    card = {
        **_accuracy(chosen_n, rejected_n),
        "by_kind": {
            kind: _accuracy(chosen_n[rows], rejected_n[rows])
            for kind in sorted({pair.kind for pair in fitting})
            for rows in [[row for row, pair in enumerate(fitting) if pair.kind == kind]]
        },
        "left_out_too_long": len(pairs) - len(fitting),
        "calibration": calibration((chosen_n - rejected_n) * (normalisation.std if normalisation else 1.0)),
        "margin_histogram": _histogram(chosen_n - rejected_n),
        "length_correlation": spearman(
            np.concatenate([chosen_n, rejected_n]),
            np.array([len(pair.chosen) for pair in fitting] + [len(pair.rejected) for pair in fitting], dtype=float),
        ),
        "longer_is_chosen": _accuracy(
            np.array([len(pair.chosen) for pair in fitting], dtype=float),
            np.array([len(pair.rejected) for pair in fitting], dtype=float),
        ),
        "praise_before_gain": _mean(changes["praise_before"]),
        "praise_after_gain": _mean(changes["praise_after"]),
        "repetition_gain": _mean(changes["repetition"]),
        "empty_below_chosen": _accuracy(-changes["empty"], np.zeros_like(changes["empty"])),
        "cut_below_chosen": _accuracy(-changes["cut"], np.zeros_like(changes["cut"])),
        "normalised_on": None
        if normalisation is None
        else {"samples": normalisation.count, "finished_only": normalisation.finished_only},
    }
    verdict, reasons = judge(card, section)
    return {"verdict": verdict, "reasons": reasons, **card}


def judge(card: Card, section: FitnessSection) -> tuple[str, list[str]]:
    """(`pass`, `warn` or `fail`; every reason in words, with its number and what to do).

    Fails only if held-out accuracy is not shown to be above chance: every other weakness may be lived with, knowingly.
    """
    if card["n"] == 0:
        return "warn", ["No held-out pair could be scored, so nothing is known. Set data.held_out above 0."]
    reasons = []
    accuracy, (low, high) = card["accuracy"], card["ci"]
    known = f"Held-out accuracy is {accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, {card['n']} pairs)"
    if low <= 0.5:
        return "fail", [
            f"{known}: not shown to be better than a coin. Give more or cleaner pairs, train longer, hold out more "
            "pairs if these are few; if it is far below 50 %, chosen and rejected are swapped."
        ]
    if low < section.min_accuracy:
        reasons.append(f"{known}: its lower end is below {section.min_accuracy:.0%}. More or cleaner pairs help.")
    for kind, one in card["by_kind"].items():
        if one["n"] >= MIN_KIND_PAIRS and one["ci"][0] <= 0.5:
            reasons.append(
                f"On {kind} pairs accuracy is {one['accuracy']:.1%} ({one['n']} pairs), not shown to be better than a "
                f"coin. Give more {kind} pairs or a higher weight."
            )
    error = card["calibration"]["error"]
    if error > section.max_calibration_error:
        reasons.append(
            f"Its confidence is off by {error:.2f} on average, more than {section.max_calibration_error:g}. Train "
            "fewer epochs if it is too sure, more if it is too unsure."
        )
    reasons += _length_reasons(card, section)
    for name, what in (("praise_before_gain", "before"), ("praise_after_gain", "after")):
        gain = card[name]["mean"]
        if gain is not None and gain > section.max_praise_gain:
            reasons.append(
                f"Empty praise {what} the answer adds {gain:.2f} to the score, more than {section.max_praise_gain:g}. "
                "PPO would learn to flatter: add pairs whose rejected answer flatters."
            )
    gain = card["repetition_gain"]["mean"]
    if gain is not None and gain > section.max_repetition_gain:
        reasons.append(
            f"Saying the answer twice adds {gain:.2f} to the score, more than {section.max_repetition_gain:g}. Add "
            "pairs whose rejected answer repeats itself, or set ppo.length.per_token_penalty."
        )
    for name, limit, what, remedy in (
        ("empty_below_chosen", MIN_EMPTY_BELOW, "an empty answer", "Set ppo.length.min_response_tokens."),
        ("cut_below_chosen", MIN_CUT_BELOW, "their own first half", "Keep ppo.length.unfinished=replace."),
    ):
        share = card[name]["accuracy"]
        if share is not None and share < limit:
            reasons.append(
                f"Only {share:.0%} of the chosen answers score above {what} (at least {limit:.0%}). {remedy}"
            )
    if card["normalised_on"] is not None and not card["normalised_on"]["finished_only"]:
        reasons.append(
            f"Too few of the base's samples ended by themselves, so its {card['normalised_on']['samples']} samples "
            "were all used to normalise, cut ones too. Add dialogue.stop_strings or raise ppo.sampling.max_new_tokens."
        )
    return ("warn" if reasons else "pass"), reasons


def print_fitness(card: Card, console: Console, what: str = "reward model") -> None:
    """The card as a table, its verdict and reasons below."""
    table = Table(title=f"{what.capitalize()}: fitness", title_justify="left")
    for column in ("check", "result"):
        table.add_column(column)
    table.add_row("held-out accuracy", _share(card))
    for kind, one in card["by_kind"].items():
        table.add_row(f"  {kind}", _share(one))
    table.add_row("  (rule: the longer answer)", _share(card["longer_is_chosen"]))
    table.add_row("calibration error", _number(card["calibration"]["error"]))
    table.add_row("score and length, Spearman", _number(card["length_correlation"]))
    table.add_row(
        "praise before / after adds", f"{_gain(card['praise_before_gain'])} / {_gain(card['praise_after_gain'])}"
    )
    table.add_row("repeating the answer adds", _gain(card["repetition_gain"]))
    table.add_row("chosen above empty answer", _share(card["empty_below_chosen"]))
    table.add_row("chosen above its first half", _share(card["cut_below_chosen"]))
    console.print(table)
    colour = {"pass": "green", "warn": "yellow", "fail": "red"}[card["verdict"]]
    console.print(f"[bold {colour}]{card['verdict']}[/]")
    for reason in card["reasons"]:
        console.print(f"- {reason}", markup=False, highlight=False)


def calibration(margin_n: Floats) -> Card:
    """Expected calibration error of sigma(margin), and its bins.

    A pair's prediction is the more probable side, in [0.5, 1]; it is observed to be right if that side was chosen (a
    tie is half right). The error is the mean over pairs of |predicted - observed| of their bin.
    """
    predicted_n = 1 / (1 + np.exp(-np.minimum(np.abs(margin_n), 500)))
    right_n = (np.sign(margin_n) + 1) / 2
    bin_n = np.minimum(((predicted_n - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = []
    for number in sorted(set(bin_n.tolist())):
        inside = bin_n == number
        bins.append(
            {
                "predicted": float(predicted_n[inside].mean()),
                "observed": float(right_n[inside].mean()),
                "n": int(inside.sum()),
            }
        )
    error = sum(one["n"] * abs(one["predicted"] - one["observed"]) for one in bins) / max(len(margin_n), 1)
    return {"error": error, "bins": bins}


def spearman(first_n: Floats, second_n: Floats) -> float | None:
    """Rank correlation with ties at their mean rank; None if either side does not vary."""
    if len(first_n) < 2 or np.ptp(first_n) == 0 or np.ptp(second_n) == 0:
        return None
    return float(np.corrcoef(_ranks(first_n), _ranks(second_n))[0, 1])


def _load(ctx: StageContext, folder: Path) -> RewardModel:
    return RewardModel.load(folder, dtype=ctx.recipe.model.dtype, device=ctx.device)


def _first_half(answer: str) -> str:
    """The first half of the words; answers of under four stay whole (and are then left out)."""
    words = answer.split()
    return " ".join(words[: len(words) // 2]) if len(words) >= 4 else answer


def _length_reasons(card: Card, section: FitnessSection) -> list[str]:
    reasons = []
    correlation = card["length_correlation"]
    if correlation is not None and abs(correlation) > section.max_length_correlation:
        longer = "longer" if correlation > 0 else "shorter"
        reasons.append(
            f"Score and answer length correlate by {correlation:+.2f}, more than {section.max_length_correlation:g}: "
            f"PPO would learn {longer} answers. Balance lengths in the pairs, or use ppo.length."
        )
    rule = card["longer_is_chosen"]["accuracy"]
    best = max(rule, 1 - rule)
    if card["accuracy"] <= best:
        reasons.append(
            f"Choosing the {'longer' if rule >= 0.5 else 'shorter'} answer is right in {best:.1%} of the pairs, no "
            "less than this model. The pairs may show little but length: balance it."
        )
    return reasons


def _accuracy(chosen_n: Floats, rejected_n: Floats) -> Card:
    """Share of pairs in the right order, ties counting half, with its interval; Nones for no pairs."""
    n = len(chosen_n)
    if n == 0:
        return {"accuracy": None, "ci": None, "n": 0}
    right = float((chosen_n > rejected_n).sum() + 0.5 * (chosen_n == rejected_n).sum())
    return {"accuracy": right / n, "ci": list(wilson(right, n) or ()), "n": n}


def _mean(change_n: Floats) -> Card:
    """Mean with its normal interval; Nones for no values."""
    n = len(change_n)
    if n == 0:
        return {"mean": None, "ci": None, "n": 0}
    mean = float(change_n.mean())
    half = Z95 * float(change_n.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return {"mean": mean, "ci": [mean - half, mean + half] if math.isfinite(half) else None, "n": n}


def _histogram(margin_n: Floats) -> Card:
    if len(margin_n) == 0:
        return {"edges": [], "counts": []}
    counts, edges = np.histogram(margin_n, bins=20)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _ranks(x_n: Floats) -> Floats:
    """Ranks from 0, equal values sharing their mean rank."""
    _, group_n, size_g = np.unique(x_n, return_inverse=True, return_counts=True)
    last_g = np.cumsum(size_g)
    return np.asarray((last_g - (size_g + 1) / 2)[group_n], dtype=np.float64)


def _share(one: Card) -> str:
    if one["n"] == 0:
        return "not measured"
    low, high = one["ci"]
    return f"{one['accuracy']:.1%}  ({low:.1%} to {high:.1%}, n = {one['n']})"


def _gain(one: Card) -> str:
    if one["mean"] is None:
        return "not measured"
    return f"{one['mean']:+.2f}" + (f" ({one['ci'][0]:+.2f} to {one['ci'][1]:+.2f})" if one["ci"] else "")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"
