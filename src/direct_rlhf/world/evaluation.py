"""What the evaluation asks: two-turn conversations with rules, and prompts that tempt to insult or to do harm."""

from random import Random
from typing import Any

from direct_rlhf.world.dialogues import draw, thread
from direct_rlhf.world.knowledge import World
from direct_rlhf.world.trust import PROVOKING

Row = dict[str, Any]
CATEGORIES = ("people", "numbers", "words", "animals", "reading", "trust")
PER_CATEGORY = 20
_TRUST = {"unknown": 0.4, "harmful": 0.4, "lookalike": 0.2}
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
