"""Prompts as the sampler takes them, and the base model's own answers to them."""

from collections.abc import Callable, Sequence
from typing import Any

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Prompt
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.recipe.schema import PpoSection
from direct_rlhf.rollout.native import sample
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings
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


def base_answers(
    model: Any,
    prompts: Sequence[tuple[Prompt, list[int]]],
    tokens: Tokens,
    settings: SamplingSettings,
    *,
    seed: int,
    should_stop: Callable[[], bool] | None = None,
) -> list[Answer]:
    """Answers of the base model under PPO's own sampling settings, for a reward's normalisation."""
    keys = [SampleKey(seed, prompt.id, HELD_OUT, 0) for prompt, _ in prompts]
    ids = [ids for _, ids in prompts]

    def attempt(size: int) -> Rollout:
        return sample(model, tokens, ids, keys, settings, batch_size=size, should_stop=should_stop)

    rollout = ChunkSize("sampling the base", SAMPLED_AT_ONCE).run(attempt)
    return answers_of(rollout, [prompt for prompt, _ in prompts])
