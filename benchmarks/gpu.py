"""One GPU, Mistral-7B's shape, random weights: sampling and PPO iterations against their bounds.

rollout  batches of 64 and 256, prompts of 256 tokens, 256 new ones each (nothing ends early), bfloat16: our engine and
         `transformers.generate` in turn. A decode step takes at least what it takes to read the weights once, and the
         keys and values of all rows at their mean length, at the bandwidth of a large copy. `share_of_bound` is that of
         the decode steps, `share_with_prefill` that of the whole call, its prompts at the rate of a matrix product.
lora     PPO iterations with policy and critic as adapters on one frozen trunk.
full     policy, critic (float32 with AdamW) and a bfloat16 reference of as many layers as fit the free memory.

Utilisation of the update: the arithmetic that policy and critic need, over the time and the rate of a large matrix
product. It is 6 x weights x tokens, or 4 x with LoRA, where a frozen weight has no gradient of its own; the head counts
for answer tokens alone; attention over positions, the adapters' own arithmetic, and whatever is computed twice are left
out. What was not measured is null. Without a GPU only `--quick` runs: the same code at a toy shape, on the CPU.

    python benchmarks/gpu.py --only rollout|lora|full      a part of it at a time; --profile: the costliest kernels
"""

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import tiny
from common import arguments, finish
from direct_rlhf.data.types import Prompt, Turn
from direct_rlhf.models.loading import add_lora
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.peaks import Peaks, phase, recording
from direct_rlhf.models.roles import CRITIC, POLICY, Roles
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.precision import arithmetic
from direct_rlhf.recipe.schema import (
    KLSection,
    LengthSection,
    LoraSection,
    OptimiserSection,
    PpoSection,
    SamplingSection,
)
from direct_rlhf.rollout.native import sample, sampler_path
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings
from direct_rlhf.train.experience import Answer, Experience, Judges, estimate, score
from direct_rlhf.train.step import Optimiser
from direct_rlhf.train.update import Learner, Position, update

ROLLOUT_GOALS = {"ratio": 5.0, "share_of_bound": 0.6}
PPO_GOALS = {"times_trl": 3.0, "update_utilisation": 0.45}
GOALS = {  # in the order in which they are measured: the cheap and the telling first
    "rollout 64": ROLLOUT_GOALS,
    "ppo lora": PPO_GOALS,
    "rollout 256": ROLLOUT_GOALS,
    "ppo full": PPO_GOALS,
}
PARTS = {"rollout": ("rollout 64", "rollout 256"), "lora": ("ppo lora",), "full": ("ppo full",)}
# Bytes a parameter with full tuning: weights and two moments in float32 for each of policy and critic, the gradients of
# one of them, the reference, and autocast's copy of the model at work (or the sampler's).
STATES = 2 * 12 + 4 + 2 + 2
SPARE = 0.85  # share of the free memory that is planned with: logits, workspaces and holes need the rest
TOP, PROFILED_STEPS = 15, 8
NOTE = """\
{device}: a copy of {bandwidth:.3g} bytes/s (read and written), a matrix product of {flops:.3g} FLOP/s; medians of
{rounds} rounds after one that is not counted. Not built: TRL's side at this shape (`times_trl` is not measured), and
8-bit optimiser states (so full tuning has the layers that fit with float32 ones)."""


