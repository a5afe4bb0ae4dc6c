"""How long a run takes: arithmetic against the GPU's FLOP/s, decoding against its memory, traffic against its links.

What may overlap is taken to overlap: a pass takes as long as the longer of its arithmetic and its traffic. Every answer
is taken to reach the cap, so that these are hours at most; data, fitness card, probe, evaluation and report are not in
them.
"""

import math
from dataclasses import dataclass

from direct_rlhf.models.sizes import nf4_bytes
from direct_rlhf.scale.hardware import Hardware
from direct_rlhf.scale.memory import Role, kept, roles_of
from direct_rlhf.scale.setting import Setting
from direct_rlhf.scale.traffic import exchanged, of_pass, of_rollout, seconds

ADAMW = 7 / 3  # reads weight, gradient and moments, writes all but the gradient: 7 numbers for each 3 that are kept


@dataclass(frozen=True)
class Span:
    """Seconds of one part of an iteration or step, and what of them is arithmetic or memory alone."""

    name: str
    seconds: float
    busy: float

    @property
    def waiting(self) -> float:
        """Seconds in which nothing is computed, as weights or gradients are under way."""
        return self.seconds - self.busy


def forward_flops(setting: Setting, length: int, scored: int) -> float:
    """Of a row of ``length`` tokens, the head applied to ``scored`` of them: 2 a weight and token, and attention."""
    shape = setting.shape
    products = 2 * shape.products * shape.layers * length
    attention = 2 * shape.layers * shape.query * length**2  # 4 Q L^2, of which a causal mask leaves half
    return products + attention + 2 * shape.vocabulary * shape.hidden * scored


def _compute(setting: Setting, hardware: Hardware, flops: float) -> float:
    peak = hardware.bfloat16 if setting.computed == 2 else hardware.float32
    return flops / (peak * hardware.compute_use)


def sampling(setting: Setting, hardware: Hardware, rows: int) -> float:
    """Seconds for ``rows`` answers of all processes: prompts at the arithmetic's pace, then a step for each token."""
    mine = setting.sampled(rows)
    prompts = mine // setting.recipe.ppo.samples_per_prompt
    prefill = _compute(setting, hardware, prompts * forward_flops(setting, setting.prompt, 1))
    return prefill + setting.answer * decode_step(setting, hardware, mine)


def decode_step(setting: Setting, hardware: Hardware, rows: int) -> float:
    """Seconds of one token of each row, in the middle of an answer: the longest of reading, computing and starting."""
    shape, size = setting.shape, setting.computed
    weights = size * shape.products * shape.layers
    if setting.four_bits:  # read in 4 bits, written whole, and read again
        weights = 2 * weights + sum(nf4_bytes(a * b) for a, b in shape.linears.values()) * shape.layers
    weights += size * shape.vocabulary * shape.hidden
    cache = rows * (setting.prompt + setting.answer // 2) * 2 * shape.layers * shape.key * size
    read = (weights + cache) / (hardware.bandwidth * hardware.bandwidth_use)
    computed = _compute(setting, hardware, rows * forward_flops(setting, 1, 1))
    return max(read, computed, shape.layers * hardware.layer_latency)


def scoring(setting: Setting, hardware: Hardware, rows: int) -> float:
    """Seconds of the forwards of reward models, reference and critics."""
    mine, length = setting.share(rows), setting.length
    values = (len(setting.judges) + len(setting.critics)) * forward_flops(setting, length, 0)
    return _compute(setting, hardware, mine * (values + forward_flops(setting, length, setting.answer)))


def _step(setting: Setting, hardware: Hardware, role: Role, flops: float, passes: int) -> Span:
    """One optimiser step of a role from the FLOPs of its forwards on this process."""
    times = (2 if setting.lora else 3) + setting.recipe.parallel.activation_checkpointing
    busy = _compute(setting, hardware, times * flops)
    moved = passes * seconds(of_pass(setting, role), hardware)
    own = ADAMW * (role.gradients + role.moments) * kept(setting, role) / hardware.bandwidth
    return Span(role.name, max(busy, moved) + own, busy + own)


def update_step(setting: Setting, hardware: Hardware) -> Span:
    """One minibatch: a step of the policy (with pretraining text, where there is any) and of each critic."""
    ppo = setting.recipe.ppo
    rows = setting.share(ppo.minibatch_size)
    spans = []
    for role in trained(setting, "ppo"):
        policy = role.name == "policy"
        flops = rows * forward_flops(setting, setting.length, setting.answer if policy else 0)
        passes = setting.passes
        if policy and ppo.ptx.weight:
            texts = setting.share(ppo.ptx.batch_size)
            flops += texts * forward_flops(setting, ppo.ptx.window, ppo.ptx.window)
            passes += math.ceil(texts / max(ppo.micro_batch_tokens // ppo.ptx.window, 1))
        spans.append(_step(setting, hardware, role, flops, passes))
    return Span("minibatch", sum(span.seconds for span in spans), sum(span.busy for span in spans))


def trained(setting: Setting, stage: str) -> list[Role]:
    return [role for role in roles_of(setting, stage) if role.gradients]


def iteration(setting: Setting, hardware: Hardware) -> list[Span]:
    """One iteration of PPO; the held-out evaluation counts with its share."""
    ppo = setting.recipe.ppo
    sample, score = sampling(setting, hardware, ppo.rollouts), scoring(setting, hardware, ppo.rollouts)
    gathers = seconds(of_rollout(setting), hardware)
    step, steps = update_step(setting, hardware), ppo.epochs * ppo.rollouts // ppo.minibatch_size
    held_out = sampling(setting, hardware, min(ppo.evaluate_prompts, ppo.rollouts))
    held_out = (held_out + scoring(setting, hardware, ppo.evaluate_prompts)) / ppo.evaluate_every
    return [
        Span("sample", sample, sample),
        Span("score", score, score),
        Span("gather weights, exchange scores", gathers + exchanged(setting) / hardware.exchange, 0.0),
        Span(f"update ({steps} steps)", steps * step.seconds, steps * step.busy),
        Span("held-out answers, their share", held_out, held_out),
    ]


def pair_step(setting: Setting, hardware: Hardware, stage: str) -> Span:
    """One optimiser step of the reward or cost model, SFT or DPO."""
    section = getattr(setting.recipe, stage)
    mine = setting.share(section.batch_size)
    sides = 1 if stage == "sft" else 2
    scored = setting.recipe.data.max_answer_tokens if stage in ("sft", "dpo") else 0
    flops = mine * sides * forward_flops(setting, setting.pair_length, scored)
    passes = math.ceil(mine / setting.pairs_at_once(stage))
    (role,) = trained(setting, stage)
    return _step(setting, hardware, role, flops, passes)


def pair_steps(setting: Setting, stage: str, pairs: int | None) -> int | None:
    """Steps of a stage on so many pairs; None where neither these nor a cap are known."""
    section = getattr(setting.recipe, stage)
    if pairs is None:
        return section.max_steps
    steps = math.ceil(pairs * section.epochs / section.batch_size)
    return min(steps, section.max_steps or steps)


def efficiency(setting: Setting, hardware: Hardware) -> float:
    """Of PPO's iteration: the time of one GPU of unlimited memory, divided by the GPU-time of all."""
    one = Setting(setting.recipe, setting.shape, 1, setting.per_node)
    alone = sum(span.seconds for span in iteration(one, hardware))
    return alone / (setting.gpus * sum(span.seconds for span in iteration(setting, hardware)))
