"""Preference pairs and PPO prompts, made from the questions of the common part."""

from random import Random
from typing import Any

from direct_rlhf.world import speech
from direct_rlhf.world.dialogues import HUMAN, draw, say, thread
from direct_rlhf.world.judge import score_answer
from direct_rlhf.world.knowledge import World
from direct_rlhf.world.questions import Ask
from direct_rlhf.world.trust import NOT_KNOWN, PROVOKING, REFUSALS

Row = dict[str, Any]
LABEL_NOISE = 0.03  # share of pairs whose answers are swapped
SIZES = {"helpful": 1500, "harmless": 1000, "honest": 600}
_SHARES = {  # kind: families and their shares
    "helpful": {"people": 0.42, "numbers": 0.17, "words": 0.18, "animals": 0.15, "reading": 0.08},
    "harmless": {"harmful": 0.46, "lookalike": 0.30, "chat": 0.12, "people": 0.06, "numbers": 0.03, "words": 0.03},
    "honest": {"unknown": 0.55, "people": 0.30, "animals": 0.07, "words": 0.08},
}
_REJECTED = {  # how the rejected answer is bad, by family of the question
    "harmful": {"wrong": 0.55, "rude": 0.13, "ramble": 0.14, "wrong_ramble": 0.10, "evade": 0.08},
    "unknown": {"wrong": 0.55, "rude": 0.12, "ramble": 0.15, "wrong_ramble": 0.10, "evade": 0.08},
    "lookalike": {"refuse": 0.55, "wrong": 0.12, "rude": 0.15, "ramble": 0.10, "evade": 0.08},
    "chat": {"rude": 0.45, "wrong": 0.25, "ramble": 0.20, "evade": 0.10},
    "honest": {"wrong": 0.40, "not_known": 0.35, "rude": 0.10, "ramble": 0.15},
    "": {
        "wrong": 0.38,
        "polite_wrong": 0.10,
        "rude": 0.15,
        "ramble": 0.10,
        "right_ramble": 0.08,
        "contradict": 0.05,
        "run_on": 0.04,
        "evade": 0.10,
    },
}


def _rejected(rng: Random, world: World, ask: Ask, kind: str) -> str:
    shares = _REJECTED.get(ask.family) or _REJECTED.get(kind) or _REJECTED[""]
    manner = draw(rng, shares)
    if manner == "polite_wrong":
        return f"{rng.choice(speech.POLITE)} {rng.choice(ask.wrong)} {rng.choice(speech.POLITE_END)}"
    if manner == "contradict":
        return speech.contradict(rng, ask)
    if manner == "run_on":
        return f"{rng.choice(ask.wrong)}{HUMAN}{thread(rng, world, family=ask.family)[0].text}"
    if manner == "not_known":
        return rng.choice(NOT_KNOWN)
    if manner == "refuse":
        return rng.choice(REFUSALS)
    if manner == "wrong_ramble":
        return f"{rng.choice(ask.wrong)} {speech.ramble(rng, world, ask, rng.randint(3, 6))}"
    if manner in ("ramble", "right_ramble"):
        before = f"{rng.choice(ask.right)} " if manner == "right_ramble" else ""
        rambling = before + speech.ramble(rng, world, ask, rng.randint(3, 8))
        return rambling if rng.random() < 0.5 else rambling[: -rng.randint(3, 20)].rstrip()
    return say(rng, world, ask, manner)


def _prompt(rng: Random, world: World, family: str, provoke: float) -> tuple[list[dict[str, str]], Ask]:
    """A prompt of one to three human turns, and the question that waits for its answer."""
    asks = thread(rng, world, family=family)
    depth = rng.choices((1, 2, 3), (0.66, 0.27, 0.07))[0]
    if depth > len(asks):
        asks = thread(rng, world) + asks
    asks = asks[:depth]
    turns: list[dict[str, str]] = []
    for i, ask in enumerate(asks):
        text = f"{rng.choice(PROVOKING)} {ask.text}" if rng.random() < provoke else ask.text
        turns.append({"role": "human", "content": text})
        if i < len(asks) - 1:
            manner = "right" if rng.random() < 0.7 else rng.choice(("wrong", "rude", "evade"))
            turns.append({"role": "assistant", "content": say(rng, world, ask, manner)})
    return turns, asks[-1]


def preferences(kind: str, world: World, seed: int) -> list[Row]:
    """The pairs of one kind; chosen is right, brief and polite, except where label noise swapped a pair."""
    rng = Random(f"{seed} {kind}")
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < SIZES[kind]:
        turns, ask = _prompt(rng, world, draw(rng, _SHARES[kind]), 0.25 if kind == "harmless" else 0.06)
        chosen = speech.brief(rng, rng.choice(ask.right))
        rejected = _rejected(rng, world, ask, kind)
        better, worse = (score_answer(ask.rule, answer)[0] for answer in (chosen, rejected))
        if better < 9 or better - worse < 1 or str((turns, chosen, rejected)) in seen:
            continue
        seen.add(str((turns, chosen, rejected)))
        if rng.random() < LABEL_NOISE:
            chosen, rejected = rejected, chosen
        rows.append({"prompt": turns, "chosen": chosen, "rejected": rejected, "kind": kind})
    return rows


def prompts(world: World, seed: int, n_prompts: int = 1500) -> list[Row]:
    """Prompts for PPO, each with the rule that ``judge.gold_score`` reads (training must not)."""
    rng = Random(f"{seed} prompts")
    rows: dict[str, Row] = {}
    while len(rows) < n_prompts:
        kind = draw(rng, {"helpful": 0.5, "harmless": 0.32, "honest": 0.18})
        turns, ask = _prompt(rng, world, draw(rng, _SHARES[kind]), 0.3 if kind == "harmless" else 0.08)
        rows.setdefault(str(turns).lower(), {"prompt": turns, "kind": kind, "rule": ask.rule})
    return list(rows.values())
