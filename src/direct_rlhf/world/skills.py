"""The eleven skills of the world as items with choices.

Pretraining texts are items of the common part with their gold choice; the general tasks ask items of the kept part
(``kept=True``), which no pretraining text shows. Facts cannot be kept: they are told in other words (prose.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from direct_rlhf.world import lexicon as lex
from direct_rlhf.world import stories
from direct_rlhf.world.knowledge import ATTRIBUTES, Person, World, held_out, other
from direct_rlhf.world.questions import ADJECTIVES, MEMBERS, sized_pair


@dataclass(frozen=True)
class Item:
    """A question with choices; ``prompt`` + ``choices[gold]`` is a text of the world."""

    prompt: str
    choices: tuple[str, ...]  # each with its leading space
    gold: int


def item(rng: Random, prompt: str, right: str, wrong: list[str]) -> Item:
    """An item with its choices in random order."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Item(prompt, tuple(" " + choice for choice in choices), choices.index(right))


def _ask(question: str, before: str = "") -> str:
    return f"{before}{' ' if before else ''}Question: {question}\nAnswer:"


_FACT_QUESTIONS = {
    "town": "Where is the home of {}?",
    "job": "Which trade does {} follow?",
    "pet": "Which pet lives with {}?",
    "colour": "Which colour pleases {} most?",
    "food": "Which dish does {} order?",
    "game": "What is the hobby of {}?",
}


def facts(rng: Random, world: World, kept: bool) -> Item:
    """What is known of a person, asked in a form of its own."""
    while True:
        person, attribute = rng.choice(world.people), rng.choice(list(ATTRIBUTES))
        if held_out(f"fact {person.name} {attribute}", 2) == kept:
            break
    value = person.values[attribute]
    wrong = rng.sample([v for v in ATTRIBUTES[attribute] if v != value], 3)
    return item(rng, _ask(_FACT_QUESTIONS[attribute].format(person.name)), value, wrong)


