"""Sampling: our engine against `transformers.generate`, same 5 M-parameter Mistral, same dtype, batches of 64.

Plain sampling at temperature 1 of up to 48 tokens after prompts of 16 to 32. Fixed length: EOS hardly ever comes.
Natural lengths: EOS ends an answer with probability 1/12 a token, a quarter of the cap in the mean. Both sides are
timed in turn, round after round, and a ratio is taken within its round. Tokens are those of the answers, EOS included;
what `generate` computes for rows that have ended does not count.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import tiny
from common import arguments, finish
from direct_rlhf.precision import arithmetic
from direct_rlhf.rollout.fallback import left_padded
from direct_rlhf.rollout.native import sample, sampler_path
from direct_rlhf.rollout.types import SampleKey, SamplingSettings

BATCH, CAP = 64, 48
GOALS = {"fixed, float32": 2.0, "fixed, bfloat16": 3.5, "natural, float32": 5.0, "natural, bfloat16": 5.0}
NOTE = """\
`transformers.generate` and our engine in one process, in turn; medians of {rounds} rounds after one that is not
counted, [smallest, largest] ratio of a round. Natural: {many} prompts in batches of {batch} (ours refills rows as they
end). Peak: the share of the fastest matrix product measured here (in the type computed in) that our sampling arrives
at, with its arithmetic counted as 2 x weights x tokens (prompts without the head). This processor's arithmetic for
bfloat16 models: {computed}."""


class Ended:
    """The part of a tokenizer that the sampler needs here: no text, one EOS."""

    pad_id, bos_id, eos_id, eos_ids = tiny.PAD, tiny.BOS, tiny.EOS, frozenset({tiny.EOS})

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def generate(model: Any, prompts: Sequence[Sequence[int]], *, greedy: bool = False) -> tuple[int, list[list[int]]]:
    """`transformers.generate`, a batch after the other: tokens of the answers, and the answers."""
    answers = []
    for start in range(0, len(prompts), BATCH):
        ids, mask = left_padded(prompts[start : start + BATCH], tiny.PAD, max(map(len, prompts[start : start + BATCH])))
        drawing = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask.long(), max_new_tokens=CAP, **drawing)
        found = out[:, ids.shape[1] :].tolist()
        answers += [row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row for row in found]
    return sum(map(len, answers)), answers


def ours(
    model: Any, prompts: Sequence[Sequence[int]], seed: int, *, greedy: bool = False
) -> tuple[int, list[list[int]]]:
    """Our engine on the same prompts."""
    keys = [SampleKey(seed, str(row), 0, 0) for row in range(len(prompts))]
    settings = SamplingSettings(CAP, temperature=0.0 if greedy else 1.0)
    tokens: Any = Ended()
    rollout = sample(model, tokens, prompts, keys, settings, batch_size=BATCH)
    answers = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)]
    return sum(map(len, answers)), answers


def timed(work: Callable[[], tuple[int, Any]]) -> float:
    """Tokens a second of one call."""
    begin = time.perf_counter()
    n_tokens, _ = work()
    return n_tokens / (time.perf_counter() - begin)


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large matrix product."""
    left, right = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - begin)
    return 2 * 2048 * 1024 * 1024 / best


def work_of(model: Any, prompts: Sequence[Sequence[int]], n_tokens: int) -> float:
    """Floating-point operations of sampling so many tokens after these prompts."""
    body = sum(parameter.numel() for parameter in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    return 2.0 * (body * (sum(map(len, prompts)) + n_tokens - len(prompts)) + head * n_tokens)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    options = parser.parse_args()
    rounds, many = (2, BATCH) if options.quick else (options.rounds, 8 * BATCH)
    measured: dict[str, Any] = {}
    table = [["case", "generate, tokens/s", "ours, tokens/s", "ratio", "goal", "share of the peak"]]
    for name, goal in GOALS.items():
        dtype = getattr(torch, name.split(", ")[1])
        natural = name.startswith("natural")
        model = tiny.build(CAP / 4 if natural else None).to(dtype)
        prompts = tiny.prompts(many if natural else BATCH)
        rates: list[tuple[float, float]] = []
        for index in range(rounds + 1):
            torch.manual_seed(index)
            theirs = timed(partial(generate, model, prompts))
            rates.append((theirs, timed(partial(ours, model, prompts, index))))
        theirs, mine = (statistics.median(side) for side in zip(*rates[1:], strict=True))
        ratios = sorted(our / their for their, our in rates[1:])
        ratio = statistics.median(ratios)
        n_tokens, _ = ours(model, prompts, 0)
        flops = work_of(model, prompts, n_tokens) / n_tokens * mine
        share = flops / peak(arithmetic("cpu", dtype))
        measured[name] = {
            "ratio": round(ratio, 2),
            "low": round(ratios[0], 2),
            "high": round(ratios[-1], 2),
            "ours_tokens_per_s": round(mine),
            "generate_tokens_per_s": round(theirs),
            "share_of_peak": round(share, 3),
            "path": sampler_path(model),
            "mean_length": round(n_tokens / len(prompts), 2),
        }
        shown = f"{ratio:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        table.append([name, f"{theirs:,.0f}", f"{mine:,.0f}", shown, f">= {goal}", f"{share:.0%}"])
    model, prompts = tiny.build(), tiny.prompts(BATCH)
    pairs = list(zip(generate(model, prompts, greedy=True)[1], ours(model, prompts, 0, greedy=True)[1], strict=True))
    measured["greedy answers equal"] = sum(theirs == mine for theirs, mine in pairs) / len(pairs)
    held = measured["greedy answers equal"] == 1 and all(measured[n]["ratio"] >= goal for n, goal in GOALS.items())
    computed = str(arithmetic("cpu", torch.bfloat16)).removeprefix("torch.")
    note = NOTE.format(rounds=rounds, many=many, batch=BATCH, computed=computed)
    finish("rollout", measured, GOALS, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    main()
