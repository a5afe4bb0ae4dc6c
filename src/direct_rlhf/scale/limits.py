"""Where the design stops to scale on this setting, and what to change there."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from direct_rlhf.recipe.needs import idle_processes
from direct_rlhf.scale.hardware import Hardware
from direct_rlhf.scale.memory import Phase, host_bytes, phases
from direct_rlhf.scale.setting import Setting
from direct_rlhf.scale.speed import iteration, update_step
from direct_rlhf.scale.words import duration, size

MOST = 1024  # GPUs that are planned for
WORTH = 0.25  # share of the time from which on a limit is named


def limits(setting: Setting, hardware: Hardware) -> list[str]:
    """One sentence or two for each."""
    return [
        *_memory(setting, hardware),
        *_host(setting, hardware),
        *_traffic(setting, hardware),
        *_rows(setting),
        *_engine(setting),
    ]


def highest(setting: Setting) -> Phase:
    """PPO's phase with most memory, on the GPU that has most."""
    return max(phases(setting, "ppo"), key=lambda phase: phase.bytes)


def fits(setting: Setting, hardware: Hardware) -> bool:
    return highest(setting).bytes <= hardware.usable * hardware.memory


def _memory(setting: Setting, hardware: Hardware) -> Iterator[str]:
    room = hardware.usable * hardware.memory
    model, whole = setting.recipe.model, setting.computed * setting.shape.whole
    if setting.gpus > 1 and whole > room:
        yield (
            f"The whole model in {model.dtype}, {size(whole)}, has no room on a GPU ({size(room)} usable), and each "
            "GPU gathers it to sample and to score: no number of GPUs helps. Change: GPUs of more memory. Sampling can "
            "leave these GPUs (rollout.engine=vllm, whose server cuts the model in parts); scoring in parts (tensor "
            "parallelism) is what the design lacks."
        )
        return
    for phase in phases(setting, "ppo"):
        if phase.bytes > room:
            yield f"PPO, {phase.name}: {size(phase.bytes)} and {size(room)} usable. {_remedy(setting, phase, room)}"


def _remedy(setting: Setting, phase: Phase, room: float) -> str:
    """The changes that alone make the phase fit; where none does, those that take a tenth of it away."""
    whole = setting.computed * setting.shape.whole  # which each of several gathers
    changes = ((words, other) for words, other in _smaller(setting, phase.name) if other.gpus == 1 or whole <= room)
    found = {words: _bytes_of(other, phase.name) for words, other in changes}
    enough = [words for words, n_bytes in found.items() if n_bytes <= room]
    if enough:
        return f"Change: {', or '.join(enough)}."
    some = [words for words, n_bytes in found.items() if n_bytes < 0.9 * phase.bytes]
    if len(some) > 1:
        return f"Change several of these: {', '.join(some)}."
    return f"Of the settings, {some[0]} helps most and is not enough." if some else "No setting lowers it by a tenth."


def _bytes_of(setting: Setting, phase: str) -> int:
    return next(one.bytes for one in phases(setting, "ppo") if one.name == phase)


def _smaller(setting: Setting, phase: str) -> Iterator[tuple[str, Setting]]:
    """Settings of less memory, and what makes them of this one."""
    recipe, ppo = setting.recipe, setting.recipe.ppo

    def changed(section: str, **update: Any) -> Setting:
        other = getattr(recipe, section).model_copy(update=update)
        return replace(setting, recipe=recipe.model_copy(update={section: other}))

    if setting.shard < setting.gpus:
        words = f"a larger parallel.shard_size ({setting.shard} processes share a copy now)"
        yield words, changed("parallel", shard_size=setting.gpus)
    if not setting.four_bits and setting.gpus < MOST:
        yield "more GPUs", replace(setting, gpus=MOST)
    if recipe.model.tuning == "full":
        yield "model.tuning=lora", changed("model", tuning="lora")
    if setting.lora and setting.gpus == 1 and not setting.four_bits:
        yield "model.quantise=nf4", changed("model", quantise="nf4")
    if phase == "update" and not recipe.parallel.activation_checkpointing:
        yield "parallel.activation_checkpointing=true", changed("parallel", activation_checkpointing=True)
    if phase in ("update", "score"):
        yield f"ppo.micro_batch_tokens={setting.length}", changed("ppo", micro_batch_tokens=setting.length)
    if phase == "sample":
        fewer = ppo.minibatch_size
        yield f"ppo.rollouts={fewer}, which is other training", changed("ppo", rollouts=fewer)
        yield "rollout.engine=vllm, with a server on other GPUs", changed("rollout", engine="vllm")


