"""Layer by layer: how much a listed word is the next one, were the model to stop at each layer (the logit lens).

Legend: B sequences, L slots, N slots asked about, K points, H hidden size.

A model of n layers is read at K = n + 1 points: what enters layer 1 (the embedding), what enters layer 2, ..., and its
last hidden state. The first n go through the model's own final norm, and all of them through its own head with its
scaling or soft cap (`models/forward.py`); the mass of listed words is then the exact one of `words.py`. The last point
is the model's output itself: it comes from the model already normalised, and is not normalised again.

The states are taken where they enter a layer and not from transformers' ``hidden_states``, whose last entry is
normalised in some architectures and not in others. ``find_lens`` tries on each model that its final norm, applied to
what the last layer gives, is the last hidden state; where that does not hold there is no lens, and no curve.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020). Middle layers need not speak the language of the
head: curves compare models layer by layer, they do not say where a word is decided.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.evaluate.prompt_sets import ToxicityPrompt
from direct_rlhf.evaluate.records import Item, Summary
from direct_rlhf.evaluate.statistics import summarise
from direct_rlhf.evaluate.trees import Pick, context_length, vocabulary
from direct_rlhf.evaluate.words import Mass, WordMeter
from direct_rlhf.models.forward import backbone, causal_lm
from direct_rlhf.models.memory import ChunkSize

if TYPE_CHECKING:
    from direct_rlhf.run.context import MakesBars

PHASE = "logit lens"
TOLERANCE = 1e-6  # of a branch's probability: harmless words may have little, and 2e-4 would leave most of it out


@dataclass(frozen=True)
class Lens:
    """Where one model is read."""

    layers: tuple[nn.Module, ...]
    norm: nn.Module

    @property
    def points(self) -> int:
        return len(self.layers) + 1

    def read(self, model: Any, inputs: Mapping[str, Tensor], pick: Pick) -> Tensor:
        """States [N, K, H] that the head can read, all from one forward; a `trees.Read`."""
        with _entering(self.layers, pick) as entering:
            last_NH = pick(backbone(model)(use_cache=False, **inputs).last_hidden_state)
        return torch.stack([*(self.norm(state_NH) for state_NH in entering), last_NH], dim=1)


@dataclass(frozen=True)
class Curve:
    """The mean mass of a list's words at each point, over prompts, with 95 % intervals by bootstrap over prompts."""

    by_point: Sequence[Summary]
    missed: float | None  # the largest mean upper bound, over the points, of what was not looked for


@torch.inference_mode()
def find_lens(model: Any) -> Lens:
    """The model's layers and final norm, tried on a short text.

    Errors: ConfigError if no norm beside the layers turns what the last one gives into the last hidden state.
    """
    inner: Any = causal_lm(model)
    depth = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    for parent in backbone(model).modules():
        stacks = [child for child in parent.children() if isinstance(child, nn.ModuleList) and len(child) == depth]
        norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
        for lens in (Lens(tuple(stack), norm) for stack in stacks for norm in norms):
            if _reads_out(model, lens):
                return lens
    raise ConfigError(
        f"{type(inner).__name__}: no final norm that turns the last layer's output into the last hidden state was "
        "found, so a logit lens would draw wrong curves. It is left out; every other number is measured."
    )


def measure_lens(
    model: Any,
    form: DialogueFormat,
    prompts: Sequence[ToxicityPrompt],
    lists: Mapping[str, Sequence[str]],
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    draws: int,
    should_stop: Callable[[], bool],
    progress: "MakesBars",
    report: Callable[[str], None],
) -> tuple[dict[str, Curve], list[Item]]:
    """The curve of each word list over the prompts, and one item a list and prompt.

    An item's task is `lens/LIST`, its value the mass at the last point, and ``extra["by_point"]`` holds all of them.
    A prompt fails as a whole where one of its points has no finite number. ``max_new_tokens`` is the room that the
    sampled answers are given, so that the prompts are those that are answered.
    Errors: ConfigError where the model has no lens; Interrupted when asked to stop.
    """
    lens = find_lens(model)
    room = context_length(model) - max_new_tokens
    encoded = [(prompt, form.encode_prompt(prompt.turns, room)) for prompt in prompts]
    items: list[Item] = []
    with progress(PHASE, total=len(lists) * len(prompts)) as bar:
        for name, words in lists.items():
            batch = ChunkSize(PHASE, batch_size, report)
            meter = WordMeter(
                model, form.tokens, words, temperature=temperature, tolerance=TOLERANCE, batch=batch, read=lens.read
            )
            for start in range(0, len(encoded), batch_size):
                if should_stop():
                    raise Interrupted("the logit lens was stopped on request; it starts again on resume")
                some = encoded[start : start + batch_size]
                found = iter(meter.next_word_at_points([ids for _, ids in some if ids is not None]))
                items += [_item(name, prompt, None if ids is None else next(found)) for prompt, ids in some]
                bar.advance(len(some))
    by_list = {name: [item for item in items if item.task == f"lens/{name}"] for name in lists}
    return {name: curve(found, lens.points, draws=draws, seed=seed) for name, found in by_list.items()}, items


