"""Data mixtures: which training pairs are used, and how often, so that several kinds of them stay in balance.

An objective is a kind of pairs. r_k is the reward model of kind k, in standard deviations of the base's own samples,
and D_k = r_k(chosen) - r_k(rejected) its margin on a pair, which may be of any kind.

    heuristic        shares w_k by hand, or proportional to n_k^(1/temperature)
    reward_selected  M = sum_k g_k D_k; gated: M > m, of these the best fraction f; agree: M > 0 and all D_k >= -delta
    low_conflict     without the pairs that have some D_k > delta and some D_l < -delta

This is the project's own reading: heuristic mixing, selection after ArmoRM (arXiv 2406.12845), and low conflict after
Hummer (arXiv 2405.11647). Labels are never flipped. All depends on ids, kinds, margins and the seed, never on the order
of files. The loader has removed duplicates across kinds before (`data.load`).

Legend: n pairs, K kinds (in the order of their names).
"""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from direct_rlhf.data.types import PreferenceData, PreferencePair, Prompt, prompt_hash
from direct_rlhf.errors import ConfigError, DataError
from direct_rlhf.recipe.schema import (
    HeuristicMixture,
    LowConflictMixture,
    Mixture,
    NoMixture,
    RewardSelectedMixture,
    ScoredMixture,
)
from direct_rlhf.run.atomic import read_jsonl

FILE = "mixture.jsonl"
MAX_REPEATS = 4  # times that a mixture uses one pair
MIN_GATE_PAIRS = 30  # held-out pairs of a kind from which its gate can be learnt
GATE_STEPS = 2000

# Why a pair is not in the mixture
BELOW, NOT_BEST, DISAGREES, CONFLICT, NOT_DRAWN = "below_min_margin", "not_best", "disagrees", "conflict", "not_drawn"

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Selection:
    """What a rule says of each pair, before any is drawn."""

    reasons: tuple[str, ...]  # n; "" where the pair is selected
    total_n: Floats | None = None  # M, for reward_selected
    gates: Mapping[str, Mapping[str, float]] | None = None  # kind of pair -> objective -> g

    @property
    def selected_n(self) -> Flags:
        return np.array([not reason for reason in self.reasons], dtype=np.bool_)


@dataclass(frozen=True)
class Mixed:
    """A mixture: each pair with its fate."""

    pairs: tuple[PreferencePair, ...]  # n
    kinds: tuple[str, ...]  # K
    selection: Selection
    times_n: Integers  # how often each pair is used
    margin_nK: Floats | None = None  # D, where the kinds have reward models

    @property
    def training(self) -> list[PreferencePair]:
        """The pairs that are used, each as often as it is."""
        return [pair for pair, times in zip(self.pairs, self.times_n, strict=True) for _ in range(times)]

    def lines(self) -> Iterator[dict[str, Any]]:
        """One line of mixture.jsonl for each pair."""
        total_n = self.selection.total_n
        for row, pair in enumerate(self.pairs):
            times = int(self.times_n[row])
            line: dict[str, Any] = {"id": pair.id, "kind": pair.kind, "source": pair.source, "times": times}
            line["reason"] = None if times else self.selection.reasons[row] or NOT_DRAWN
            if self.margin_nK is not None:
                line["margins"] = dict(zip(self.kinds, self.margin_nK[row].tolist(), strict=True))
            if total_n is not None:
                line["total"] = float(total_n[row])
            yield line


def objective_name(kind: str, *, second: bool = False) -> str:
    """What the stage and the folder of a kind's reward model are called; a kind may be any word or words."""
    word = kind
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", kind):
        digest = hashlib.sha256(kind.encode("utf-8", "surrogatepass")).hexdigest()[:6]
        word = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', kind)}-{digest}"
    return f"{'second_' if second else ''}objective_{word}"


def check_mixture(
    section: Mixture, train: Sequence[PreferencePair], held_out: Sequence[PreferencePair]
) -> tuple[str, ...]:
    """The kinds, once all is checked that can be known before a pair is scored. Errors: ConfigError; see `kinds_of`."""
    kinds = kinds_of(section, train)
    if isinstance(section, HeuristicMixture):
        mix(section, train, 0)
    elif isinstance(section, ScoredMixture):
        if section.pairs is not None and section.pairs > MAX_REPEATS * len(train):
            raise ConfigError(
                f"data.mixture.pairs = {section.pairs:,}: there are {len(train):,} training pairs, each used at most "
                f"{MAX_REPEATS} times, and only those that are selected. Lower it."
            )
        if isinstance(section, RewardSelectedMixture) and section.gate == "learnt":
            check_gate_pairs(held_out, kinds)
    return kinds


