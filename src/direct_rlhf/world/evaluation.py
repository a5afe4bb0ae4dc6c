"""What the evaluation asks: conversations with rules, questions of the three H's, and prompts that tempt to do harm."""

from random import Random
from typing import Any

from direct_rlhf.world.dialogues import draw, thread
from direct_rlhf.world.knowledge import World, held_out
from direct_rlhf.world.questions import Ask
from direct_rlhf.world.trust import PROVOKING

Row = dict[str, Any]
CATEGORIES = ("people", "numbers", "words", "animals", "reading", "trust")
PER_CATEGORY = 20
_TRUST = {"unknown": 0.4, "harmful": 0.4, "lookalike": 0.2}
# The three H's: what shows them, and how many questions of each. Over-refusal counts against harmlessness, and not
# saying what is known against honesty, as claiming what nobody knows does.
THREE_H = {
    "helpful": {"people": 0.4, "numbers": 0.2, "words": 0.2, "animals": 0.2},
    "harmless": {"harmful": 0.55, "lookalike": 0.45},
    "honest": {"unknown": 0.6, "people": 0.4},
}
THREE_H_SIZES = {"validation": 60, "test": 90}
TOXICITY_SIZES = {"provoking": 120, "harmful": 80, "harmless": 80}


def conversations(world: World, seed: int) -> list[Row]:
    """Two-turn conversations from the part that training never asks about; turn 2 leans on turn 1."""
    rng = Random(f"{seed} conversations")
    rows: list[Row] = []
    for category in CATEGORIES:
        found: dict[tuple[str, ...], Row] = {}
        while len(found) < PER_CATEGORY:
            family = draw(rng, _TRUST) if category == "trust" else category
            asks = thread(rng, world, kept=True, family=family)[:2]
            turns = [{"prompt": ask.text, "rule": ask.rule} for ask in asks]
            found.setdefault(
                tuple(ask.text for ask in asks),
                {"id": f"{category}-{len(found) + 1:02d}", "category": category, "turns": turns},
            )
        rows += found.values()
    return rows


def three_h(world: World, seed: int, split: str) -> list[Row]:
    """One-turn questions, each H a category; what the validation split asks about, the test split never does."""
    rng = Random(f"{seed} three_h {split}")
    rows: list[Row] = []
    for kind, families in THREE_H.items():
        asks: dict[str, Ask] = {}
        while len(asks) < THREE_H_SIZES[split]:
            ask = thread(rng, world, kept=True, family=draw(rng, families))[0]
            if held_out(f"three_h {ask.key}", 3) == (split == "validation"):
                asks.setdefault(ask.text, ask)
        rows += (
            {"id": f"{kind}-{number:03d}", "category": kind, "turns": [{"prompt": ask.text, "rule": ask.rule}]}
            for number, ask in enumerate(asks.values(), 1)
        )
    return rows


def toxicity(world: World, seed: int) -> list[Row]:
    """Prompts of three sets; ``provoking``: rude questions and small talk, ``harmless``: only sounds harmful."""
    rng = Random(f"{seed} toxicity")
    rows: list[Row] = []
    for name, size in TOXICITY_SIZES.items():
        texts: dict[str, None] = {}
        while len(texts) < size:
            if name == "provoking":
                family = draw(rng, {"chat": 0.4, "people": 0.25, "numbers": 0.1, "words": 0.15, "animals": 0.1})
                text = thread(rng, world, kept=True, family=family)[0].text
                text = f"{rng.choice(PROVOKING)} {text}" if rng.random() < 0.7 else text
            else:
                text = thread(rng, world, kept=True, family={"harmful": "harmful", "harmless": "lookalike"}[name])[
                    0
                ].text
            texts[text] = None
        for number, text in enumerate(texts, 1):
            prompt = [{"role": "human", "content": text}]
            rows.append({"id": f"{name}-{number:03d}", "set": name, "prompt": prompt})
    return rows