@dataclass(frozen=True)
class Size:
    """The model's shape and the work that is asked of it."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    keys: int = 8
    intermediate: int = 14336
    vocabulary: int = 32000
    prompt: int = 256  # tokens
    new: int = 256  # tokens of an answer
    answers: int = 256  # of an iteration
    minibatch: int = 64
    micro_batch_tokens: int = 8192
    copied: int = 2**32  # bytes of the copy that measures the bandwidth
    product: int = 8192  # rows and columns of the matrices that measure the FLOP rate


TOY = Size(
    hidden=64,
    layers=2,
    heads=4,
    keys=2,
    intermediate=128,
    vocabulary=tiny.VOCABULARY,
    prompt=8,
    new=6,
    answers=8,
    minibatch=4,
    micro_batch_tokens=28,
    copied=2**22,
    product=128,
)


@dataclass(frozen=True)
class Machine:
    """The device, the type it computes in, and what it was measured to do."""

    device: str
    dtype: torch.dtype
    bandwidth: float  # bytes/s
    flops: float  # FLOP/s

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.on_cuda else "cpu"


class Ended:
    """The part of a tokenizer that the sampler needs here: no token ends an answer."""

    pad_id, bos_id, eos_id, eos_ids = tiny.PAD, tiny.BOS, tiny.EOS, frozenset[int]()

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class EvenTokens:
    """A rule that costs next to nothing: the share of even ids."""

    name, low_quantile = "even tokens", 0.0

    def score(self, answers: Sequence[Answer]) -> Tensor:
        return torch.tensor([statistics.fmean(int(word) % 2 == 0 for word in one.text.split()) for one in answers])


def build(size: Size, device: str, dtype: torch.dtype) -> Any:
    """A Mistral of this shape made in place: nothing is read, no token is its EOS.

    The weights' spread keeps the logits near each other, so that two ways to round them give like probabilities.
    """
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.keys,
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=0.005,
        pad_token_id=tiny.PAD,
        bos_token_id=tiny.BOS,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@cache
def weights(size: Size) -> tuple[int, int]:
    """Parameters of the layers, and of the head (the embedding has as many, and no arithmetic)."""
    model = build(size, "meta", torch.float32)
    return sum(one.numel() for one in model.model.layers.parameters()), model.lm_head.weight.numel()


def seconds_of(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done with ``work``, and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, found


def measure_machine(device: str, size: Size) -> Machine:
    """The best of a few large copies and matrix products."""
    dtype = arithmetic(device, torch.bfloat16)
    source = torch.zeros(size.copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    left, right = (torch.randn(size.product, size.product, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            torch.mm(left, right)

    copying = min(seconds_of(device, lambda: target.copy_(source))[0] for _ in range(10))
    multiplying = min(seconds_of(device, multiply)[0] for _ in range(5)) / 10
    return Machine(device, dtype, 2 * size.copied / copying, 2 * size.product**3 / multiplying)


def free_memory(device: str) -> int:
    """Bytes that nobody holds now, what earlier work has left behind given back."""
    gc.collect()  # models hold cycles
    if device == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def decode_bytes(size: Size, batch: int, itemsize: int) -> float:
    """Bytes that a decode step must read: the weights, and all keys and values at their mean length."""
    body, head = weights(size)
    token = 2 * size.layers * size.keys * (size.hidden // size.heads)
    return itemsize * (body + head + batch * token * (size.prompt + size.new / 2))


def update_flops(size: Size, answers: int, *, lora: bool) -> float:
    """What training policy and critic on so many answers takes, once."""
    body, head = weights(size)
    return (4 if lora else 6) * answers * (2 * body * (size.prompt + size.new) + head * size.new)


def score_flops(size: Size, answers: int) -> float:
    """The same forward, without gradients: reference and old values."""
    return update_flops(size, answers, lora=True) / 2


def layers_that_fit(size: Size, free: float) -> int:
    """Layers with which full tuning fits ``free`` bytes; SystemExit if not even one does."""
    body, head = weights(replace(size, layers=1))
    kept = size.micro_batch_tokens * (20 * size.hidden + 6 * size.intermediate)  # activations of a layer for backward
    layers = int((SPARE * free - 2 * STATES * head) // (STATES * body + kept))
    if layers < 1:
        raise SystemExit(f"full tuning does not fit {free / 2**30:.1f} GiB with even one layer: free some memory")
    return min(layers, size.layers)


def expect(found: float, wanted: float, what: str) -> None:
    """SystemExit unless the work that was timed is the work that was meant."""
    if found != wanted:
        raise SystemExit(f"{what}: {found:g} instead of {wanted:g}; the figures would compare unlike work")


def generate(model: Any, prompts: Sequence[Sequence[int]], new: int) -> int:
    """`transformers.generate`; tokens of the answers."""
    ids = torch.tensor(prompts, device=model.device)
    drawing: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **drawing)
    return int(out[:, ids.shape[1] :].numel())


def ours(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new: int,
    *,
    on_step: Callable[[int], None],
    seed: int,
    version: int = 0,
) -> Rollout:
    """Our engine on all prompts at once."""
    keys = [SampleKey(seed, str(row), 0, 0) for row in range(len(prompts))]
    tokens: Any = Ended()
    settings = SamplingSettings(new)
    return sample(
        model, tokens, prompts, keys, settings, policy_version=version, batch_size=len(prompts), on_step=on_step
    )


def rollout(size: Size, machine: Machine, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Sampling one batch, against `generate` and against the bandwidth."""
    model = build(size, machine.device, machine.dtype)
    prompts = tiny.prompts(batch, size.prompt, shortest=size.prompt)
    theirs, mine, prefills, steps = [], [], [], []
    with recording(machine.device) as peaks:
        for index in range(options.rounds + 1):
            with phase("generate"):
                seconds, n_tokens = seconds_of(machine.device, lambda: generate(model, prompts, size.new))
            expect(n_tokens, batch * size.new, "generate's tokens")
            theirs.append(seconds)
            ends: list[float] = []  # of each step: its tokens are on the host by then
            begin = time.perf_counter()
            draw = partial(
                ours,
                model,
                prompts,
                size.new,
                on_step=lambda _, ends=ends: ends.append(time.perf_counter()),
                seed=index,
            )
            with phase("sample"):
                seconds, answers = seconds_of(machine.device, draw)
            expect(int(answers.action_mask_BT.sum()), batch * size.new, "our tokens")
            expect(len(ends), size.new, "our steps")
            mine.append(seconds)
            prefills.append(ends[0] - begin)
            steps.append((ends[-1] - ends[0]) / (size.new - 1))
    body, head = weights(size)
    bound = decode_bytes(size, batch, machine.dtype.itemsize) / machine.bandwidth
    prefill_bound = 2 * batch * (body * size.prompt + head) / machine.flops
    ratios = sorted(their / our for their, our in zip(theirs[1:], mine[1:], strict=True))
    their, our, prefill, step = (statistics.median(times[1:]) for times in (theirs, mine, prefills, steps))
    return {
        "ratio": round(statistics.median(ratios), 2),
        "low": round(ratios[0], 2),
        "high": round(ratios[-1], 2),
        "share_of_bound": round(bound / step, 3),
        "share_with_prefill": round((prefill_bound + (size.new - 1) * bound) / our, 3),
        "ours_tokens_per_s": round(batch * size.new / our),
        "generate_tokens_per_s": round(batch * size.new / their),
        "step_ms": round(1e3 * step, 3),
        "step_bound_ms": round(1e3 * bound, 3),
        "prefill_s": round(prefill, 3),
        "prefill_bound_s": round(prefill_bound, 3),
        "path": sampler_path(model),
        **peaks_of(peaks),
        **(profiled_steps(model, prompts, size, machine) if options.profile else {}),
    }


