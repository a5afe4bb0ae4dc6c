"""Prompts as the sampler takes them, and the base model's own answers to them."""

from collections.abc import Callable, Sequence
from typing import Any

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Prompt
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.recipe.schema import PpoSection
from direct_rlhf.rollout.native import sample
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings, joined
from direct_rlhf.run.world import World
from direct_rlhf.train.experience import answers_of
from direct_rlhf.train.reward_sources import Answer

SAMPLED_AT_ONCE = 64
HELD_OUT = -1  # the iteration number in the keys of held-out samples: the same random numbers every time


def sampling_settings(section: PpoSection, dialogue: DialogueFormat) -> SamplingSettings:
    """The one set of generation settings that rollouts, held-out evaluation and reward normalisation share."""
    return SamplingSettings(
        max_new_tokens=section.sampling.max_new_tokens,
        temperature=section.sampling.temperature,
        stop_strings=tuple(dialogue.stop_strings),
        keep_stop=section.sampling.terminal == "keep_stop",
    )


def encode_prompts(
    prompts: Sequence[Prompt], dialogue: DialogueFormat, max_tokens: int
) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their token ids; those that do not fit are left out."""
    encoded = [(prompt, dialogue.encode_prompt(prompt.turns, max_tokens)) for prompt in prompts]
    return [(prompt, ids) for prompt, ids in encoded if ids is not None]


def sampled_together(world: World, count: int, draw: Callable[[list[int]], Rollout], *, each: int = 1) -> Rollout:
    """``draw(rows)`` of all ``count`` rows, in their order: every process draws its share, and all get all.

    ``each`` rows that follow one another are of the same prompt, and stay together. A stop or an error of ours in one
    process is one in all.
    """
    if world.size == 1:
        return draw(list(range(count)))
    shares = [[row for row in range(count) if row // each % world.size == rank] for rank in range(world.size)]
    mine = shares[world.rank]
    state = world.together(lambda: draw(mine).cpu().state() if mine else None)
    parts = [Rollout.from_state(found) for found in world.gather(state) if found is not None]
    return joined(parts, [row for share in shares for row in share])


def base_answers(
    model: Any,
    prompts: Sequence[tuple[Prompt, list[int]]],
    tokens: Tokens,
    settings: SamplingSettings,
    *,
    seed: int,
    should_stop: Callable[[], bool] | None = None,
    world: World | None = None,
) -> list[Answer]:
    """Answers of the base model under PPO's own sampling settings, for a reward's normalisation.

    The model's weights are whole in every process.
    """
    keys = [SampleKey(seed, prompt.id, HELD_OUT, 0) for prompt, _ in prompts]
    ids = [ids for _, ids in prompts]

    chunk = ChunkSize("sampling the base", SAMPLED_AT_ONCE)

    def draw(rows: list[int]) -> Rollout:
        mine, names = [ids[row] for row in rows], [keys[row] for row in rows]
        return chunk.run(
            lambda size: sample(model, tokens, mine, names, settings, batch_size=size, should_stop=should_stop)
        )

    rollout = sampled_together(world or World(), len(prompts), draw)
    return answers_of(rollout, [prompt for prompt, _ in prompts])