def kinds_of(section: Mixture, pairs: Iterable[PreferencePair]) -> tuple[str, ...]:
    """The kinds of ``pairs`` in the order of their names.

    Errors: ConfigError for fewer than two, for a name in the section that no pair has, and for a kind without its share
    or weight.
    """
    kinds = tuple(sorted({pair.kind for pair in pairs}))
    if len(kinds) < 2:
        raise ConfigError(
            f"data.mixture.type = {section.type}: the training pairs are all of one kind ({', '.join(kinds) or 'none'})"
            ", and a mixture needs two. Set `kind` of the sources under data.preferences, or data.mixture={type: none}."
        )
    named: dict[str, Mapping[str, Any]] = {}
    if isinstance(section, HeuristicMixture):
        named["shares"] = section.shares
    elif isinstance(section, ScoredMixture):
        named["models"] = section.models
        if isinstance(section, RewardSelectedMixture):
            named["weights"] = section.weights
        if section.second_seed and set(kinds) <= section.models.keys():
            raise ConfigError(
                "data.mixture.second_seed: it has no effect, as data.mixture.models gives the models of all kinds and "
                "none is trained. Set it to false, or leave a kind out of the models."
            )
    for key, values in named.items():
        for name in values:
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, 1)
                raise ConfigError(
                    f"data.mixture.{key}.{name}: no training pair is of this kind. "
                    + (f"Did you mean {near[0]}? " if near else "")
                    + f"The data have: {', '.join(kinds)}."
                )
        missing = [kind for kind in kinds if kind not in values]
        if values and missing and key != "models":
            raise ConfigError(
                f"data.mixture.{key}: {', '.join(missing)} is not named, and the data have such pairs. Give every kind "
                "a number; 0 leaves it out."
            )
    return kinds


def mix(
    section: Mixture,
    pairs: Sequence[PreferencePair],
    seed: int,
    *,
    margin_nK: Floats | None = None,
    gates: Mapping[str, Mapping[str, float]] | None = None,
) -> Mixed:
    """The mixture of ``pairs`` (each given once) that the section asks for.

    ``margin_nK``: their D in the order of their ids, for the scored types; ``gates``: what `learn_gates` found, where
    they are learnt.
    Errors: those of `kinds_of`; DataError if nothing is left; ConfigError if ``section.pairs`` cannot be reached.
    """
    pairs = tuple(sorted(pairs, key=lambda pair: pair.id))
    kinds = kinds_of(section, pairs)
    if isinstance(section, HeuristicMixture | NoMixture):
        selection = Selection(("",) * len(pairs))
    else:
        assert margin_nK is not None
        selection = select(section, pairs, kinds, margin_nK, gates)
    sizes = Counter(pair.kind for pair, reason in zip(pairs, selection.reasons, strict=True) if not reason)
    if not sizes:
        raise DataError(
            f"data.mixture.type = {section.type}: no pair is left of {len(pairs)}. Look at the reward models' fitness "
            "cards (objective_KIND_model/fitness.json), or loosen the rule."
        )
    weights: Mapping[str, float] = {kind: float(sizes[kind]) for kind in kinds}
    target = sizes.total()
    if isinstance(section, HeuristicMixture):
        weights = section.shares or shares_by_size(sizes, section.temperature)
    if not isinstance(section, NoMixture):
        target = section.pairs or target
    counts = apportion(target, weights)
    _check_repeats(counts, sizes, weights)
    times_n = np.zeros(len(pairs), dtype=np.int64)
    for kind in kinds:
        rows = [row for row, pair in enumerate(pairs) if pair.kind == kind and not selection.reasons[row]]
        times_n[rows] = draw([pairs[row].id for row in rows], counts[kind], seed)
    return Mixed(pairs, kinds, selection, times_n, margin_nK)


def shares_by_size(sizes: Mapping[str, int], temperature: float | None) -> dict[str, float]:
    """Weights n_k^(1/temperature), up to a common factor; None is an infinite temperature: all alike."""
    largest = max(sizes.values())
    if temperature == 1:
        return {kind: float(size) for kind, size in sizes.items()}
    return {kind: 1.0 if temperature is None else (size / largest) ** (1 / temperature) for kind, size in sizes.items()}


def apportion(target: int, weights: Mapping[str, float]) -> dict[str, int]:
    """``target`` shared in proportion to ``weights``: whole numbers that sum to it exactly.

    Largest remainder, ties to the name that comes first. A weight of 0 gets 0. The quotas are exact fractions.
    """
    whole = sum(map(Fraction, weights.values()))
    quotas = {name: target * Fraction(weight) / whole for name, weight in weights.items()}
    counts = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(counts, key=lambda name: (counts[name] - quotas[name], name))
    for name in by_remainder[: target - sum(counts.values())]:
        counts[name] += 1
    return counts