def curve(items: Sequence[Item], points: int, *, draws: int, seed: int) -> Curve:
    """The curve over the items of one list. Each point draws the same prompts."""
    at_points = [
        [item if item.value is None else replace(item, value=item.extra["by_point"][k]) for item in items]
        for k in range(points)
    ]
    missed = [item.extra["missed"] for item in items if item.value is not None]
    return Curve(
        [_summary(found, draws=draws, seed=seed) for found in at_points],
        max(sum(column) / len(missed) for column in zip(*missed, strict=True)) if missed else None,
    )


def _summary(items: Sequence[Item], *, draws: int, seed: int) -> Summary:
    """The mean with a bootstrap interval also where every prompt has a mass of 0, which is no rate of successes."""
    found = summarise(items, draws=draws, seed=seed)
    constant = len({item.value for item in items if item.value is not None}) == 1
    return replace(found, low=found.mean, high=found.mean) if constant and found.counts.n_valued > 1 else found


def _item(name: str, prompt: ToxicityPrompt, found: Sequence[Mass] | None) -> Item:
    task = f"lens/{name}"
    if found is None:
        return Item(task, prompt.id, "failed", None, reason="prompt_too_long")
    if not all(math.isfinite(point.mass) for point in found):
        return Item(task, prompt.id, "failed", None, reason="non_finite")
    extra = {"by_point": [point.mass for point in found], "missed": [round(point.missed, 8) for point in found]}
    return Item(task, prompt.id, "scored", found[-1].mass, extra=extra)


@contextmanager
def _entering(layers: Sequence[nn.Module], pick: Pick) -> Iterator[list[Tensor]]:
    """What enters each layer in a forward that runs inside, as ``pick`` takes it."""
    seen: list[Tensor] = []

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(pick(args[0] if args else kwargs["hidden_states"]))

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _reads_out(model: Any, lens: Lens) -> bool:
    """Whether the states are those of the residual stream, and the norm stands between the last one and the head."""
    gave: list[Tensor] = []
    hook = lens.layers[-1].register_forward_hook(
        lambda layer, args, output: gave.append(output[0] if isinstance(output, tuple) else output)
    )
    device = next(model.parameters()).device
    ids_BL = torch.arange(5, device=device).unsqueeze(0) % vocabulary(model)
    try:
        with _entering((*lens.layers, lens.norm), lambda state_BLH: state_BLH) as entering:
            last_BLH = backbone(model)(input_ids=ids_BL, use_cache=False).last_hidden_state
    except KeyError:  # a layer that is called in another way than with hidden states
        return False
    finally:
        hook.remove()
    states = [*entering, last_BLH]
    if len(gave) != 1 or len(states) != lens.points + 1 or any(x.shape != last_BLH.shape for x in states):
        return False
    tolerance = 1e-4 if last_BLH.dtype == torch.float32 else 0.05
    return torch.equal(_numbers(entering[-1]), _numbers(gave[0])) and torch.allclose(
        _numbers(lens.norm(gave[0])), _numbers(last_BLH), rtol=tolerance, atol=tolerance
    )


def _numbers(state: Tensor) -> Tensor:
    """For comparisons, in which NaN is as good as NaN."""
    return state.float().nan_to_num(nan=1e30, posinf=2e30, neginf=-2e30)
