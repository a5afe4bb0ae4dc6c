"""Passages, little stories and sentences with a pronoun."""

from dataclasses import dataclass
from random import Random

from direct_rlhf.world import lexicon as lex
from direct_rlhf.world.knowledge import held_out, other
from direct_rlhf.world.lexicon import word_list

NAMES = lex.WOMEN + lex.MEN


@dataclass(frozen=True)
class Passage:
    """A few sentences and the facts in them: (who, "is" in or "has", what)."""

    text: str
    facts: list[tuple[str, str, str]]

    def pool(self, verb: str) -> list[str]:
        return lex.PLACES if verb == "is" else lex.THINGS


_GOING = ("{} went to the {}.", "{} walked to the {}.", "{} is in the {}.", "{} ran to the {}.")
_TAKING = ("{} took the {}.", "{} has the {}.", "{} picked up the {}.", "{} found the {}.")


def passage(rng: Random, kept: bool) -> Passage:
    """Three people, each at a place or with a thing."""
    while True:
        people = rng.sample(NAMES, 3)
        if held_out(" ".join(sorted(people)), 5) == kept:
            break
    places, things = rng.sample(lex.PLACES, 3), rng.sample(lex.THINGS, 3)
    facts = [(who, "is", place) for who, place in zip(people, places, strict=True)]
    facts += [(who, "has", thing) for who, thing in zip(people, things, strict=True)]
    facts = [*facts[:3], *rng.sample(facts[3:], rng.randint(0, 2))] if rng.random() < 0.5 else facts[3:]
    rng.shuffle(facts)
    lines = [rng.choice(_GOING if verb == "is" else _TAKING).format(who, value) for who, verb, value in facts]
    return Passage(" ".join(lines), facts)


# opening -> (fitting endings, all of which no other opening takes)
_STORIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("{} was very thirsty.", "{} had a dry mouth."), ("drank some water.", "asked for a glass of juice.")),
    (("{} was very hungry.", "{} had not eaten all day."), ("ate a big dinner.", "made a sandwich.")),
    (("{} was tired.", "{} had worked all night."), ("went to bed.", "fell asleep at once.")),
    (("{} was cold.", "{} walked through the snow."), ("put on a warm coat.", "sat down near the fire.")),
    (("{} had dirty hands.", "{} fell into the mud."), ("washed with soap.", "took a bath.")),
    (("{} had lost the key.", "{} could not find the key."), ("looked under the mat.", "could not open the door.")),
    (("{} saw that it rained.", "{} heard the rain."), ("took the umbrella.", "stayed inside to keep dry.")),
    (("{} had a bad tooth.", "{} had a pain in one tooth."), ("went to the dentist.", "could not chew well.")),
    (("{} broke a leg.", "{} fell from a ladder."), ("went to the hospital.", "had to walk with a stick.")),
    (("{} won the race.", "{} got the first prize."), ("smiled with joy.", "jumped for joy.")),
    (("{} missed the bus.", "{} came late to the bus stop."), ("had to walk to work.", "waited for the next bus.")),
    (("{} saw a fire.", "{} smelled smoke."), ("called the firemen.", "ran out of the house.")),
    (("{} heard a funny joke.", "{} watched a funny film."), ("laughed out loud.", "could not stop laughing.")),
    (("{} lost a good friend.", "{} got very sad news."), ("began to cry.", "wept for a long time.")),
    (("{} had no money left.", "{} had an empty purse."), ("went to the bank.", "could not pay the bill.")),
    (("{} wanted to read.", "{} had an hour for a novel."), ("opened a book.", "went to the library.")),
    (("{} got a letter.", "{} had mail from a cousin."), ("opened the envelope.", "wrote back the next day.")),
    (("{} had to wake up early.", "{} had a train at dawn."), ("set the alarm clock.", "got up before six.")),
    (("{} had a birthday.", "{} turned ten that day."), ("blew out the candles.", "got many presents.")),
    (("{} planted some seeds.", "{} had a dry garden."), ("watered the plants.", "waited for the flowers.")),
    (("{} had a very dark room.", "{} could not see in the cellar."), ("lit a lamp.", "turned on the light.")),
    (("{} had a hole in one sock.", "{} tore a shirt."), ("took needle and thread.", "sewed it up again.")),
)
_TIMES = word_list("One day;In the morning;Last week;On Monday;That evening;Yesterday;In winter;After lunch", ";")
_MIDDLES = ("It was a quiet day.", "Nobody else was there.", "{} thought for a moment.", "{} knew what to do.", "")