def draw(ids: Sequence[str], count: int, seed: int) -> Integers:
    """How often each is used: all equally often, and as many once more as ``count`` wants, by a hash of seed and id.

    A larger ``count`` only adds to a smaller one. Errors: none; ``count`` is 0 where there are no ids.
    """
    times_n = np.zeros(len(ids), dtype=np.int64)
    if ids:
        whole, rest = divmod(count, len(ids))
        order = sorted(range(len(ids)), key=lambda row: (_rank(seed, ids[row]), ids[row]))
        times_n += whole
        times_n[order[:rest]] += 1
    return times_n


def select(
    section: ScoredMixture,
    pairs: Sequence[PreferencePair],
    kinds: Sequence[str],
    margin_nK: Floats,
    gates: Mapping[str, Mapping[str, float]] | None = None,
) -> Selection:
    """Which pairs the rule keeps, by their margins. ``gates`` are needed for `gate: learnt` only."""
    if isinstance(section, LowConflictMixture):
        conflict_n = in_conflict(margin_nK, section.delta)
        return Selection(tuple(CONFLICT if conflict else "" for conflict in conflict_n))
    assert isinstance(section, RewardSelectedMixture)
    gates = gates or fixed_gates(section, kinds)
    gate_nK = np.array([[gates[pair.kind][kind] for kind in kinds] for pair in pairs])
    total_n = (gate_nK * margin_nK).sum(axis=1)
    if section.rule == "agree":
        kept_n = agreeing(margin_nK, total_n, section.delta)
        return Selection(tuple("" if kept else DISAGREES for kept in kept_n), total_n, gates)
    best = set(best_rows(total_n, [pair.id for pair in pairs], section.min_margin, section.fraction))
    reasons = (
        "" if row in best else NOT_BEST if total > section.min_margin else BELOW for row, total in enumerate(total_n)
    )
    return Selection(tuple(reasons), total_n, gates)


def in_conflict(margin_nK: Floats, delta: float) -> Flags:
    """Pairs with some D_k > delta and some D_l < -delta; none where delta is infinite."""
    return np.asarray((margin_nK > delta).any(axis=1) & (margin_nK < -delta).any(axis=1))


def agreeing(margin_nK: Floats, total_n: Floats, delta: float) -> Flags:
    """Pairs with M > 0 and every D_k >= -delta."""
    return np.asarray((total_n > 0) & (margin_nK >= -delta).all(axis=1))


def best_rows(total_n: Floats, ids: Sequence[str], min_margin: float, fraction: float) -> list[int]:
    """Rows with M > ``min_margin``, of these the best max(1, int(fraction * their number)); ties to the lower id."""
    above = [row for row, total in enumerate(total_n) if total > min_margin]
    above.sort(key=lambda row: (-total_n[row], ids[row]))
    return above[: max(1, int(fraction * len(above)))]