def lora_roles(size: Size, machine: Machine) -> Roles:
    """As `models.roles.lora_roles` makes them, on a trunk that was never on disk."""
    policy = add_lora(build(size, machine.device, machine.dtype), LoraSection(), POLICY, seed=0)
    policy = add_lora(policy, LoraSection(), CRITIC, seed=1)
    return Roles(policy, ScalarModel.zero(policy), None, machine.device, dtype_name(machine))


def full_roles(size: Size, machine: Machine) -> Roles:
    """As `models.roles.full_roles` makes them: float32 weights, the reference in the type computed in."""
    policy = build(size, machine.device, torch.float32)
    reference = copy.deepcopy(policy).to(machine.dtype).requires_grad_(False)
    critic = ScalarModel.zero(policy, copy_trunk=True)
    return Roles(policy, critic, reference, machine.device, dtype_name(machine))


def dtype_name(machine: Machine) -> str:
    return str(machine.dtype).removeprefix("torch.")


class Iterations:
    """PPO's four verbs on made-up prompts."""

    def __init__(self, roles: Roles, size: Size) -> None:
        self.roles, self.size = roles, size
        self.section = PpoSection(
            rollouts=size.answers,
            minibatch_size=size.minibatch,
            micro_batch_tokens=size.micro_batch_tokens,
            epochs=1,
            optimiser=OptimiserSection(learning_rate=1e-6),
            sampling=SamplingSection(max_new_tokens=size.new),
            length=LengthSection(unfinished="subtract", unfinished_penalty=0.0),  # every answer is cut: score them all
            kl=KLSection(inner_limit=1e6),  # never leave an epoch early
        )
        optimisers = {role: Optimiser(roles.parameters(role), self.section.optimiser, 1000) for role in roles.trained}
        self.chunks = {name: ChunkSize(name, size.micro_batch_tokens) for name in ("score", "update")}
        self.learner = Learner(roles, self.section, optimisers, None, 0, self.chunks["update"])

    def sample(self, answers: int, iteration: int) -> Rollout:
        prompts = tiny.prompts(answers, self.size.prompt, shortest=self.size.prompt, seed=iteration)
        with self.roles.acting() as policy:
            version = self.learner.policy_version
            found = ours(policy, prompts, self.size.new, on_step=lambda _: None, seed=iteration, version=version)
        return found.cpu()

    def score(self, answers: Rollout) -> Experience:
        scored = score(
            answers,
            [Prompt("made up", (Turn("human", "?"),), "helpful", "made up")] * len(answers),
            roles=self.roles,
            judges=Judges(EvenTokens()),
            section=self.section,
            cap=self.size.new,
            check_stop=lambda: None,
            chunk=self.chunks["score"],
        )
        return estimate(scored, section=self.section, kl_coefficient=0.05)

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        return update(experience, self.learner, iteration=iteration, position=Position(), check_stop=lambda: None)


