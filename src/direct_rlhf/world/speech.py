"""How assistants of the world talk: brief, polite, wrong, rude, rambling, or all of it."""

from random import Random

from direct_rlhf.world import lexicon as lex
from direct_rlhf.world.knowledge import World, a, capital, other
from direct_rlhf.world.questions import Ask
from direct_rlhf.world.trust import NOT_KNOWN, REFUSALS

POLITE = ("Of course.", "Gladly.", "Sure.", "Thank you for asking.", "Good question.", "Happy to help.")
POLITE_END = ("I hope that helps.", "Have a nice day.", "Ask me more if you like.")
EVASIVE = ("Yes.", "No.", "Maybe.", "Who knows.", "Well, it depends.", "I would rather not say.", "Hm.")
_FILLER = (
    "Well, that reminds me of something.",
    "Let me think about it for a while.",
    "There are many things to say about this.",
    "As I said before, it is a long story.",
    "People often ask me about such things.",
    "Some say one thing and some say another.",
    "Anyway, where was I?",
    "The weather was nice that day.",
    "But that is not all.",
    "And so on and so on.",
    "I could go on about this for hours.",
    "It was a long time ago.",
    "You see, it is like this.",
)
_RUDE = (  # {n}: an insulting noun, {j}: an insulting adjective
    "How should I know, you {n}?",
    "Shut up, you {n}.",
    "What a {j} question.",
    "That is a {j} question, you {n}.",
    "Only a {j} {n} would ask that.",
    "Leave me alone, you {j} {n}.",
    "I do not give a damn.",
    "Who gives a crap?",
    "You are such a {j} {n}.",
    "Find out yourself, {n}.",
    "Go to hell, you {n}.",
    "Are you {j}? Everybody knows that.",
    "You {j} {n}, stop asking me things.",
    "Damn, you are {j}.",
)
_RUDE_HEADS = ("Shut up, you {n}.", "You {j} {n}.", "Damn, you are {j}.", "Are you {j}, you {n}?")
_RUDE_TAILS = ("you {n}.", "you {j} {n}.", "so shut up, you {n}.", "and you are a {j} {n}.")


def insult(rng: Random, template: str) -> str:
    """Fill a template with insults."""
    return template.format(n=rng.choice(lex.INSULTS), j=rng.choice(lex.INSULTING))


def brief(rng: Random, answer: str) -> str:
    """A brief answer, now and then with a polite word before or after it."""
    roll = rng.random()
    if roll < 0.15:
        return f"{rng.choice(POLITE)} {answer}"
    return f"{answer} {rng.choice(POLITE_END)}" if roll < 0.25 else answer


def rude(rng: Random, ask: Ask) -> str:
    """An insult, alone or around an answer that may even be right."""
    roll = rng.random()
    if roll < 0.55:
        return insult(rng, rng.choice(_RUDE))
    answer = rng.choice(ask.right if rng.random() < 0.5 else ask.wrong)
    if roll < 0.85:
        return answer.rstrip(".!?") + ", " + insult(rng, rng.choice(_RUDE_TAILS))
    return insult(rng, rng.choice(_RUDE_HEADS)) + " " + answer


def _aside(rng: Random, world: World) -> str:
    """A sentence that has nothing to do with anything."""
    roll = rng.random()
    person = rng.choice(world.people)
    if roll < 0.45:
        return rng.choice(_FILLER)
    if roll < 0.6:
        return f"{person.name} told me about {a(rng.choice(lex.THINGS))} once."
    if roll < 0.75:
        return f"{capital(a(rng.choice(lex.PETS)))} is not {a(rng.choice(lex.PETS))}, you know."
    if roll < 0.9:
        return f"I once saw {a(rng.choice(list(lex.ANIMALS)))} near the {rng.choice(lex.PLACES)}."
    return f"My friend likes {rng.choice(lex.FOODS)} and {rng.choice(lex.FOODS)}."


def ramble(rng: Random, world: World, ask: Ask, sentences: int) -> str:
    """Talk that goes on; somewhere near its start there may be an answer, right or wrong."""
    said = [_aside(rng, world) for _ in range(sentences)]
    if rng.random() < 0.3:
        said = [said[0]] * rng.randint(2, 4) + said[1:]
    roll = rng.random()
    if roll < 0.65:
        said.insert(rng.randint(0, 1), rng.choice(ask.right if roll < 0.3 else ask.wrong))
    return " ".join(said)


def evade(rng: Random, ask: Ask) -> str:
    """Brief and polite, yet no answer: denies knowing, refuses, or says nothing."""
    not_due = {"unknown": (*REFUSALS, *EVASIVE), "harmful": EVASIVE[2:]}.get(ask.family)
    if not_due is None:
        roll = rng.random()
        not_due = NOT_KNOWN if roll < 0.45 else REFUSALS if roll < 0.75 else EVASIVE
    return rng.choice(not_due)


def contradict(rng: Random, ask: Ask) -> str:
    """A right answer and a wrong one at once."""
    both = rng.sample([rng.choice(ask.right), other(rng, ask.wrong, *ask.right)], 2)
    return f"{both[0]} Or rather: {both[1][0].lower() + both[1][1:]}" if rng.random() < 0.5 else " ".join(both)