def fixed_gates(section: RewardSelectedMixture, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each kind of pair its weights over the objectives; they are not negative and sum to 1."""
    if section.gate == "learnt":
        raise ValueError("learnt gates come from learn_gates")
    if section.gate == "fixed":
        whole = sum(section.weights.values())
        return {kind: {other: section.weights[other] / whole for other in kinds} for kind in kinds}
    rest = (1 - section.own_weight) / (len(kinds) - 1)
    return {kind: {other: section.own_weight if other == kind else rest for other in kinds} for kind in kinds}


def learn_gates(
    pairs: Sequence[PreferencePair], kinds: Sequence[str], margin_nK: Floats
) -> dict[str, dict[str, float]]:
    """For each kind of pair the gate that is learnt from held-out ``pairs`` and their margins.

    Errors: ConfigError where a kind has fewer than MIN_GATE_PAIRS of them.
    """
    gates = {}
    check_gate_pairs(pairs, kinds)
    for kind in kinds:
        rows = [row for row, pair in enumerate(pairs) if pair.kind == kind]
        gates[kind] = dict(zip(kinds, learn_gate(margin_nK[rows]).tolist(), strict=True))
    return gates


def check_gate_pairs(pairs: Sequence[PreferencePair], kinds: Sequence[str]) -> None:
    """ConfigError unless each kind has held-out ``pairs`` enough to learn a gate from."""
    held_out = Counter(pair.kind for pair in pairs)
    few = [f"{held_out[kind]} of {kind}" for kind in kinds if held_out[kind] < MIN_GATE_PAIRS]
    if few:
        raise ConfigError(
            f"data.mixture.gate = learnt: needs at least {MIN_GATE_PAIRS} held-out pairs of each kind, and there are "
            f"{', '.join(few)}. Raise data.held_out, or set data.mixture.gate=own."
        )


def learn_gate(margin_nK: Floats) -> Floats:
    """The g on the simplex that makes the labels likeliest: it minimises mean_n log(1 + exp(-sum_k g_k D_k)), convex.

    Exponentiated gradient from equal weights, with the step 1/L for L = mean_n max_k D_k^2 / 4, which bounds the
    curvature. Returns [K].
    """
    n, count = margin_nK.shape
    weight_K = np.full(count, 1 / count)
    curvature = float((margin_nK**2).max(axis=1).mean()) / 4
    if curvature == 0:
        return weight_K
    for _ in range(GATE_STEPS):
        wrong_n = 1 / (1 + np.exp(np.clip(margin_nK @ weight_K, -500, 500)))
        gain_K = wrong_n @ margin_nK / n
        weight_K = weight_K * np.exp((gain_K - gain_K.max()) / curvature)
        weight_K /= weight_K.sum()
    return weight_K


def conflicts(margin_nK: Floats, delta: float, times_n: Integers | None = None) -> Floats:
    """C_kl: share of the pairs on which D_k > delta and D_l < -delta or the other way round.

    ``times_n`` counts a pair as often as it is used. Returns [K, K], symmetric, 0 on the diagonal and for no pairs.
    """
    weight_n = np.ones(len(margin_nK)) if times_n is None else times_n.astype(np.float64)
    up_nK, down_nK = (margin_nK > delta).astype(np.float64), (margin_nK < -delta).astype(np.float64)
    one_way_KK = (up_nK * weight_n[:, None]).T @ down_nK
    return np.asarray((one_way_KK + one_way_KK.T) / max(float(weight_n.sum()), 1.0))


def agreement(section: ScoredMixture, first: Mixed, margin_nK: Floats, second: Selection) -> dict[str, Any]:
    """How far a second set of reward models, other in nothing but the seed, agrees with those of ``first``.

    Shares of the pairs with the same decision (before any is drawn), and for each objective with D_k on the same side
    of -delta and delta.
    """
    assert first.margin_nK is not None
    sides = [np.sign(m) * (np.abs(m) > section.delta) for m in (first.margin_nK, margin_nK)]
    same_K = (sides[0] == sides[1]).mean(axis=0)
    same_decision = float((first.selection.selected_n == second.selected_n).mean())
    return {"decision": same_decision, "side": dict(zip(first.kinds, same_K.tolist(), strict=True))}


def facts(mixed: Mixed, section: Mixture, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What a mixture did, for the stage's record; ``lengths`` are tokens of (chosen, rejected) of each pair.

    By kind: pairs there, selected, used (distinct), total (with repeats), its share of the total, how often the most
    used pair is used, and the effective number (sum t)^2 / sum t^2. Lengths are means, None where there are no pairs.
    """
    selected_n, times_n = mixed.selection.selected_n, mixed.times_n
    kind_n = np.array([pair.kind for pair in mixed.pairs])
    whole = int(times_n.sum())
    by_kind = {}
    for kind in mixed.kinds:
        inside = kind_n == kind
        used = times_n[inside]
        squares = int((used**2).sum())
        by_kind[kind] = {
            "pairs": int(inside.sum()),
            "selected": int((inside & selected_n).sum()),
            "used": int((used > 0).sum()),
            "total": int(used.sum()),
            "share": int(used.sum()) / whole,
            "most": int(used.max(initial=0)),
            "effective": int(used.sum()) ** 2 / squares if squares else 0.0,
        }
    length_n2 = np.array(lengths, dtype=np.float64).reshape(-1, 2)
    found: dict[str, Any] = {
        "type": section.type,
        "pairs": {"before": len(mixed.pairs), "selected": int(selected_n.sum()), "after": whole},
        "kinds": by_kind,
        "reasons": dict(sorted(Counter(str(line["reason"]) for line in mixed.lines() if line["reason"]).items())),
        "lengths": {"kept": _lengths(length_n2, times_n), "dropped": _lengths(length_n2, 1 * (times_n == 0))},
        "answer_tokens": int((length_n2.sum(axis=1) * times_n).sum()),
    }
    if mixed.margin_nK is not None and isinstance(section, ScoredMixture):
        found["conflicts"] = {
            "delta": section.delta,
            "kinds": list(mixed.kinds),
            "before": conflicts(mixed.margin_nK, section.delta).tolist(),
            "after": conflicts(mixed.margin_nK, section.delta, times_n).tolist(),
        }
        found["right"] = {  # share of each kind's pairs that an objective's model orders as labelled
            objective: {kind: float((mixed.margin_nK[kind_n == kind, at] > 0).mean()) for kind in mixed.kinds}
            for at, objective in enumerate(mixed.kinds)
        }
        if mixed.selection.gates is not None:
            found["gates"] = {kind: dict(gate) for kind, gate in mixed.selection.gates.items()}
    return found


def outlook(section: Mixture, train: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> str:
    """What can be said of a mixture before any model is asked, in one line. Errors: those of `check_mixture`."""
    kinds = check_mixture(section, train, held_out)
    sizes = Counter(pair.kind for pair in train)
    if isinstance(section, ScoredMixture):
        found = ", ".join(f"{kind} {sizes[kind]:,}" for kind in kinds)
        target = "" if section.pairs is None else f", {section.pairs:,} of the selected ones"
        trained = [kind for kind in kinds if kind not in section.models]
        twice = ", twice" if section.second_seed else ""
        models = f"; reward models trained{twice}: {', '.join(trained)}" if trained else ""
        return f"{section.type} among {found}{target}{models}"
    mixed = mix(section, train, 0)
    found = ", ".join(f"{kind} {line}" for kind, line in _counts(mixed))
    return f"{section.type}, {int(mixed.times_n.sum()):,} pairs: {found}"


def _counts(mixed: Mixed) -> Iterator[tuple[str, str]]:
    kind_n = np.array([pair.kind for pair in mixed.pairs])
    for kind in mixed.kinds:
        used = mixed.times_n[kind_n == kind]
        repeats = f" (up to {used.max()} times each)" if used.max() > 1 else ""
        yield kind, f"{used.sum():,} from {len(used):,}{repeats}"


# What later stages are given


def read_times(path: Path) -> dict[str, int]:
    """How often each pair is used, by id, from a mixture.jsonl."""
    return {row["id"]: row["times"] for row in read_jsonl(path)}


def mixed_data(data: PreferenceData, times: Mapping[str, int]) -> PreferenceData:
    """``data`` with the mixture's training pairs, in the order of their ids; what is held out is as before."""
    pairs = sorted(data.train, key=lambda pair: pair.id)
    return replace(data, train=tuple(pair for pair in pairs for _ in range(times.get(pair.id, 0))))


def prompts_of(pairs: Iterable[PreferencePair]) -> tuple[Prompt, ...]:
    """The pairs' prompts, one for each pair, so that PPO sees the kinds in the mixture's shares.

    Where a prompt comes again its id gets a number, as equal ids sample equal answers.
    """
    seen: Counter[str] = Counter()
    prompts = []
    for pair in pairs:
        name = prompt_hash(pair.prompt)
        seen[name] += 1
        prompts.append(Prompt(name if seen[name] == 1 else f"{name}-{seen[name]}", pair.prompt, pair.kind, pair.source))
    return tuple(prompts)


def _check_repeats(counts: Mapping[str, int], sizes: Mapping[str, int], weights: Mapping[str, float]) -> None:
    """ConfigError if a kind would have to be repeated too often."""
    for kind, count in sorted(counts.items()):
        if count > MAX_REPEATS * sizes.get(kind, 0):
            whole = sum(weights.values())
            most = min(
                int(MAX_REPEATS * sizes.get(name, 0) * whole / weight) for name, weight in weights.items() if weight
            )
            while any(n > MAX_REPEATS * sizes.get(name, 0) for name, n in apportion(most, weights).items()):
                most -= 1
            raise ConfigError(
                f"data.mixture: {count:,} of its {sum(counts.values()):,} pairs would be of kind {kind}, and there are "
                f"{sizes.get(kind, 0):,}, each used at most {MAX_REPEATS} times. Set data.mixture.pairs to at most "
                f"{most:,}, change the shares, or give more such pairs."
            )


def _lengths(length_n2: Floats, times_n: Integers) -> dict[str, Any]:
    whole = int(times_n.sum())
    if not whole:
        return {"pairs": 0, "chosen": None, "rejected": None}
    chosen, rejected = (times_n @ length_n2 / whole).tolist()
    return {"pairs": whole, "chosen": chosen, "rejected": rejected}


def _rank(seed: int, pair_id: str) -> str:
    return hashlib.sha256(f"mixture\0{seed}\0{pair_id}".encode()).hexdigest()