def _host(setting: Setting, hardware: Hardware) -> Iterator[str]:
    needed = host_bytes(setting)
    if needed > hardware.host_memory:
        yield (
            f"Loading: the processes of a node hold {size(needed)} of whole models in CPU memory, and there are "
            f"{size(hardware.host_memory)}. Machines of more memory, or fewer GPUs of each (--per-node)."
        )


def _traffic(setting: Setting, hardware: Hardware) -> Iterator[str]:
    if setting.gpus == 1:
        return
    step = update_step(setting, hardware)
    if step.waiting > WORTH * step.seconds:
        changes = list(_faster(setting, hardware, step.seconds))
        if setting.micro_rows < setting.share(setting.recipe.ppo.minibatch_size):
            changes.append("a larger ppo.micro_batch_tokens, as weights and gradients travel with every pass")
        changes.append("a larger ppo.minibatch_size, which is other training, or fewer GPUs")
        yield (
            f"PPO, update: {step.waiting / step.seconds:.0%} of a step waits for weights and gradients. "
            f"Change: {'; '.join(changes)}."
        )
    spans = iteration(setting, hardware)
    gathers = next(span for span in spans if span.name.startswith("gather"))
    if gathers.seconds > WORTH * sum(span.seconds for span in spans):
        yield (
            f"Gathering whole models takes {gathers.seconds:.3g} s of each iteration. Change: more ppo.rollouts in an "
            "iteration, or fewer GPUs."
        )


def _faster(setting: Setting, hardware: Hardware, seconds: float) -> Iterator[str]:
    """Settings of `parallel` that fit and make a step faster."""
    parallel = setting.recipe.parallel
    tried: list[tuple[str, Any]] = [("reshard_after_forward", False)] if parallel.reshard_after_forward else []
    if setting.shard > setting.per_node and setting.gpus % setting.per_node == 0:
        tried.insert(0, ("shard_size", setting.per_node))
    for key, value in tried:
        recipe = setting.recipe.model_copy(update={"parallel": parallel.model_copy(update={key: value})})
        other = replace(setting, recipe=recipe)
        found = update_step(other, hardware).seconds
        if found < 0.95 * seconds and fits(other, hardware):
            written = str(value).lower()
            yield f"parallel.{key}={written} ({duration(found)} instead of {duration(seconds)} a step)"


def _engine(setting: Setting) -> Iterator[str]:
    if setting.recipe.rollout.engine == "vllm":
        yield "rollout.engine = vllm: its memory is not in the table, and sampling is taken to be as fast as ours."


def _rows(setting: Setting) -> Iterator[str]:
    idle = idle_processes(setting.recipe, setting.gpus)
    yield from (f"{found}. Change: a larger batch, which is other training, or fewer GPUs." for found in idle)
    ppo = setting.recipe.ppo
    prompts = ppo.rollouts // ppo.samples_per_prompt
    if prompts < setting.gpus:
        yield (
            f"ppo.rollouts: {prompts} prompts an iteration, so {setting.gpus - prompts} of {setting.gpus} processes "
            "idle while it samples. Change: a larger ppo.rollouts, or fewer GPUs."
        )
