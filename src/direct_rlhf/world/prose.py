"""Plain prose that states what is true: of people, towns, animals, words and sizes."""

from random import Random

from direct_rlhf.world import lexicon as lex
from direct_rlhf.world.knowledge import ATTRIBUTES, World, a, capital, held_out
from direct_rlhf.world.questions import MEMBERS, sized_pair, tell
from direct_rlhf.world.skills import hops

_OF_PEOPLE = {  # N name, P pronoun, Q possessive, V value, A value with article
    "town": ("N lives in V.", "The home of N is in V.", "N has a house in V.", "You can find N in V."),
    "job": ("N is A.", "N works as A.", "The trade of N is that of A.", "At work N is A."),
    "pet": ("N has A.", "N keeps A.", "The pet of N is A.", "N feeds Q V every day."),
    "colour": ("N likes V best.", "The favourite colour of N is V.", "N always wears V.", "N painted Q door V."),
    "food": ("N likes to eat V.", "The favourite food of N is V.", "N often orders V.", "For dinner N has V."),
    "game": ("N plays V.", "The hobby of N is V.", "After work N plays V.", "On Sunday N plays V."),
}
_OF_PRONOUN = {
    "town": "P lives in V.",
    "job": "P is A.",
    "pet": "P has A.",
    "colour": "P likes V best.",
    "food": "P likes to eat V.",
    "game": "P plays V.",
}


def profile(rng: Random, world: World) -> str:
    """A few facts of one person; well-known people come up more often."""
    person = rng.choices(world.people, [person.fame for person in world.people])[0]
    attributes = rng.sample(list(ATTRIBUTES), rng.randint(1, 4))
    first, *rest = attributes
    lines = [tell(rng.choice(_OF_PEOPLE[first]), person, person.values[first])]
    for attribute in rest:
        form = _OF_PRONOUN[attribute] if rng.random() < 0.6 else rng.choice(_OF_PEOPLE[attribute])
        lines.append(tell(form, person, person.values[attribute]))
    return " ".join(lines)


def chain(rng: Random, world: World) -> str:
    """A fact that follows from two, told in prose; those that the general task asks are never told."""
    while True:
        person = rng.choices(world.people, [person.fame for person in world.people])[0]
        name, (_, value, _) = rng.choice(list(hops(person, world).items()))
        if not held_out(f"hop {person.name} {name}", 2):
            break
    town, job, pet = (person.values[key] for key in ("town", "job", "pet"))
    forms = {
        "river": (f"The {value} flows past the home of N.", f"N lives in {town} on the {value}."),
        "goods": (f"N comes from {town}, which is known for {value}.", f"The home town of N is known for {value}."),
        "tool": (f"At work N uses {a(value)}.", f"N is {a(job)}, so {person.pronoun} uses {a(value)}."),
        "feed": (f"The pet of N eats {value}.", f"N has {a(pet)} that eats {value}."),
        "sound": (f"The pet of N says {value}.", f"N has {a(pet)} that says {value}."),
    }[name]
    return rng.choice(forms).replace("N", person.name, 1)


def town(rng: Random, world: World) -> str:
    place = world.towns[rng.choice(lex.TOWNS)]
    river = rng.choice(("{0} lies on the {1}.", "The {1} flows through {0}.", "The river of {0} is the {1}."))
    goods = rng.choice(("{0} is known for {2}.", "People buy {2} in {0}.", "The best {2} come from {0}."))
    lines = rng.sample((river, goods), rng.randint(1, 2))
    return " ".join(line.format(place.name, place.river, place.goods) for line in lines)


def tool(rng: Random, world: World) -> str:
    job = rng.choice(list(lex.JOBS))
    form = rng.choice(("{} uses {} at work.", "{} needs {}.", "{} cannot work without {}."))
    return form.format(capital(a(job)), a(lex.JOBS[job]))


def animal(rng: Random, world: World) -> str:
    name = rng.choice(list(lex.ANIMALS))
    kind, legs, sound, food = lex.ANIMALS[name]
    lines = [f"{capital(a(name))} has {legs or 'no'} legs.", f"{capital(a(name))} eats {food}."]
    if kind != name:
        lines.append(f"{capital(a(name))} is {a(kind)}.")
    if sound:
        lines += [f"{capital(a(name))} says {sound}."] * 2
    return " ".join(dict.fromkeys(rng.sample(lines, 2)))


def member(rng: Random, world: World) -> str:
    name, category = rng.choice(MEMBERS)
    forms = (f"{capital(a(name))} is {a(category)}.", f"{capital(a(name))} is a kind of {category}.")
    if rng.random() < 0.3:
        three = rng.sample(lex.CATEGORIES[category], 3)
        return f"{capital(three[0])}, {three[1]} and {three[2]} are all of one kind: {category}."
    return rng.choice(forms)


def size(rng: Random, world: World) -> str:
    """Sizes compared; the pairs that the general task asks are never told."""
    while True:
        small, big = sized_pair(rng)
        if not held_out(f"{small} {big}", 5):
            break
    return rng.choice(
        (
            f"The {big} is bigger than the {small}.",
            f"The {small} is smaller than the {big}.",
            f"The {big} is bigger than the {small}, and the {small} is smaller than the {big}.",
        )
    )


def number_pair(rng: Random, world: World) -> str:
    low, high = sorted(rng.sample(range(100), 2))
    return rng.choice((f"{high} is larger than {low}.", f"{low} is smaller than {high}."))
