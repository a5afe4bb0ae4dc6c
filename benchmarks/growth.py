"""Does time grow with the valid tokens alone? Cost of a token as the work grows, ours against ours.

Sampling, scoring (reference and critic) and the update (policy and critic), on the 5 M-parameter Mistral, float32:
with 1, 2 and 4 times as many answers, and with lengths that are equal or spread 1:16 around the same mean. A cost that
followed padding, or the longest answer of a batch, would show here.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import rollout as sampling
import tiny
from common import arguments, finish
from direct_rlhf.data.types import Prompt, Turn
from direct_rlhf.models.batches import SCORE_FACTOR
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import CRITIC, POLICY, Roles
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import OptimiserSection, PpoSection
from direct_rlhf.rollout.types import FinishReason, Rollout, SampleKey
from direct_rlhf.train.experience import Experience, Judges, estimate, score
from direct_rlhf.train.step import Optimiser
from direct_rlhf.train.update import Learner, Position, update

ANSWERS, PROMPT = 64, 16
EQUAL = 48  # tokens an answer; spread lengths go from SHORTEST to 16 times that, with the same mean
SHORTEST = 9
GOAL = "cost of a valid token within 15 % of that of the first row of its group"
NOTE = """\
Cost of a valid token (microseconds, median of {rounds} rounds in which all cases take turns) and its ratio to the first
row of the group, [smallest, largest] of the rounds. Valid tokens: sampling counts answer tokens; scoring and update
count prompts as well. Spread lengths: {shortest} to {longest} tokens, mean {mean}; attention alone costs more there,
because its work grows with the square of a length."""


def spread(count: int) -> list[int]:
    """Lengths from SHORTEST to 16 x SHORTEST, log-uniform, moved to the mean EQUAL by taking more of the short ones."""
    lengths = np.geomspace(SHORTEST, 16 * SHORTEST, count)
    return [int(length) for length in np.round(lengths * EQUAL / lengths.mean()).clip(SHORTEST, 16 * SHORTEST)]


def made_up(lengths: Sequence[int], seed: int = 0) -> Rollout:
    """Random answers of these lengths, with the log-probabilities left at 0."""
    prompts = torch.tensor(tiny.prompts(len(lengths), PROMPT, shortest=PROMPT, seed=seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, tiny.VOCABULARY, mask.shape, generator=draw).masked_fill(~mask, 0)
    return Rollout(
        prompt_ids_BP=prompts,
        prompt_mask_BP=torch.ones_like(prompts).bool(),
        response_ids_BT=ids,
        response_mask_BT=mask,
        action_mask_BT=mask,
        logprob_BT=torch.zeros(mask.shape),
        finish=(FinishReason.EOS,) * len(lengths),
        texts=("",) * len(lengths),
        keys=tuple(SampleKey(0, str(row), 0, 0) for row in range(len(lengths))),
        policy_version=0,
    )


class Zero:
    """A reward that costs nothing."""

    name, low_quantile = "zero", -1.0

    def score(self, answers: Sequence[Any]) -> torch.Tensor:
        return torch.zeros(len(answers))


class Bench:
    """The roles of PPO on the tiny Mistral, and the three phases timed."""

    def __init__(self) -> None:
        critic = ScalarModel.zero(tiny.build(seed=1)).requires_grad_(True)
        self.roles = Roles(
            tiny.build().requires_grad_(True), critic, tiny.build().requires_grad_(False), "cpu", "float32"
        )
        self.prompt = Prompt("p", (Turn("human", "?"),), "helpful", "made up")

    def sample(self, model: Any, count: int) -> tuple[float, int]:
        prompts = tiny.prompts(count, PROMPT, shortest=PROMPT)
        begin = time.perf_counter()
        n_tokens, _ = sampling.ours(model, prompts, 0)
        return time.perf_counter() - begin, n_tokens

    def scored(self, rollout: Rollout, section: PpoSection) -> Any:
        return score(
            rollout,
            [self.prompt] * len(rollout),
            roles=self.roles,
            judges=Judges(Zero()),
            section=section,
            cap=rollout.response_ids_BT.shape[1],
            check_stop=lambda: None,
            chunk=ChunkSize("score", SCORE_FACTOR * section.micro_batch_tokens),
        )

    def score(self, lengths: Sequence[int]) -> tuple[float, int]:
        rollout = made_up(lengths)
        begin = time.perf_counter()
        self.scored(rollout, PpoSection())
        return time.perf_counter() - begin, sum(lengths) + PROMPT * len(lengths)

    def update(self, lengths: Sequence[int]) -> tuple[float, int]:
        section = PpoSection(
            rollouts=len(lengths), minibatch_size=len(lengths), epochs=1, optimiser=OptimiserSection(learning_rate=1e-9)
        )
        rollout = made_up(lengths)
        experience = self.own_logprobs(estimate(self.scored(rollout, section), section=section, kl_coefficient=0.1))
        optimisers = {role: Optimiser(self.roles.parameters(role), section.optimiser, 100) for role in (POLICY, CRITIC)}
        chunk = ChunkSize("update", section.micro_batch_tokens)
        learner = Learner(self.roles, section, optimisers, None, 0, chunk)
        begin = time.perf_counter()
        update(experience, learner, iteration=0, position=Position(), check_stop=lambda: None)
        return time.perf_counter() - begin, sum(lengths) + PROMPT * len(lengths)

    def own_logprobs(self, experience: Experience) -> Experience:
        """With the reference's log-probabilities as those of sampling: the policy is the reference."""
        scored = experience.scored
        rollout = replace(scored.rollout, logprob_BT=scored.reference_BT)
        return replace(experience, scored=replace(scored, rollout=rollout))