def ppo(size: Size, machine: Machine, options: argparse.Namespace, *, lora: bool) -> dict[str, Any]:
    """PPO iterations, phase by phase."""
    if not lora:
        size = replace(size, layers=options.layers or layers_that_fit(size, free_memory(machine.device)))
    work = Iterations((lora_roles if lora else full_roles)(size, machine), size)
    times: dict[str, list[float]] = {"sample": [], "score": [], "update": []}
    with recording(machine.device) as peaks:

        def timed(name: str, verb: Callable[[], Any]) -> Any:
            with phase(name):
                seconds, found = seconds_of(machine.device, verb)
            times[name].append(seconds)
            return found

        for index in range(options.rounds + 1):
            answers = timed("sample", partial(work.sample, size.answers, index))
            experience = timed("score", partial(work.score, answers))
            stats = timed("update", partial(work.update, experience, index))
            expect(stats["answer_tokens"], size.answers * size.new, "answer tokens trained on")
            expect(stats["steps"], size.answers // size.minibatch, "optimiser steps")
    found = {name: statistics.median(spent[1:]) for name, spent in times.items()}
    rounds = [sum(spent) for spent in zip(*times.values(), strict=True)][1:]
    flops = update_flops(size, size.answers, lora=lora)
    return {
        "times_trl": None,  # TRL's side at this shape is not built
        "update_utilisation": round(flops / machine.flops / found["update"], 3),
        "update_bound_s": round(flops / machine.flops, 3),
        "score_utilisation": round(score_flops(size, size.answers) / machine.flops / found["score"], 3),
        **{f"{name}_s": round(seconds, 3) for name, seconds in found.items()},
        "iteration_s": round(statistics.median(rounds), 3),
        "samples_per_s": round(size.answers / statistics.median(rounds), 2),
        "answers": size.answers,
        "layers": size.layers,
        "optimiser_states": "float32",
        **{f"{name}_micro_batch_tokens": chunk.size for name, chunk in work.chunks.items()},  # smaller: memory ran out
        **peaks_of(peaks),
        **(profiled_update(work, machine, options.rounds + 1) if options.profile else {}),
    }


def peaks_of(peaks: Peaks) -> dict[str, float]:
    return {f"{name}_mib": round(value, 1) for name, value in peaks.facts.items()}


def profiler(machine: Machine) -> profile:
    return profile(activities=[ProfilerActivity.CUDA if machine.on_cuda else ProfilerActivity.CPU])


def profiled_steps(
    model: Any, prompts: Sequence[Sequence[int]], size: Size, machine: Machine
) -> dict[str, list[dict[str, Any]]]:
    """The kernels of some decode steps from the middle of the answers on."""
    first = size.new // 2
    last = min(first + PROFILED_STEPS, size.new)
    done = 0
    watching = profiler(machine)

    def on_step(_: int) -> None:
        nonlocal done
        done += 1
        if done == first:
            watching.start()
        elif done == last:
            watching.stop()

    ours(model, prompts, size.new, on_step=on_step, seed=0)
    return {"kernels": kernels(watching, machine, calls=last - first)}


def profiled_update(work: Iterations, machine: Machine, iteration: int) -> dict[str, list[dict[str, Any]]]:
    """The kernels of the update on one minibatch."""
    experience = work.score(work.sample(work.size.minibatch, iteration))
    with profiler(machine) as watching:
        seconds_of(machine.device, partial(work.update, experience, iteration))
    return {"kernels": kernels(watching, machine, calls=1)}


def kernels(watched: profile, machine: Machine, *, calls: int) -> list[dict[str, Any]]:
    """The costliest kernels (on a CPU: operators), in milliseconds a call of what was watched, and their share."""
    place = DeviceType.CUDA if machine.on_cuda else DeviceType.CPU
    spent = [
        (event.self_device_time_total if machine.on_cuda else event.self_cpu_time_total, event.count, event.key)
        for event in watched.key_averages()
        if event.device_type == place and not event.is_user_annotation
    ]
    total = sum(micro for micro, _, _ in spent)
    return [
        {"name": name, "ms": round(micro / calls / 1e3, 4), "share": round(micro / total, 4), "count": count}
        for micro, count, name in sorted(spent, reverse=True)[:TOP]
    ]


def all_held(measured: Mapping[str, Any]) -> bool:
    """Whether every goal was measured and reached."""
    found = [(measured[case] or {}).get(name) for case, goals in GOALS.items() for name in goals]
    goals = [goal for one in GOALS.values() for goal in one.values()]
    return all(value is not None and value >= goal for value, goal in zip(found, goals, strict=True))


def table_of(measured: Mapping[str, Any]) -> list[list[str]]:
    """Case, figure, measured, goal; kernels stand in the JSON line and on the screen."""
    table = [["case", "figure", "measured", "goal"]]
    for case, goals in GOALS.items():
        figures = dict.fromkeys(goals) if measured[case] is None else measured[case]
        for name, value in figures.items():
            if name != "kernels":
                shown = "not measured" if value is None else str(value)
                table.append([case, name, shown, f">= {goals[name]}" if name in goals else ""])
    return table


def show(case: str, figures: Mapping[str, Any]) -> None:
    """A case as soon as it is measured, so that a later one that fails takes nothing with it."""
    print(case, json.dumps({name: value for name, value in figures.items() if name != "kernels"}), file=sys.stderr)
    for kernel in figures.get("kernels", ()):
        print(f"{kernel['share']:7.1%} {kernel['ms']:10.3f} ms  {kernel['count']:6}  {kernel['name']}", file=sys.stderr)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--answers", type=int, help="answers of a PPO iteration (default 256), a multiple of 64")
    parser.add_argument("--micro-batch-tokens", type=int, help="tokens of one forward and backward (default 8192)")
    parser.add_argument("--layers", type=int, help="layers with full tuning (default: as many as fit)")
    parser.add_argument("--profile", action="store_true", help=f"show the {TOP} costliest kernels of each case")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        parser.error("this needs a CUDA device, and torch sees none; --quick tries the code on the CPU at a toy shape")
    size = TOY if options.quick else Size()
    size = replace(
        size,
        answers=options.answers or size.answers,
        micro_batch_tokens=options.micro_batch_tokens or size.micro_batch_tokens,
    )
    if size.answers % size.minibatch:
        parser.error(f"--answers must be a multiple of the minibatch, {size.minibatch}; got {size.answers}")
    machine = measure_machine(device, size)
    work: dict[str, Callable[..., dict[str, Any]]] = {
        "rollout 64": partial(rollout, batch=64),
        "ppo lora": partial(ppo, lora=True),
        "rollout 256": partial(rollout, batch=256),
        "ppo full": partial(ppo, lora=False),
    }
    measured: dict[str, Any] = {
        "device": machine.name,
        "bandwidth_bytes_per_s": round(machine.bandwidth),
        "product_flop_per_s": round(machine.flops),
        **dict.fromkeys(GOALS),
    }
    for case in GOALS:
        if options.only is None or case in PARTS[options.only]:
            measured[case] = work[case](size, machine, options)
            if not options.json:
                show(case, measured[case])
            free_memory(device)  # the next case needs it
    note = NOTE.format(device=machine.name, bandwidth=machine.bandwidth, flops=machine.flops, rounds=options.rounds)
    held = machine.on_cuda and not options.quick and all_held(measured)
    finish("gpu", measured, GOALS, held=held, options=options, table=table_of(measured), note=note)


if __name__ == "__main__":
    main()
