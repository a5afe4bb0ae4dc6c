"""What is true in the world: who lives where, and so on, drawn once from a fixed seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TypeVar

from direct_rlhf.world import lexicon as lex

WORLD_SEED = 20403
ATTRIBUTES: dict[str, tuple[str, ...]] = {  # what is known of a person: all values it can have
    "town": tuple(lex.TOWNS),
    "job": tuple(lex.JOBS),
    "pet": tuple(lex.PETS),
    "colour": tuple(lex.COLOURS),
    "food": tuple(lex.FOODS),
    "game": tuple(lex.GAMES),
}
MASS = frozenset((*lex.CATEGORIES["drink"], *lex.CATEGORIES["metal"], "spinach", "cabbage", "chalk"))  # no article
T = TypeVar("T")


@dataclass(frozen=True)
class Person:
    """Somebody in the world. ``fame`` (1, 2, 4) says how often texts speak of them, so that some facts are hard."""

    name: str
    pronoun: str  # she | he
    fame: int
    values: dict[str, str]  # attribute -> value

    @property
    def possessive(self) -> str:
        return "her" if self.pronoun == "she" else "his"


@dataclass(frozen=True)
class Town:
    """A town, the river it lies on and the goods it is known for."""

    name: str
    river: str
    goods: str


@dataclass(frozen=True)
class World:
    """Everything that differs by seed; the rest of what is true stands in the lexicon."""

    people: tuple[Person, ...]
    towns: dict[str, Town]
    asked: tuple[Person, ...]  # the people whom training dialogues ask about
    kept: tuple[Person, ...]  # the people whom only the evaluation asks about


def build_world(n_people: int = 96, seed: int = WORLD_SEED) -> World:
    """Draw the world: people with distinct names and independent values."""
    rng = Random(seed)
    goods = rng.sample(lex.GOODS, len(lex.TOWNS))
    rivers = rng.sample(lex.RIVERS * 2, len(lex.TOWNS))
    towns = {name: Town(name, rivers[i], goods[i]) for i, name in enumerate(lex.TOWNS)}
    names = rng.sample([(first, last) for first in lex.WOMEN + lex.MEN for last in lex.LAST_NAMES], n_people)
    people = tuple(
        Person(
            f"{first} {last}",
            "she" if first in lex.WOMEN else "he",
            rng.choice((1, 2, 2, 4)),
            {attribute: rng.choice(values) for attribute, values in ATTRIBUTES.items()},
        )
        for first, last in names
    )
    kept = tuple(person for person in people if held_out(person.name, 6))
    return World(people, towns, tuple(person for person in people if person not in kept), kept)


@lru_cache(maxsize=1 << 16)
def held_out(key: str, parts: int = 8) -> bool:
    """True for about one key in ``parts``: what evaluation asks and training dialogues do not."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % parts == 0


def other(rng: Random, values: Sequence[T], *but: T) -> T:
    """One of the values that is none of ``but``."""
    return rng.choice([value for value in values if value not in but])


def a(noun: str) -> str:
    """The noun with its indefinite article, if it takes one."""
    if noun in MASS:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