def cases(bench: Bench, answers: int) -> dict[str, dict[str, Callable[[], tuple[float, int]]]]:
    """Group -> row -> work; the first row of a group is what the others are compared with."""
    natural, policy = tiny.build(12), bench.roles.policy
    found: dict[str, dict[str, Callable[[], tuple[float, int]]]] = {
        "sampling, more answers": {f"{n} x": lambda n=n: bench.sample(policy, n * answers) for n in (1, 2, 4)},
        "sampling, natural lengths, more answers": {
            f"{n} x": lambda n=n: bench.sample(natural, n * 4 * answers) for n in (1, 2, 4)
        },
    }
    for name, work in (("scoring", bench.score), ("update", bench.update)):
        found[f"{name}, more answers"] = {
            f"{n} x": lambda n=n, work=work: work([EQUAL] * (n * answers)) for n in (1, 2, 4)
        }
        found[f"{name}, lengths"] = {
            "equal": lambda work=work: work([EQUAL] * answers),
            "1:16": lambda work=work: work(spread(answers)),
        }
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds, answers = (1, 16) if options.quick else (options.rounds, ANSWERS)
    measured: dict[str, Any] = {}
    table = [["work", "case", "microseconds a token", "ratio", "goal"]]
    held = True
    for group, rows in cases(Bench(), answers).items():
        cost: dict[str, list[float]] = {row: [] for row in rows}
        for index in range(rounds + 1):
            for row, work in rows.items():
                seconds, n_tokens = work()
                if index:  # the first round warms up
                    cost[row].append(seconds / n_tokens)
        first = next(iter(rows))
        for row, found in cost.items():
            ratios = sorted(mine / base for mine, base in zip(found, cost[first], strict=True))
            ratio = statistics.median(ratios)
            held &= ratio <= 1.15
            measured[f"{group}: {row}"] = {
                "ratio": round(ratio, 3),
                "low": round(ratios[0], 3),
                "high": round(ratios[-1], 3),
            }
            micro = statistics.median(found) * 1e6
            shown = "" if row == first else f"{ratio:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
            table.append([group, row, f"{micro:.1f}", shown, "" if row == first else "<= 1.15"])
    lengths = spread(answers)
    note = NOTE.format(
        rounds=rounds, shortest=min(lengths), longest=max(lengths), mean=round(statistics.fmean(lengths), 1)
    )
    finish("growth", measured, {"every row": GOAL}, held=held, options=options, table=table, note=note)


if __name__ == "__main__":
    main()
