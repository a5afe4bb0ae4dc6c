"""What each stage will hold in memory at most: the stages' own code, on the longest rows, with weightless models.

Each function here builds what its stage builds, in the same order, and computes the stage's two largest batches with
the optimiser's moments in place: the second finds the first one's gradients. Sizes are bytes of tensors
(`models.footprint`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.data.types import Prompt
from direct_rlhf.maths.losses import bradley_terry, dpo, nll
from direct_rlhf.models.batches import BATCH_TOKENS, SCORE_FACTOR, padded
from direct_rlhf.models.footprint import Heap, Weightless, parameter_bytes, weightless
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import autocast
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.recompute import recompute_layers
from direct_rlhf.models.reward_model import ADAPTER
from direct_rlhf.models.roles import COST_CRITIC, CRITIC, POLICY, Roles
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.models.sizes import MOMENT_TABLES, moment_bytes
from direct_rlhf.recipe.schema import (
    DpoSection,
    HttpReward,
    OptimiserSection,
    PythonReward,
    Recipe,
    RewardSection,
    SupervisedSection,
)
from direct_rlhf.rollout.decoder import Decoder, supports
from direct_rlhf.train.dpo import answer_logprobs
from direct_rlhf.train.experience import Batch, action_values, batch_of
from direct_rlhf.train.pairs import EncodedPair, pair_batches
from direct_rlhf.train.prompts import SAMPLED_AT_ONCE
from direct_rlhf.train.rehearsal import blank_experience, longest_rollout
from direct_rlhf.train.step import Optimiser
from direct_rlhf.train.update import Learner, TextWindows, critic_gradients, policy_gradients

LOAD, SAMPLE, SCORE, UPDATE, EVALUATE, SAVE = "load", "sample", "score", "update", "evaluate", "save"
TRAIN, CHECK = "train", "check"
JUDGES = (ADAPTER, "cost")  # names of their adapters


@dataclass(frozen=True)
class Longest:
    """The rows that need most: of the data, or, where they are not at hand, as long as the recipe allows."""

    prompt_ids: Sequence[int]
    pairs: Sequence[EncodedPair]  # the longest, as many as the largest batch
    sampled: Sequence[int] = ()  # tokens of each prompt of the PPO iteration that samples from the most; () = longest

    def shortened(self) -> "Longest":
        """One row of each."""
        return Longest(self.prompt_ids[:1], self.pairs[:1])

    def lengths(self, n: int) -> list[int]:
        """Tokens of ``n`` prompts that are sampled from at once."""
        return [*self.sampled[:n], *[len(self.prompt_ids)] * (n - len(self.sampled))]


@dataclass(frozen=True)
class RoleBytes:
    """What one role holds from step to step."""

    role: str
    weights: int
    gradients: int = 0
    moments: int = 0  # of AdamW


@dataclass(frozen=True)
class Forecast:
    """Peak bytes of tensors by phase, in the order of the first time, and what the roles hold of it."""

    stage: str
    peaks: Mapping[str, int]
    grown: Mapping[str, int]  # the same of the heap, if one was asked (see `Heap.grown`)
    roles: Sequence[RoleBytes]


def forecast_pairs(
    recipe: Recipe, config: Any, longest: Longest, stage: str, *, device: str = "cpu", heap: Heap | None = None
) -> Forecast:
    """Of reward, cost, sft or dpo on a ``device``, cpu or cuda."""
    section: RewardSection | SupervisedSection | DpoSection = getattr(recipe, stage)
    with weightless(heap, device) as plan:
        live = plan.live
        with live.phase(LOAD):
            model = _trainee(plan, recipe, config, ADAPTER)
            module: Any = model
            if isinstance(section, RewardSection):
                module = plan.scalar(model)
        if recipe.parallel.activation_checkpointing:
            recompute_layers(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        optimiser = WeightlessOptimiser(trained, section.optimiser, 1)
        _first_step(plan, optimiser)
        batches = list(pair_batches(longest.pairs[: section.batch_size], "cpu"))[-2:]
        with live.phase(TRAIN), autocast("cpu", recipe.model.dtype):
            for batch in batches:
                _pair_loss(module, batch, section).backward()
            optimiser.step(1.0, where="")
        with live.phase(CHECK), torch.no_grad(), autocast("cpu", recipe.model.dtype):
            for batch in batches:
                _pair_loss(module, batch, section)
        if isinstance(section, RewardSection):
            with live.phase("normalise"), torch.no_grad(), autocast("cpu", recipe.model.dtype):
                base = model
                if recipe.model.tuning == "full":
                    base = plan.causal_lm(config, recipe.model.dtype)
                lengths = longest.lengths(min(SAMPLED_AT_ONCE, section.normalisation_prompts))
                sample_once(plan, base, lengths, recipe.ppo.sampling.max_new_tokens)
        role = RoleBytes(stage, parameter_bytes(module), _bytes(trained), _moments(trained, section.optimiser))
        return Forecast(stage, live.peaks, live.grown, [role])


def _pair_loss(module: Any, batch: Any, section: Any) -> Any:
    rows = len(batch.rows)
    if isinstance(section, RewardSection):
        chosen_B, rejected_B = module.scores(batch.ids_BL, batch.mask_BL).chunk(2)
        return bradley_terry(chosen_B, rejected_B, None, section.centring)
    if isinstance(section, DpoSection):
        zero = torch.zeros(rows)
        return dpo(*answer_logprobs(module, batch), zero, zero, beta=section.beta, denominator=rows).loss
    logprob_BL = token_logprobs(module, batch.ids_BL, batch.mask_BL, batch.answer_BL).logprob_BL
    return nll(logprob_BL, batch.answer_BL, denominator=1.0)


def forecast_ppo(
    recipe: Recipe, config: Any, tokens: Tokens, longest: Longest, *, device: str = "cpu", heap: Heap | None = None
) -> Forecast:
    """Of a PPO arm on a ``device``, cpu or cuda."""
    with weightless(heap, device) as plan:
        return PpoForecast(plan, recipe, config, tokens, longest, device).forecast()


class PpoForecast:
    """One iteration of PPO at its largest."""

    def __init__(
        self, plan: Weightless, recipe: Recipe, config: Any, tokens: Tokens, longest: Longest, device: str
    ) -> None:
        self.plan, self.live, self.recipe, self.section = plan, plan.live, recipe, recipe.ppo
        self.config, self.tokens, self.longest, self.device = config, tokens, longest, device
        with self.live.phase(LOAD):
            self.roles, self.judges = self._start()
        if recipe.parallel.activation_checkpointing:
            for model in (self.roles.policy, self.roles.critic, self.roles.cost_critic):
                recompute_layers(model or nn.Module())
        self.learner = self._learner()

    def forecast(self) -> Forecast:
        """All phases, in the order of an iteration that is not the first one."""
        section = self.section
        for role in self.roles.trained:
            _first_step(self.plan, self.learner.optimisers[role])
        with self.live.phase(SAMPLE):
            self.sample(section.rollouts)
        with self.live.phase(SCORE):
            self.score(section.rollouts)
        with self.live.phase(UPDATE):
            self.update()
        with self.live.phase(EVALUATE):
            self.sample(min(section.evaluate_prompts, section.rollouts))
            self.score(section.evaluate_prompts)
            kept = {POLICY: self.roles.state(POLICY)}  # the best one so far, on its way to the disk
        with self.live.phase(SAVE):
            kept = {role: self.roles.state(role) for role in self.roles.trained}
        del kept
        return Forecast("ppo", self.live.peaks, self.live.grown, self._roles())

    def _start(self) -> tuple[Roles, list[ScalarModel]]:
        """`train.start`, in its order: what it loads for a moment counts too."""
        recipe, section, plan = self.recipe, self.recipe.model, self.plan
        lagrangian = recipe.ppo.lagrangian.enabled
        wanted = [(CRITIC, recipe.ppo.reward), *([(COST_CRITIC, recipe.ppo.lagrangian.cost)] if lagrangian else [])]
        judges: list[ScalarModel] = []
        critics: dict[str, ScalarModel] = {}
        from_model = [not isinstance(source, PythonReward | HttpReward) for _, source in wanted]
        self.judged = [name for name, needed in zip(JUDGES, from_model, strict=False) if needed]
        if section.tuning == "lora":
            names = [POLICY, *(role for role, _ in wanted)]
            names += self.judged
            model = plan.causal_lm(self.config, section.dtype, section.lora, names, section.quantise)
            for needed in from_model:
                self._identify() if needed else self._normalise()
            heads = [plan.scalar(model) for _ in names[1:]]
            cost_critic = heads[1] if lagrangian else None
            return Roles(model, heads[0], None, "cpu", section.dtype, cost_critic), heads[len(wanted) :]
        for (role, _), needed in zip(wanted, from_model, strict=True):
            if not needed:
                self._normalise()
                continue
            first = plan.scalar(plan.causal_lm(self.config, "float32"))
            self._identify()
            if recipe.ppo.critic.init == "reward":
                critics[role] = plan.scalar(plan.causal_lm(self.config, "float32"))
            judges.append(plan.scalar(plan.causal_lm(self.config, section.dtype)).requires_grad_(False))
            del first
        policy = plan.causal_lm(self.config, "float32").requires_grad_(True)
        reference = plan.causal_lm(self.config, section.dtype).requires_grad_(False)
        for role, _ in wanted:
            if role not in critics:
                critics[role] = plan.scalar(plan.causal_lm(self.config, "float32"))
            critics[role].requires_grad_(True)
        return Roles(policy, critics[CRITIC], reference, "cpu", section.dtype, critics.get(COST_CRITIC)), judges

    def _identify(self) -> None:
        """The base is in the memory of the CPU for a moment, whose parameters are hashed (those before 4 bits)."""
        if self.device == "cpu":
            self.plan.causal_lm(self.config, self.recipe.model.dtype)

    def _learner(self) -> Learner:
        section, ptx = self.section, self.section.ptx
        text = None
        if ptx.weight:
            text = TextWindows([[0] * ptx.window] * ptx.batch_size, ptx.weight, ptx.batch_size)
        return Learner(
            roles=self.roles,
            section=section,
            optimisers={
                role: WeightlessOptimiser(self.roles.parameters(role), self._optimiser(role), 1)
                for role in self.roles.trained
            },
            text=text,
            seed=0,
            chunk=ChunkSize(UPDATE, section.micro_batch_tokens),
        )

    def _optimiser(self, role: str) -> OptimiserSection:
        return self.section.optimiser if role == POLICY else self.section.critic.optimiser

    def sample(self, rows: int) -> None:
        section = self.section
        lengths = self.longest.lengths(rows // section.samples_per_prompt)
        with self.roles.acting() as policy, torch.no_grad():
            sample_once(self.plan, policy, lengths, section.sampling.max_new_tokens, section.samples_per_prompt)

    def _normalise(self) -> None:
        """The base's own answers, in whose units the user's reward is."""
        lengths = self.longest.lengths(min(SAMPLED_AT_ONCE, self.recipe.reward.normalisation_prompts))
        base = self.plan.causal_lm(self.config, self.recipe.model.dtype, quantise=self.recipe.model.quantise)
        with torch.no_grad():
            sample_once(self.plan, base, lengths, self.section.sampling.max_new_tokens)

    def score(self, rows: int) -> None:
        """The reward's batch of at most ``rows`` answers, the reference's and the critics'."""
        ids_BL, mask_BL = padded([[0] * self._length] * min(max(SCORE_FACTOR * BATCH_TOKENS // self._length, 1), rows))
        with torch.no_grad():
            for judge in self.judges:
                with autocast("cpu", self.roles.dtype):
                    judge.scores(ids_BL, mask_BL)
            budget = SCORE_FACTOR * self.section.micro_batch_tokens
            batch = self._batch(min(max(budget // self._length, 1), rows))
            temperature = self.section.sampling.temperature
            self.roles.reference_logprobs(batch.ids_BL, batch.mask_BL, batch.action_BL, temperature)
            for role in self.roles.trained[1:]:
                with self.roles.criticising(role) as critic:
                    action_values(critic, batch)

    def update(self) -> None:
        """Two micro-batches of each role (one, if a minibatch has no more) and its step."""
        rows = min(2 * self._micro_batch(), self.section.minibatch_size)
        rollout = self._rollout(rows)
        experience = blank_experience(rollout, with_cost=self.roles.cost_critic is not None)
        count, key = float(rollout.action_mask_BT.sum()), (0, 0, 0, 1)
        budget = self.section.micro_batch_tokens
        for role in self.roles.trained:
            if role == POLICY:
                policy_gradients(experience, list(range(rows)), count, self.learner, key, budget)
            else:
                critic_gradients(experience, list(range(rows)), count, self.learner, role, budget)
            self.learner.optimisers[role].step(1.0, where="")

    def _micro_batch(self) -> int:
        """Answers of one forward and backward."""
        rows = max(self.section.micro_batch_tokens // self._length, 1)
        return min(rows, self.section.minibatch_size)

    @property
    def _length(self) -> int:
        return len(self.longest.prompt_ids) + self.section.sampling.max_new_tokens

    def _rollout(self, rows: int) -> Any:
        prompt = Prompt("longest", (), "", "")
        return longest_rollout(self.longest.prompt_ids, prompt, rows, self.section.sampling.max_new_tokens, self.tokens)

    def _batch(self, rows: int) -> Batch:
        return batch_of(self._rollout(rows), range(rows), "cpu")

    def _roles(self) -> list[RoleBytes]:
        roles, lora = self.roles, self.roles.reference is None
        found = []
        if lora:
            trunk = sum(p.nbytes for name, p in roles.policy.named_parameters() if "lora_" not in name)
            found.append(RoleBytes("trunk (shared, frozen)", trunk))
        for role in roles.trained:
            own = roles.parameters(role)
            moments = _moments(own, self._optimiser(role))
            found.append(RoleBytes(role.replace("_", " "), _bytes(own), _bytes(own), moments))
        found += [] if lora else [RoleBytes("reference", parameter_bytes(roles.reference))]  # type: ignore[arg-type]
        for name, judge in zip(self.judged, self.judges, strict=True):
            size = parameter_bytes(judge)
            if lora:
                size = sum(p.nbytes for n, p in roles.policy.named_parameters() if f".{name}." in n)
            found.append(RoleBytes(f"{name} model", size))
        return found


def sample_once(
    plan: Weightless, model: Any, lengths: Sequence[int], new_tokens: int, samples_per_prompt: int = 1
) -> None:
    """The sampler's largest moments: prompts of these lengths at once, and the last token of all answers."""
    prompts = [[number] * length for number, length in enumerate(lengths) for _ in range(samples_per_prompt)]
    rows, slots = len(prompts), max(lengths) + new_tokens
    if supports(model):
        with plan.making():
            decoder = Decoder(model, rows=rows, slots=slots, longest=max(lengths), refills=False)
        decoder.prefill(list(range(rows)), prompts)
        decoder.column, decoder.first = slots - 1, [0] * rows
        logits = decoder.step(torch.zeros(rows, dtype=torch.int64)).float()
    else:
        logits = model(input_ids=torch.zeros(rows, slots, dtype=torch.int64), logits_to_keep=1).logits[:, -1].float()
    (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1)


def _first_step(plan: Weightless, optimiser: Optimiser) -> None:
    """Makes the moments, which are there from the first step on."""
    plan.gradients(optimiser.parameters)
    optimiser.step(1.0, where="")


class WeightlessOptimiser(Optimiser):
    """The optimiser of a stage. bitsandbytes need not be here: what its moments take is held in their place."""

    def _made(self) -> Any:
        return super()._made() if self.section.kind == "adamw" else _Moments(self.parameters, self.section)


class _Moments(torch.optim.Optimizer):
    def __init__(self, parameters: Sequence[nn.Parameter], section: OptimiserSection) -> None:
        super().__init__(parameters, {"lr": section.learning_rate})
        self.sizes = [moment_bytes(parameter.numel(), section.kind) for parameter in parameters] + [MOMENT_TABLES]
        self.held: list[Any] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameter = self.param_groups[0]["params"][0]
        self.held = self.held or [parameter.detach().new_empty(size, dtype=torch.uint8) for size in self.sizes]


def _moments(parameters: Sequence[nn.Parameter], section: OptimiserSection) -> int:
    return sum(moment_bytes(parameter.numel(), section.kind) for parameter in parameters)


def _trainee(plan: Weightless, recipe: Recipe, config: Any, adapter: str) -> Any:
    """`train.loop.load_trainee`."""
    section = recipe.model
    if section.tuning == "full":
        return plan.causal_lm(config, "float32").requires_grad_(True)
    return plan.causal_lm(config, section.dtype, section.lora, [adapter], section.quantise)


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