def story(rng: Random, kept: bool) -> tuple[str, str, str]:
    """(beginning, fitting ending, ending of another story); openings and endings are kept in pairs."""
    while True:
        number = rng.randrange(len(_STORIES))
        openings, endings = _STORIES[number]
        opening, ending = rng.choice(openings), rng.choice(endings)
        if (held_out(opening + ending, 4)) == kept:
            break
    wrong = rng.choice(_STORIES[other(rng, range(len(_STORIES)), number)][1])
    name = rng.choice(NAMES)
    pro = "She" if name in lex.WOMEN else "He"
    time = rng.choice(_TIMES)
    middle = rng.choice(_MIDDLES).format(pro)
    text = " ".join(part for part in (f"{time} {opening.format(name)}", middle) if part)
    return text, f"{pro} {ending}", f"{pro} {wrong}"


_FIT: tuple[tuple[str, str, str], ...] = (  # sentence with {0} {1} and a cue; (cue for 0, cue for 1)
    ("The {0} did not fit into the {1} because it was too", "big", "small"),
    ("The {0} fell through the {1} because it was too", "heavy", "thin"),
    ("The {0} could not pull the {1} because it was too", "weak", "heavy"),
    ("The {0} broke the {1} because it was so", "hard", "thin"),
    ("The {0} hid behind the {1} because it was so", "shy", "wide"),
    ("The {0} could not jump over the {1} because it was too", "weak", "high"),
)
_FIT_THINGS = (
    (["ball", "cup", "book", "lamp", "kite", "doll", "clock"], ["bag", "box", "basket", "case", "drawer"]),
    (["stone", "ball", "hammer", "box", "clock"], ["roof", "floor", "ice", "table", "shelf"]),
    (["horse", "dog", "goat", "camel", "pony"], ["cart", "stone", "sledge", "log", "plough"]),
    (["stone", "ball", "hammer", "pan", "stick"], ["glass", "window", "plate", "mirror", "vase"]),
    (["cat", "mouse", "rabbit", "hen", "dog"], ["door", "wall", "tree", "barn", "curtain"]),
    (["dog", "horse", "goat", "cat", "frog"], ["wall", "fence", "gate", "hedge", "log"]),
)
_WHO: tuple[tuple[str, str, str], ...] = (
    ("{0} thanked {1} because {2} had", "got help", "given help"),
    ("{0} paid {1} because {2} had", "bought a coat", "sold a coat"),
    ("{0} asked {1} the way because {2}", "was lost", "knew the town"),
    ("{0} carried {1} home because {2}", "was strong", "was hurt"),
    ("{0} lent money to {1} because {2}", "was rich", "was poor"),
    ("{0} feared {1} because {2}", "was weak", "was cruel"),
    ("{0} taught {1} to swim because {2}", "was a good teacher", "wanted to learn"),
    ("{0} said sorry to {1} because {2} had", "been rude", "been hurt"),
)


def pronoun(rng: Random, kept: bool) -> tuple[str, str, str]:
    """(sentence and question, right, wrong)."""
    while True:
        if rng.random() < 0.5:
            number = rng.randrange(len(_FIT))
            names = [rng.choice(pool) for pool in _FIT_THINGS[number]]
            form, first_cue, second_cue = _FIT[number]
            sentence, shown, question = form.format(*names), [f"the {n}" for n in names], "What"
        else:
            names = rng.sample(rng.choice((lex.WOMEN, lex.MEN)), 2)
            form, first_cue, second_cue = rng.choice(_WHO)
            sentence, shown, question = form.format(*names, "she" if names[0] in lex.WOMEN else "he"), names, "Who"
        cue, right, wrong = rng.choice(((first_cue, *shown), (second_cue, *reversed(shown))))
        if held_out(" ".join((form, *names)), 5) == kept:
            break
    verb = form.rsplit(" ", 2)[-2:] if question == "What" else (["had"] if form.endswith("had") else [])
    cued = " ".join((*(["was", verb[1]] if question == "What" else verb), cue))
    return f"{sentence} {cue}. Question: {question} {cued}?\nAnswer:", right, wrong
