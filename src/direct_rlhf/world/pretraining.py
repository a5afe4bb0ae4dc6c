"""The pretraining text: an endless stream of documents, drawn by fixed shares."""

from collections.abc import Callable, Iterator
from random import Random

from direct_rlhf.world import prose
from direct_rlhf.world.dialogues import draw, transcript
from direct_rlhf.world.knowledge import World
from direct_rlhf.world.skills import SKILLS

TRANSCRIPTS = 0.33  # share of documents (they are long: about 60 % of the tokens)
_PROSE: dict[str, tuple[Callable[[Random, World], str], float]] = {
    "profile": (prose.profile, 0.26),
    "chain": (prose.chain, 0.06),
    "town": (prose.town, 0.04),
    "tool": (prose.tool, 0.02),
    "animal": (prose.animal, 0.05),
    "member": (prose.member, 0.04),
    "size": (prose.size, 0.05),
    "number_pair": (prose.number_pair, 0.03),
}
_SKILLS = {
    "facts": 0.05,
    "two_hop": 0.06,
    "arithmetic": 0.07,
    "comparison": 0.04,
    "opposites": 0.03,
    "categories": 0.06,
    "passage_yes_no": 0.08,
    "passage_span": 0.08,
    "story_ending": 0.05,
    "pronouns": 0.05,
    "sequences": 0.04,
}

_ITEMS = {  # least and most items of a document
    "arithmetic": (3, 6),
    "comparison": (1, 3),
    "facts": (1, 3),
    "two_hop": (1, 3),
    "opposites": (1, 4),
    "sequences": (1, 3),
}


def plain_text(rng: Random, world: World) -> str:
    """A document without dialogue: prose, or a few items of a skill with their answers."""
    name = draw(rng, {**{name: share for name, (_, share) in _PROSE.items()}, **_SKILLS})
    if name in _PROSE:
        return _PROSE[name][0](rng, world)
    items = [SKILLS[name](rng, world, False) for _ in range(rng.randint(*_ITEMS.get(name, (1, 2))))]
    texts = [item.prompt + item.choices[item.gold] for item in items]
    return "\n".join(texts)


def documents(seed: int, world: World) -> Iterator[tuple[str, bool]]:
    """Documents without end: (text, whether it ends rather than breaks off)."""
    rng = Random(seed)
    while True:
        yield transcript(rng, world) if rng.random() < TRANSCRIPTS else (plain_text(rng, world), True)