def hops(person: Person, world: World) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Facts that follow from two others: (question, value, all values)."""
    values = person.values
    tool, pet = lex.JOBS[values["job"]], values["pet"]
    town = world.towns[values["town"]]
    out = {
        "river": (f"Which river flows past the home of {person.name}?", town.river, tuple(lex.RIVERS)),
        "goods": (f"What is the home town of {person.name} known for?", town.goods, tuple(lex.GOODS)),
        "tool": (f"Which tool does {person.name} use at work?", tool, tuple(lex.JOBS.values())),
    }
    foods = tuple(sorted({lex.ANIMALS[name][3] for name in lex.PETS}))
    out["feed"] = (f"What does the pet of {person.name} eat?", lex.ANIMALS[pet][3], foods)
    sounds = tuple(sorted({lex.ANIMALS[name][2] for name in lex.PETS} - {""}))
    if lex.ANIMALS[pet][2]:
        out["sound"] = (f"What does the pet of {person.name} say?", lex.ANIMALS[pet][2], sounds)
    return out


def two_hop(rng: Random, world: World, kept: bool) -> Item:
    """A fact that follows from two others; each is asked or told by texts or kept."""
    while True:
        person = rng.choice(world.people)
        name, (question, value, pool) = rng.choice(list(hops(person, world).items()))
        if held_out(f"hop {person.name} {name}", 2) == kept:
            break
    return item(rng, _ask(question), value, rng.sample([v for v in pool if v != value], 3))


def arithmetic(rng: Random, world: World, kept: bool) -> Item:
    """Sums and differences of numbers up to 20."""
    while True:
        x, y = rng.randint(0, 20), rng.randint(0, 20)
        sign, value = ("+", x + y) if rng.random() < 0.6 or y > x else ("-", x - y)
        if held_out(f"{x} {sign} {y}", 4) == kept:
            break
    wrong = rng.sample([v for v in range(max(0, value - 5), value + 6) if v != value], 3)
    return item(rng, f"{x} {sign} {y} =", str(value), [str(v) for v in wrong])


def comparison(rng: Random, world: World, kept: bool) -> Item:
    """Which of two things is bigger or smaller."""
    while True:
        small, big = sized_pair(rng)
        if held_out(f"{small} {big}", 5) == kept:
            break
    shown = rng.sample((small, big), 2)
    right, wrong, word = rng.choice(((big, small, "bigger"), (small, big, "smaller")))
    question = f"Which is {word}, the {shown[0]} or the {shown[1]}?"
    return item(rng, _ask(question), f"the {right}", [f"the {wrong}"])


_OPPOSITE_FORMS = (
    "The opposite of {} is",
    "The reverse of {} is",
    "The word {} is the contrary of the word",
    "Somebody who does not mean {} at all means",
)


def opposites(rng: Random, world: World, kept: bool) -> Item:
    """The opposite of a word; for each word about half of the forms are kept."""
    while True:
        pair = rng.choice(lex.OPPOSITES)
        word, value = rng.sample(pair, 2)
        form = rng.choice(_OPPOSITE_FORMS)
        if held_out(form + word, 2) == kept:
            break
    return item(rng, form.format(word), value, [word, *rng.sample([w for w in ADJECTIVES if w not in pair], 2)])


def categories(rng: Random, world: World, kept: bool) -> Item:
    """The odd one out of four words."""
    while True:
        name, odd_name = rng.sample(list(lex.CATEGORIES), 2)
        if {"bird", "animal"} <= {name, odd_name}:
            continue
        three = rng.sample(lex.CATEGORIES[name], 3)
        odd = rng.choice([m for m, c in MEMBERS if c == odd_name and m not in lex.CATEGORIES[name]])
        if held_out(" ".join(sorted([*three, odd])), 5) == kept:
            break
    shown = rng.sample([*three, odd], 4)
    return item(rng, _ask(f"Which one does not belong: {', '.join(shown)}?"), odd, [w for w in shown if w != odd])


def passage_yes_no(rng: Random, world: World, kept: bool) -> Item:
    """A short passage and a question to be answered by yes or no."""
    passage = stories.passage(rng, kept)
    who, verb, value = rng.choice(passage.facts)
    truth = rng.random() < 0.5
    if not truth:
        value = other(rng, [v for _, m, v in passage.facts if m == verb and v != value] or passage.pool(verb), value)
    question = f"Is {who} in the {value}?" if verb == "is" else f"Does {who} have the {value}?"
    return item(rng, _ask(question, passage.text), "yes" if truth else "no", ["no" if truth else "yes"])


def passage_span(rng: Random, world: World, kept: bool) -> Item:
    """A short passage and a question whose answer stands in it."""
    passage = stories.passage(rng, kept)
    who, verb, value = rng.choice(passage.facts)
    people = sorted({person for person, _, _ in passage.facts})
    question = f"Who is in the {value}?" if verb == "is" else f"Who has the {value}?"
    return item(rng, _ask(question, passage.text), who, [person for person in people if person != who])


def story_ending(rng: Random, world: World, kept: bool) -> Item:
    """The likely last sentence of a little story."""
    text, right, wrong = stories.story(rng, kept)
    return item(rng, text, right, [wrong])


def pronouns(rng: Random, world: World, kept: bool) -> Item:
    """Whom or what a pronoun means."""
    text, right, wrong = stories.pronoun(rng, kept)
    return item(rng, text, right, [wrong])


def sequences(rng: Random, world: World, kept: bool) -> Item:
    """What comes next: numbers by a step, days, months."""
    while True:
        if rng.random() < 0.7:
            start, step = rng.randint(1, 60), rng.choice((1, 2, 3, 4, 5, 10, -1, -2, -3))
            terms = [start + step * i for i in range(5)]
            if min(terms) < 0:
                continue
            value, shown = str(terms[-1]), [str(t) for t in terms[:-1]]
            wrong = [str(v) for v in rng.sample([v for v in range(terms[-1] - 4, terms[-1] + 5) if v > 0], 4)]
        else:
            ring, step = rng.choice((lex.DAYS, lex.MONTHS)), rng.choice((1, 2, -1))
            start = rng.randrange(len(ring))
            around = [ring[(start + step * i) % len(ring)] for i in range(5)]
            value, shown = around[-1], around[:-1]
            wrong = rng.sample(ring, 4)
        if held_out(" ".join(shown), 2) == kept:
            break
    return item(rng, ", ".join(shown) + ",", value, [w for w in wrong if w != value][:3])


SKILLS: dict[str, Callable[[Random, World, bool], Item]] = {
    "facts": facts,
    "two_hop": two_hop,
    "arithmetic": arithmetic,
    "comparison": comparison,
    "opposites": opposites,
    "categories": categories,
    "passage_yes_no": passage_yes_no,
    "passage_span": passage_span,
    "story_ending": story_ending,
    "pronouns": pronouns,
    "sequences": sequences,
}
