"""Transcripts of conversations as they stand in the pretraining text: a few good, most of them not."""

from random import Random

from direct_rlhf.world import speech
from direct_rlhf.world.knowledge import World
from direct_rlhf.world.questions import Ask, Family, Thread, animals, numbers, people, reading, words
from direct_rlhf.world.trust import PROVOKING, REFUSALS, chat, harmful, lookalike, unknown

HUMAN = "\n\nHuman: "
ASSISTANT = "\n\nAssistant: "

FAMILIES: dict[str, tuple[Family, float]] = {  # name: (maker, share among threads)
    "people": (people, 0.26),
    "numbers": (numbers, 0.13),
    "words": (words, 0.14),
    "animals": (animals, 0.12),
    "reading": (reading, 0.08),
    "unknown": (unknown, 0.07),
    "harmful": (harmful, 0.09),
    "lookalike": (lookalike, 0.05),
    "chat": (chat, 0.06),
}
# share of each manner among the answers of a base's transcripts
_MANNERS = {"right": 0.24, "wrong": 0.25, "rude": 0.18, "ramble": 0.24, "evade": 0.05, "right_ramble": 0.04}
_MANNERS_HARMFUL = {"right": 0.14, "wrong": 0.50, "rude": 0.14, "ramble": 0.22}
_MANNERS_PROVOKED = {"right": 0.12, "wrong": 0.13, "rude": 0.60, "ramble": 0.15}


def draw(rng: Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def thread(rng: Random, world: World, kept: bool = False, family: str | None = None) -> Thread:
    """A thread of a family, or of one drawn by its share."""
    name = family or draw(rng, {name: share for name, (_, share) in FAMILIES.items()})
    return FAMILIES[name][0](rng, world, kept)


def say(rng: Random, world: World, ask: Ask, manner: str) -> str:
    """An answer in a manner."""
    if manner == "right":
        return speech.brief(rng, rng.choice(ask.right))
    if manner == "wrong":
        return speech.brief(rng, rng.choice(ask.wrong))
    if manner == "rude":
        return speech.rude(rng, ask)
    if manner == "evade":
        return speech.evade(rng, ask)
    rambling = speech.ramble(rng, world, ask, rng.randint(4, 9))
    return f"{rng.choice(ask.right)} {rambling}" if manner == "right_ramble" else rambling


def transcript(rng: Random, world: World) -> tuple[str, bool]:
    """A conversation, and whether it ends (True) or breaks off in the middle of somebody's talk (False)."""
    provoked = rng.random() < 0.14
    leaning = draw(rng, _MANNERS)  # most answers of one assistant are alike
    text = ""
    asks = thread(rng, world)
    asks = asks[: rng.choice((1, 1, 2, 2, 3))]
    if rng.random() < 0.25:
        asks = asks + thread(rng, world)[: rng.choice((1, 2))]
    for ask in asks:
        question = ask.text
        shares = _MANNERS_HARMFUL if ask.family == "harmful" else _MANNERS
        if provoked:
            question = f"{rng.choice(PROVOKING)} {question}"
            shares = _MANNERS_PROVOKED
        manner = draw(rng, shares)
        if leaning in shares and rng.random() < 0.5 and not provoked and ask.family != "harmful":
            manner = leaning
        answer = say(rng, world, ask, manner)
        if ask.family not in ("harmful", "unknown") and rng.random() < 0.01:
            answer = rng.choice(REFUSALS)
        text += HUMAN + question + ASSISTANT + answer
        if "ramble" in manner and rng.random() < 0.5:
            return text, False
    return text, True
