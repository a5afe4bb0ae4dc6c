"""The page of estimates: `python -m direct_rlhf.scale.page > docs/reference/scale.md`. Its words are in page.md."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from string import Template

from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.scale.hardware import PROFILES, Hardware
from direct_rlhf.scale.limits import fits, limits
from direct_rlhf.scale.memory import phases, roles_of
from direct_rlhf.scale.setting import Setting
from direct_rlhf.scale.shapes import SHAPES
from direct_rlhf.scale.show import gpus, overview_row
from direct_rlhf.scale.speed import (
    decode_step,
    efficiency,
    forward_flops,
    iteration,
    pair_step,
    pair_steps,
    sampling,
    scoring,
    trained,
    update_step,
)
from direct_rlhf.scale.traffic import of_pass, seconds
from direct_rlhf.scale.words import duration, size

COUNTS = (1, 8, 64, 512)
MODELS = {"7B": "mistral-7b", "13B": "llama-2-13b", "70B": "llama-3-70b"}
RECIPES = {"full": "mistral-7b-full", "LoRA": "mistral-7b-lora"}
SHIPPED = (
    ("mistral-7b-lora", 1, "mistral-7b"),
    ("llama-3-8b-lora", 1, "llama-3-8b"),
    ("qwen-2.5-7b-lora", 1, "qwen-2.5-7b"),
    ("mistral-7b-full", 8, "mistral-7b"),
)
PAIRS = 84_000  # Anthropic HH, helpful-base and harmless-base, about, without what is held out
H100 = PROFILES["h100"]


def page() -> str:
    """The whole page, as Markdown."""
    words = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
    tables = {
        "full": _models("full"),
        "lora": _models("LoRA"),
        "pairs": f"{PAIRS:,}",
        "recipes": "\n".join(recipe_rows()),
        "stops": "\n".join(_stops()),
        "hardware": _hardware(),
        "shapes": _shapes(),
    }
    return Template(words).substitute(tables | _assumed() | _example())


def recipe_rows() -> list[str]:
    """The table of the shipped recipes, line by line; docs/how-to/mistral-plus.md has it too."""
    rows = []
    for name, count, shape in SHIPPED:
        for profile in (PROFILES["a100-80gb"], H100):
            setting = Setting(load_recipe(name).recipe, SHAPES[shape], count)
            highest = [size(phase.bytes) for phase in phases(setting, "ppo")]
            step, steps = pair_step(setting, profile, "reward").seconds, pair_steps(setting, "reward", PAIRS) or 0
            ppo = sum(span.seconds for span in iteration(setting, profile)) * setting.recipe.ppo.iterations
            hours = (duration(steps * step), duration(ppo))
            rows.append((f"`{name}`", f"{count} x {profile.name}", *highest, _fits(setting, profile), *hours))
    return _rows(("recipe", "GPUs", "sample", "score", "update", "fits", "reward model", "PPO"), rows)


def _setting(tuning: str, model: str, count: int) -> Setting:
    return Setting(load_recipe(RECIPES[tuning]).recipe, SHAPES[MODELS[model]], count)


def _fits(setting: Setting, profile: Hardware) -> str:
    return "yes" if fits(setting, profile) else "**no**"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _models(tuning: str) -> str:
    rows = []
    for model in MODELS:
        for count in COUNTS:
            setting = _setting(tuning, model, count)
            first, *others = overview_row(setting, H100)
            rows.append((model if count == COUNTS[0] else "", first, _fits(setting, H100), *others))
    columns = ("", "GPUs", "fits", "highest memory", "sent", "iteration", "waiting", "PPO", "efficiency")
    return "\n".join(_rows(columns, rows))


def _stops() -> Iterator[str]:
    for tuning in RECIPES:
        for model in MODELS:
            for count in COUNTS:
                if tuning == "LoRA" and count > 1 and model != "70B":
                    continue
                if found := limits(_setting(tuning, model, count), H100):
                    yield f"**{model}, {tuning}, {gpus(count)}**\n"
                    yield from (f"- {sentence}" for sentence in found)
                    yield ""


def _hardware() -> str:
    rows = [
        (
            f"`{one.name}`",
            size(one.memory),
            f"{one.bfloat16 / 1e12:.0f}",
            f"{one.float32 / 1e12:.3g}",
            f"{one.bandwidth / 1e12:.3g}",
            f"{one.link / 1e9:.0f}",
            f"{one.network / 1e9:.0f}",
            size(one.host_memory),
            one.source,
        )
        for one in PROFILES.values()
    ]
    columns = ("", "memory", "bfloat16, dense TFLOP/s", "float32", "memory TB/s", "link GB/s, one way")
    return "\n".join(_rows((*columns, "network of a node GB/s", "CPU memory of a node", "source"), rows))


def _shapes() -> str:
    rows = []
    for one in SHAPES.values():
        sizes = (one.layers, one.hidden, one.inner, one.query, one.key)
        rows.append((f"`{one.name}`", f"{one.whole:,}", *map(str, sizes), f"{one.vocabulary:,}"))
    return "\n".join(_rows(("", "weights", "L", "H", "I", "Q", "K", "V"), rows))


def _assumed() -> dict[str, str]:
    numbers = [field.name for field in fields(Hardware) if field.name not in ("name", "source")]
    return {
        "usable": f"{H100.usable:.0%}",
        "compute_use": f"{H100.compute_use:.0%}",
        "bandwidth_use": f"{H100.bandwidth_use:.0%}",
        "traffic_use": f"{H100.traffic_use:.0%}",
        "layer_latency": f"{H100.layer_latency * 1e6:.0f}",
        "exchange": f"{H100.exchange / 1e9:.0f}",
        "link_latency": f"{H100.link_latency * 1e6:.1f}",
        "pcie_latency": f"{PROFILES['l40s'].link_latency * 1e6:.1f}",
        "network_latency": f"{H100.network_latency * 1e6:.0f}",
        "names": ", ".join(f"`{name}`" for name in numbers),
    }


def _example() -> dict[str, str]:
    """Every number of the worked example: 7B in full on 8 H100."""
    setting = _setting("full", "7B", 8)
    shape, ppo = setting.shape, setting.recipe.ppo
    roles = {role.name: role for role in roles_of(setting, "ppo")}
    sample, _, update = phases(setting, "ppo")
    policy = trained(setting, "ppo")[0]
    sent = of_pass(setting, policy)
    flops = forward_flops(setting, setting.length, setting.answer)
    computed = setting.micro_rows * 3 * flops / (H100.bfloat16 * H100.compute_use)
    steps = ppo.epochs * ppo.rollouts // ppo.minibatch_size
    step = update_step(setting, H100).seconds
    total = sum(span.seconds for span in iteration(setting, H100))
    counts = {
        "whole": shape.whole,
        "trunk": shape.trunk,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "inner": shape.inner,
        "query": shape.query,
        "key": shape.key,
        "vocabulary": shape.vocabulary,
        "rollouts": ppo.rollouts,
        "sampled": setting.sampled(ppo.rollouts),
        "prompt": setting.prompt,
        "answer": setting.answer,
        "slot": 2 * setting.computed * shape.key * shape.layers,
        "minibatch": ppo.minibatch_size,
        "rows": setting.share(ppo.minibatch_size),
        "passes": setting.passes,
        "micro": setting.micro_rows,
        "micro_tokens": ppo.micro_batch_tokens,
        "length": setting.length,
        "pass_tokens": setting.micro_rows * setting.length,
        "steps": steps,
        "iterations": ppo.iterations,
    }
    sizes = {
        "policy": policy.kept,
        "critic": roles["critic"].kept,
        "reference": roles["reference"].weights,
        "reward": roles["reward model"].weights,
        "kept": sum(role.kept for role in roles.values()),
        "held": sample.parts["weights and moments"],
        "gathered": sample.parts["the whole policy, gathered"],
        "cache": sample.parts["key-value cache"],
        "prompts": sample.parts["prompts or logits"],
        "sample": sample.bytes,
        "activations": update.parts["activations"],
        "gradients": update.parts["gradients"],
        "layers_gathered": update.parts["gathered weights"],
        "under_way": update.parts["gradients on their way"],
        "logits": update.parts["logits, or a layer's backward"],
        "update": update.bytes,
        "memory": H100.memory,
        "read": 2 * (shape.products * shape.layers + shape.vocabulary * shape.hidden),
    }
    times = {
        "moved": seconds(sent, H100),
        "computed": computed,
        "step": step,
        "all_steps": steps * step,
        "decode": decode_step(setting, H100, setting.sampled(ppo.rollouts)),
        "sampling": sampling(setting, H100, ppo.rollouts),
        "scoring": scoring(setting, H100, ppo.rollouts),
        "iteration": total,
        "ppo": ppo.iterations * total,
        "alone": 8 * total * efficiency(setting, H100),
    }
    return {
        **{name: f"{count:,}" if count > 9999 else str(count) for name, count in counts.items()},
        **{name: size(n_bytes) for name, n_bytes in sizes.items()},
        **{name: duration(found) for name, found in times.items()},
        "sent": " + ".join(size(one.sent) for one in sent),
        "link": f"{H100.link / 1e9:.0f}",
        "tflop": f"{flops / 1e12:.1f}",
        "peak": f"{H100.bfloat16 / 1e12:.0f}",
        "bandwidth": f"{H100.bandwidth / 1e12:.2f}",
        "efficiency": f"{efficiency(setting, H100):.0%}",
    }


if __name__ == "__main__":
    print(page(), end="")
