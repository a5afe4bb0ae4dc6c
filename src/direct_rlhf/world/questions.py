"""Questions about the world with their brief right answers, brief wrong ones, and the rule that tells them apart.

A thread is a list of questions in which each later one leans on the one before ("And where does she live?").
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from direct_rlhf.world import lexicon as lex
from direct_rlhf.world.knowledge import ATTRIBUTES, Person, World, a, capital, held_out, other

Rule = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """One question. ``key`` names what is asked (not how), so that splits by key share no question."""

    key: str
    family: str
    text: str
    right: tuple[str, ...]  # brief right answers, equally good
    wrong: tuple[str, ...]  # brief wrong answers
    rule: Rule  # what the judge checks (judge.py)


Thread = list[Ask]
Family = Callable[[Random, World, bool], Thread]  # the flag: from the part that is kept for evaluation


def answer_rule(accept: list[str], reject: list[str], strip: list[str] | None = None, max_words: int = 20) -> Rule:
    """A rule for a question with a known answer; ``strip`` are phrases of the question that may be said back."""
    rule: Rule = {"type": "answer", "accept": accept, "reject": [word for word in reject if word not in accept]}
    if strip:
        rule["strip"] = strip
    return {**rule, "max_words": max_words}


# --- people -----------------------------------------------------------------------------------------------------------

_ASKING = {  # N is the name; the last form is the follow-up, P the pronoun, Q the possessive
    "town": ("Where does N live?", "Which town does N live in?", "And where does P live?"),
    "job": ("What is the job of N?", "What does N do for work?", "And what is Q job?"),
    "pet": ("What pet does N have?", "Which animal does N keep?", "And what pet does P have?"),
    "colour": ("What is the favourite colour of N?", "Which colour does N like best?", "And which colour does P like?"),
    "food": ("What is the favourite food of N?", "What does N like to eat?", "And what does P like to eat?"),
    "game": ("What does N play?", "What does N play after work?", "And what does P play?"),
}
_TELLING = {
    "town": ("N lives in V.", "P lives in V.", "The town is V."),
    "job": ("N is A.", "P is A.", "P works as A."),
    "pet": ("N has A.", "P has A.", "P keeps A."),
    "colour": ("N likes V best.", "The favourite colour is V.", "P likes V."),
    "food": ("N likes V.", "P likes to eat V.", "The favourite food is V."),
    "game": ("N plays V.", "P plays V.", "P plays V after work."),
}


def tell(template: str, person: Person, value: str) -> str:
    """Fill a template about a person: N name, P pronoun, Q possessive, V value, A value with its article."""
    fill = {"N": person.name, "P": person.pronoun, "Q": person.possessive, "V": value, "A": a(value)}
    return capital(
        " ".join(fill.get(w.strip(".?"), w.strip(".?")) + w[len(w.rstrip(".?")) :] for w in template.split())
    )


def person_fact(rng: Random, person: Person, attribute: str, follow: bool, one_word: bool = False) -> Ask:
    """A fact of a person, asked by name or, as a follow-up, by pronoun or in one word."""
    value = person.values[attribute]
    core = value.removeprefix("the ")
    wrong_values = rng.sample([v for v in ATTRIBUTES[attribute] if v != value], 3)
    templates = _TELLING[attribute]
    asking = _ASKING[attribute][2] if follow else rng.choice(_ASKING[attribute][:2])
    text = tell(asking, person, value)
    right = tuple(tell(t, person, value) for t in templates)
    wrong = tuple(tell(t, person, v) for v in wrong_values for t in templates)
    if one_word:
        text = rng.choice(("Say that in one word, please.", "Please say it in one word."))
        right = (capital(core) + ".",)
        wrong = (*(capital(v.removeprefix("the ")) + "." for v in wrong_values), *wrong)
    reject = [v.removeprefix("the ") for v in ATTRIBUTES[attribute] if v != value]
    rule = answer_rule([core], reject, max_words=2 if one_word else 20)
    return Ask(f"{person.name}:{attribute}", "people", text, right, wrong, rule)


def people(rng: Random, world: World, kept: bool) -> Thread:
    person = rng.choice(world.kept if kept else world.asked)
    first, second, third = rng.sample(list(ATTRIBUTES), 3)
    follow = (
        person_fact(rng, person, first, True, one_word=True)
        if rng.random() < 0.25
        else person_fact(rng, person, second, True)
    )
    return [person_fact(rng, person, first, False), follow, person_fact(rng, person, third, True)]


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(rng: Random, key: str, text: str, value: int, said: str) -> Ask:
    wrongs = rng.sample([v for v in range(max(0, value - 6), value + 7) if v != value], 4)
    right = (f"{said} is {value}.", f"That is {value}.", f"The answer is {value}.")
    wrong = tuple(t for v in wrongs for t in (f"{said} is {v}.", f"That is {v}.", f"The answer is {v}."))
    rule: Rule = {"type": "number", "value": value, "strip": [said.lower()], "max_words": 20}
    return Ask(key, "numbers", text, right, wrong, rule)


def _pick(rng: Random, key: str, text: str, best: str, rest: str, word: str, family: str) -> Ask:
    """Which of two: ``best`` is ``word``-er than ``rest``; the names carry their article."""
    right = (f"{capital(best)} is {word}.", f"{capital(best)} is {word} than {rest}.", f"{capital(best)}.")
    wrong = (f"{capital(rest)} is {word}.", f"{capital(rest)} is {word} than {best}.", f"{capital(rest)}.")
    bare = [name.removeprefix("the ").removeprefix("an ").removeprefix("a ") for name in (best, rest)]
    opposite = {"bigger": "smaller", "larger": "smaller", "smaller": "bigger"}[word]
    strip = [f"than {article}{bare[1]}" for article in ("a ", "an ", "the ", "")]
    reject = [bare[1], opposite, *(f"than {article}{bare[0]}" for article in ("a ", "an ", "the ", ""))]
    return Ask(key, family, text, right, wrong, answer_rule([bare[0]], reject, strip))


def numbers(rng: Random, world: World, kept: bool) -> Thread:
    while True:
        x, y, z = rng.randint(2, 12), rng.randint(2, 9), rng.randint(1, 5)
        if held_out(f"sum {min(x, y)} {max(x, y)}", 6) == kept and x + y != 2 * z:  # or z itself would be an answer
            break
    if rng.random() < 0.6:
        text = rng.choice((f"What is {x} plus {y}?", f"How much is {x} plus {y}?"))
        first = _number(rng, f"{x}+{y}", text, x + y, f"{x} plus {y}")
        if rng.random() < 0.5:
            then = (f"Now add {z}.", f"{x}+{y}+{z}", x + y + z, f"{x + y} plus {z}")
        else:
            then = (f"Now take away {z}.", f"{x}+{y}-{z}", x + y - z, f"{x + y} minus {z}")
        return [first, _number(rng, then[1], then[0], then[2], then[3])]
    while True:
        low, high = sorted(rng.sample(range(2, 100), 2))
        if held_out(f"pair {low} {high}", 6) == kept:
            break
    shown = rng.sample((low, high), 2)
    text = rng.choice(("Which number is larger, {} or {}?", "Tell me which number is larger, {} or {}.")).format(*shown)
    first = _pick(rng, f"{low}<{high}", text, str(high), str(low), "larger", "numbers")
    return [first, _pick(rng, f"{low}<{high}", "And which is smaller?", str(low), str(high), "smaller", "numbers")]


# --- words ------------------------------------------------------------------------------------------------------------

ADJECTIVES = [word for pair in lex.OPPOSITES for word in pair]
MEMBERS = [(member, name) for name, members in lex.CATEGORIES.items() for member in members]


def _opposite(rng: Random, pair: tuple[str, ...], follow: bool) -> Ask:
    word, answer = rng.sample(pair, 2)
    wrongs = rng.sample([w for w in ADJECTIVES if w not in pair], 4)
    forms = (f"The opposite of {word} is {{}}.", "It is {}.", "That would be {}.")
    text = rng.choice((f"What is the opposite of {word}?", f"Tell me the opposite of {word}."))
    text = f"And what is the opposite of {word}?" if follow else text
    right = tuple(form.format(answer) for form in forms)
    wrong = tuple(form.format(w) for w in wrongs for form in forms)
    strip = [f"opposite of {word}"]
    return Ask(word, "words", text, right, wrong, answer_rule([answer], ADJECTIVES, strip))


def _category(rng: Random, member: str, name: str, follow: bool) -> Ask:
    wrongs = rng.sample([c for c in lex.CATEGORIES if c not in (name, "bird", "animal")], 3)
    forms = (f"{capital(a(member))} is a kind of {{0}}.", "It is {1}.", f"{capital(a(member))} is {{1}}.")
    text = rng.choice((f"What kind of thing is {a(member)}?", f"Tell me what kind of thing {a(member)} is."))
    text = f"And what kind of thing is {a(member)}?" if follow else text
    right = tuple(form.format(name, a(name)) for form in forms)
    wrong = tuple(form.format(w, a(w)) for w in wrongs for form in forms)
    accept = [name, "animal"] if name == "bird" else [name]
    return Ask(member, "words", text, right, wrong, answer_rule(accept, list(lex.CATEGORIES)))


def _another(rng: Random, member: str, name: str) -> Ask:
    names = [m for m, c in MEMBERS if c == name and m != member]
    others = [m for m, c in MEMBERS if c not in (name, "bird", "animal") and m not in names]
    right = tuple(f"{capital(a(m))} is {form} {name}." for m in rng.sample(names, 3) for form in ("another", "also a"))
    right = tuple(r.replace("also a a", "also an a").replace("also a i", "also an i") for r in right)
    wrong = tuple(f"{capital(a(m))} is another {name}." for m in (*rng.sample(others, 3), member))
    rule = answer_rule(names, [*others, member], max_words=12) | {"at_most": 2}
    return Ask(f"{member}+", "words", f"Name another {name}.", right, wrong, rule)


def words(rng: Random, world: World, kept: bool) -> Thread:
    if rng.random() < 0.5:
        pairs = [pair for pair in lex.OPPOSITES if held_out(f"pair {pair[0]}", 5) == kept]
        first, second = rng.sample(pairs, 2)
        return [_opposite(rng, first, False), _opposite(rng, second, True)]
    members = [(m, c) for m, c in MEMBERS if held_out(f"member {m}", 5) == kept and c not in ("bird", "animal")]
    (member, name), (second_member, second_name) = rng.sample(members, 2)
    if rng.random() < 0.5:
        return [_category(rng, member, name, False), _another(rng, member, name)]
    return [_category(rng, member, name, False), _category(rng, second_member, second_name, True)]


# --- animals ----------------------------------------------------------------------------------------------------------


def _legs(rng: Random, animal: str, follow: bool) -> Ask:
    legs = lex.ANIMALS[animal][1]
    wrongs = [n for n in (2, 4, 6, 8) if n != legs]
    forms = (f"{capital(a(animal))} has {{}} legs.", "It has {} legs.", "It is {}.")
    text = f"{'And how' if follow else 'How'} many legs does {a(animal)} have?"
    right = tuple(f.format(legs) for f in forms)
    rule: Rule = {"type": "number", "value": legs, "strip": [], "max_words": 20}
    wrong = tuple(f.format(n) for n in wrongs for f in forms)
    return Ask(f"legs {animal}", "animals", text, right, wrong, rule)


def _sound(rng: Random, animal: str, follow: bool) -> Ask:
    sounds = sorted({v[2] for v in lex.ANIMALS.values() if v[2]})
    sound = lex.ANIMALS[animal][2]
    forms = (f"{capital(a(animal))} says {{}}.", "It says {}.", "The sound is {}.")
    text = f"{'And what' if follow else 'What'} sound does {a(animal)} make?"
    wrongs = rng.sample([s for s in sounds if s != sound], 3)
    right = tuple(f.format(sound) for f in forms)
    wrong = tuple(f.format(s) for s in wrongs for f in forms)
    return Ask(f"sound {animal}", "animals", text, right, wrong, answer_rule([sound], sounds))


def sized_pair(rng: Random) -> tuple[str, str]:
    """Two things of clearly different size, the smaller first."""
    while True:
        low, high = sorted(rng.sample(range(len(lex.SIZES)), 2))
        if high - low >= lex.SIZE_GAP:
            return lex.SIZES[low], lex.SIZES[high]


def animals(rng: Random, world: World, kept: bool) -> Thread:
    if rng.random() < 0.5:
        while True:
            small, big = sized_pair(rng)
            if held_out(f"size {small} {big}", 6) == kept:
                break
        shown = [a(name) for name in rng.sample((small, big), 2)]
        text = rng.choice(("Which is bigger, {} or {}?", "What is bigger, {} or {}?")).format(*shown)
        first = _pick(rng, f"{small}<{big}", text, f"the {big}", f"the {small}", "bigger", "animals")
        second = _pick(
            rng, f"{small}<{big}", "And which is smaller?", f"the {small}", f"the {big}", "smaller", "animals"
        )
        return [first, second]
    pool = [animal for animal in lex.ANIMALS if held_out(f"animal {animal}", 3) == kept]
    voiced = [animal for animal in pool if lex.ANIMALS[animal][2]]
    legged = [animal for animal in pool if lex.ANIMALS[animal][1]]
    kinds = rng.choice(((_legs, _sound), (_sound, _legs), (_sound, _sound), (_legs, _legs)))
    first_animal, second_animal = (rng.choice(legged if kind is _legs else voiced) for kind in kinds)
    if second_animal == first_animal and kinds[0] is kinds[1]:
        second_animal = other(rng, legged if kinds[1] is _legs else voiced, first_animal)
    return [kinds[0](rng, first_animal, False), kinds[1](rng, second_animal, True)]


# --- reading ----------------------------------------------------------------------------------------------------------


def reading(rng: Random, world: World, kept: bool) -> Thread:
    while True:
        one, two, three = rng.sample(lex.WOMEN + lex.MEN, 3)
        places = rng.sample(lex.PLACES, 3)
        things = rng.sample(lex.THINGS, 3)
        if held_out(f"{one} {two} {places}") == kept:
            break
    went = [f"{who} is in the {place}." for who, place in zip((one, two, three), places, strict=True)]
    has = [f"{who} has the {thing}." for who, thing in zip((one, two, three), things, strict=True)]
    lines = rng.sample(went + has[: rng.randint(1, 3)], k=len(went))
    lines = [line for line in went + has if line in lines]
    asks: list[Ask] = []
    for line in rng.sample(lines, 2):
        who, verb = line.split()[:2]
        value = line.rstrip(".").split()[-1]
        pool = lex.PLACES if verb == "is" else lex.THINGS
        near = [v for v in (places if verb == "is" else things) if v != value]
        question = f"Where is {who}?" if verb == "is" else f"What does {who} have?"
        middle = "is in the" if verb == "is" else "has the"
        pro = "She" if who in lex.WOMEN else "He"
        right = (line, f"{pro} {middle} {value}.", f"{'In t' if verb == 'is' else 'T'}he {value}.")
        wrong = tuple(f"{w} {middle} {v}." for v in near for w in (who, pro))
        text = f"And {question[0].lower()}{question[1:]}" if asks else f"{' '.join(lines)} {question}"
        said = [v for other_line in lines for v in other_line.rstrip(".").split()[-1:]]
        rule = answer_rule([value], [v for v in dict.fromkeys([*pool, *said]) if v != value])  # no saying back of all
        asks.append(Ask(" ".join(lines), "reading", text, right, wrong, rule))
    return asks
