"""The recipe: one frozen pydantic section per stage, torch-free.

Each field carries its help once, with unit and range. A class's defaults are its vetted setting (the tiny CPU column
of the starting values); shipped recipes state what they change.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Arm = Literal["base", "sft", "sft_ppo", "dpo", "direct_ppo"]
Suite = Literal["general", "conversation", "toxicity"]
Adapter = Literal["tensorboard", "wandb", "mlflow", "trackio"]
UnfinishedRule = Literal["replace", "subtract", "scale", "mask"]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _start_from_own_defaults(cls, data: Any) -> Any:
        """An empty section is its defaults; a partly given one keeps what this place (not its class) sets for the rest.

        So `reward.optimiser.learning_rate=1e-4` leaves the reward model's own schedule alone.
        """
        if data is None:
            return {}
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        for name, field in cls.model_fields.items():
            default, given = field.default, filled.get(name)
            if isinstance(default, Section) and isinstance(given, Mapping) and field.discriminator is None:
                filled[name] = {key: getattr(default, key) for key in default.model_fields_set} | dict(given)
        return filled


class LoraSection(Section):
    rank: int = Field(16, ge=1, le=1024)
    """Rank of each low-rank update."""
    alpha: float = Field(32.0, gt=0)
    """Scale; the update is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """PEFT target modules; the head and the embeddings are never adapted."""


class ModelSection(Section):
    base: str = "world:base"
    """The base model: `world:base` (embedded), a folder, or a hub id."""
    revision: str | None = None
    """Hub revision; resolved to a commit and recorded."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. bfloat16 keeps float32 master weights when tuning is full and trains under autocast."""
    tuning: Literal["full", "lora"] = "full"
    """full: four separate models. lora: one frozen trunk with adapters for policy, critic and reward."""
    lora: LoraSection = LoraSection()
    """The adapters; used when tuning is lora."""
    quantise: Literal["none", "nf4"] = "none"
    """nf4: the frozen trunk in 4 bits (QLoRA, by bitsandbytes); with tuning lora, in one process."""
    trust_remote_code: bool = False
    """Dangerous: runs code that comes with the model."""

    @model_validator(mode="after")
    def _only_frozen_weights_in_four_bits(self) -> "ModelSection":
        if self.quantise != "none" and self.tuning == "full":
            raise ValueError(
                f"quantise = {self.quantise}: weights in 4 bits cannot be trained; set tuning: lora, or quantise: none"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unused_quantisation(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without it has the text, the hash and the fingerprints that it had before there was any."""
        found: dict[str, Any] = values(self)
        if self.quantise == "none":
            del found["quantise"]
        return found


class DialogueSection(Section):
    format: Literal["plain", "chat_template"] = "plain"
    """plain: text markers, for base models. chat_template: the tokenizer's own template."""
    human: str = Field("\n\nHuman:", min_length=1)
    """Text that opens a human turn; byte-exact with Anthropic HH by default."""
    assistant: str = Field("\n\nAssistant:", min_length=1)
    """Text that opens an assistant turn."""
    stop_strings: list[str] | None = None
    """Strings that end an answer. Default: the human marker."""
    system: str | None = None
    """Text put before the first turn of every dialogue."""


class DataSource(Section):
    path: str = Field(min_length=1)
    """A file, a folder, `world:NAME`, or `hf:OWNER/NAME[:SPLIT]`."""
    kind: str = Field("helpful", min_length=1, max_length=40)
    """What the pairs stress: helpful, harmless, honest, or a word of yours. A row's own `kind` wins."""
    weight: float = Field(1.0, ge=0, le=4)
    """How often its training rows are used: 1 = each once, 0.5 = half of them, 2 = each twice, 0 = none."""
    format: Literal["auto", "explicit", "implicit", "messages", "sharegpt", "alpaca", "hh", "prompt", "text"] = "auto"
    """Row format; auto sniffs it from the first rows and says what it found."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many good rows."""


class NoMixture(Section):
    type: Literal["none"] = "none"
    """All pairs, each as often as the weight of its source says."""


class HeuristicMixture(Section):
    type: Literal["heuristic"]
    """Shares of the kinds of pairs, by hand or from their sizes."""
    shares: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weight of every kind (0 leaves it out); their sum counts as 1. Default: from the sizes, by `temperature`."""
    temperature: float | None = Field(1.0, gt=0)
    """Without `shares`, a kind of n pairs gets a share proportional to n^(1 / this): 1 = as the data are, larger = more
    alike; null = all kinds alike."""
    pairs: int | None = Field(None, ge=1)
    """Training pairs that the mixture ends with; a pair is used at most 4 times. Default: as many as there are."""

    @model_validator(mode="after")
    def _some_share(self) -> "HeuristicMixture":
        if self.shares and not any(self.shares.values()):
            raise ValueError("shares: all of them are 0; give at least one kind a share")
        return self


class ScoredMixture(Section):
    """A selection by the margins D_k = r_k(chosen) - r_k(rejected), with a reward model r_k for each kind of pair."""

    type: Literal["reward_selected", "low_conflict"]
    models: dict[str, str] = {}
    """Reward models by kind: folders that earlier runs made for this base. Each kind that is not named here gets one in
    this run, trained on its pairs as `reward` says."""
    second_seed: bool = False
    """Train each of those a second time with another seed, to report how often both would select alike."""
    delta: float = Field(0.25, ge=0)
    """Margin, in standard deviations of the base's scores, from which two kinds count as in conflict over a pair."""
    pairs: int | None = Field(None, ge=1)
    """Training pairs that the mixture ends with, drawn from the selected ones or these repeated (each at most 4 times).
    Default: all that are selected, once."""


class RewardSelectedMixture(ScoredMixture):
    type: Literal["reward_selected"]
    """Pairs on which the reward models together agree with the label: M = sum of g_k D_k."""
    gate: Literal["own", "fixed", "learnt"] = "own"
    """The weights g: `own_weight` for the pair's kind and the rest equal; `weights`; or, learnt for each kind, those
    under which sigma(M) makes the labels of its held-out pairs likeliest."""
    own_weight: float = Field(0.5, ge=0, le=1)
    """For `own`."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """For `fixed`: the weight of every kind; their sum counts as 1."""
    rule: Literal["gated", "agree"] = "gated"
    """gated: M above `min_margin`, and of these the best `fraction`. agree: M above 0 and every D_k at least -delta."""
    min_margin: float = 0.0
    """For `gated`."""
    fraction: float = Field(0.5, gt=0, le=1)
    """For `gated`: the share that is kept of the pairs above `min_margin`."""

    @model_validator(mode="after")
    def _weights_for_a_fixed_gate(self) -> "RewardSelectedMixture":
        if self.gate == "fixed" and not any(self.weights.values()):
            raise ValueError("gate = fixed needs weights, one for every kind of pair and not all of them 0")
        if self.gate != "fixed" and self.weights:
            raise ValueError(f"weights: the gate is {self.gate}, which has no use for them; set gate: fixed")
        return self


class LowConflictMixture(ScoredMixture):
    type: Literal["low_conflict"]
    """All pairs but those that one kind's reward model favours by more than delta and another's opposes by more."""


Mixture = Annotated[
    NoMixture | HeuristicMixture | RewardSelectedMixture | LowConflictMixture, Field(discriminator="type")
]


class DataSection(Section):
    path: str | None = None
    """Folder that relative source paths start from. Default: the recipe's own folder, then the working folder."""
    preferences: list[DataSource] = []
    """Preference pairs for the reward model, SFT (chosen answers) and DPO."""
    prompts: list[DataSource] = []
    """Prompts for PPO. Default: the prompts of `preferences`."""
    text: list[DataSource] = []
    """Pretraining-like plain text for the ptx loss."""
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of prompts (by hash, so that equal prompts stay together) kept out of training."""
    max_prompt_tokens: int = Field(128, ge=8)
    """Longer dialogues lose whole turns from the left; what still does not fit is dropped and counted."""
    max_answer_tokens: int = Field(96, ge=2)
    """A longer answer drops its pair, counted."""
    max_bad_rows: float = Field(0.01, ge=0, le=1)
    """Share of malformed rows above which the run stops."""
    mixture: Mixture = NoMixture()
    """Which training pairs are used, and how often: the balance between their kinds. Its `type` says how."""

    @model_validator(mode="after")
    def _a_mixture_decides_how_often(self) -> "DataSection":
        weighted = [(at, source.weight) for at, source in enumerate(self.preferences) if source.weight != 1]
        if weighted and self.mixture.type != "none":
            at, weight = weighted[0]
            raise ValueError(
                f"preferences.{at}.weight = {weight:g}: with a mixture, data.mixture decides how often pairs are used; "
                "leave the weight at 1"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_an_unused_mixture(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without a mixture has the text, the hash and the fingerprints that it had before there were any."""
        found: dict[str, Any] = values(self)
        if self.mixture.type == "none":
            del found["mixture"]
        return found


class OptimiserSection(Section):
    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw: moments in float32. adamw_8bit: in 8 bits with a scale for every 256 (bitsandbytes), in one process."""
    learning_rate: float = Field(1e-4, gt=0, lt=1)
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Adam decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled (AdamW) weight decay; each step multiplies it by the learning rate."""
    warmup: float = Field(0.03, ge=0, le=1)
    """Share of the steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; linear and cosine end at 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which the gradient is scaled down."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite is never taken: it ends the run, or it is left out."""
    max_skipped: int = Field(3, ge=1)
    """More steps left out in a row than this end the run all the same."""
    spike_sigma: float | None = Field(6.0, gt=1)
    """A gradient norm this many standard deviations above the last 128 steps' mean is reported with its batch."""
    skip_spikes: bool = False
    """Leave such a step out as well."""

    @model_serializer(mode="wrap")
    def _without_the_usual_kind(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As with ``model.quantise``: the usual AdamW goes without saying, as before there was another one."""
        found: dict[str, Any] = values(self)
        if self.kind == "adamw":
            del found["kind"]
        return found


class FitnessSection(Section):
    min_accuracy: float = Field(0.6, ge=0, le=1)
    """Below this (lower end of the interval) the card warns; if the interval covers 0.5 it fails."""
    max_calibration_error: float = Field(0.1, ge=0, le=1)
    """Expected calibration error of sigma(margin) above which the card warns."""
    max_length_correlation: float = Field(0.5, ge=0, le=1)
    """|Spearman| of score and answer length above which the card warns."""
    max_praise_gain: float = Field(0.5, ge=0)
    """Mean gain, in units of the base's score spread, from adding empty praise; above it the card warns."""
    max_repetition_gain: float = Field(0.5, ge=0)
    """Mean gain from repeating the answer; above it the card warns."""
    on_fail: Literal["stop", "continue"] = "stop"
    """What PPO does with a reward model whose card says fail."""


class RewardSection(Section):
    """Training of the reward model (Bradley-Terry on the preference pairs)."""

    kinds: list[str] = []
    """Train on the pairs of these kinds only; empty = all pairs."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs; fractions are allowed."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps after which training ends, whatever the epochs. Default: no cap."""
    batch_size: int = Field(32, ge=1)
    """Pairs per optimiser step."""
    optimiser: OptimiserSection = OptimiserSection(learning_rate=3e-4, schedule="linear")
    """Optimiser of the reward model."""
    margin: bool = False
    """Use the pairs' margin column in the loss."""
    centring: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps scores near 0."""
    normalisation_prompts: int = Field(512, ge=8)
    """Base-model samples whose scores define mean 0 and variance 1."""
    fitness: FitnessSection = FitnessSection()
    """Limits of the fitness card, which says whether the reward model is fit for PPO."""


class TrainedReward(Section):
    type: Literal["trained"] = "trained"
    """The reward model this recipe trains."""


class ModelReward(Section):
    type: Literal["model"]
    """A reward model that exists already."""
    path: str
    """A reward model made by `direct-rlhf reward train` (its normalisation must be of the same base and settings)."""


class PythonReward(Section):
    type: Literal["python"]
    """A Python function."""
    target: str = Field(pattern=r"^[\w.]+:[\w.]+$", json_schema_extra={"must": "look like package.module:function"})
    """`module:function`, called with a list of {"prompt": [turns], "answer": str, "kind": str}; returns floats."""


class HttpReward(Section):
    type: Literal["http"]
    """A server that scores answers."""
    url: str = Field(pattern=r"^https?://", json_schema_extra={"must": "start with http:// or https://"})
    """POST {"items": [{"prompt", "answer", "kind"}]} answered by {"scores": [float]}."""
    timeout: float = Field(30.0, gt=0)
    """Seconds."""


RewardSource = Annotated[TrainedReward | ModelReward | PythonReward | HttpReward, Field(discriminator="type")]


class SupervisedSection(Section):
    """SFT on the chosen answers."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the chosen answers; fractions are allowed."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps after which training ends, whatever the epochs. Default: no cap."""
    batch_size: int = Field(32, ge=1)
    """Dialogues per optimiser step."""
    optimiser: OptimiserSection = OptimiserSection(learning_rate=2e-4, schedule="cosine")
    """Optimiser of SFT."""


class DpoSection(Section):
    """Direct preference optimisation on the pairs."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs; fractions are allowed."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps after which training ends, whatever the epochs. Default: no cap."""
    batch_size: int = Field(32, ge=1)
    """Pairs per optimiser step."""
    beta: float = Field(0.1, gt=0)
    """Inverse temperature of the implicit reward."""
    optimiser: OptimiserSection = OptimiserSection(learning_rate=1e-4, schedule="cosine")
    """Optimiser of DPO."""


class SamplingSection(Section):
    max_new_tokens: int = Field(48, ge=1)
    """Cap on the answer, in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Divides policy and reference logits alike; there is no truncation sampling."""
    terminal: Literal["swap_eos", "keep_stop"] = "swap_eos"
    """How a stop string ends an answer: replaced by an EOS that is no action, or kept as actions."""


class LengthSection(Section):
    unfinished: UnfinishedRule = "replace"
    """Score of an answer cut by the cap: the base's low quantile, a subtraction, a scale, or masked out of the loss."""
    unfinished_penalty: float = Field(1.0, ge=0)
    """For `subtract`."""
    unfinished_factor: float = Field(0.5, ge=0, le=1)
    """For `scale`."""
    overlong_buffer: int = Field(0, ge=0)
    """Last tokens before the cap over which a ramp penalty grows; 0 = off."""
    overlong_penalty: float = Field(1.0, ge=0)
    """Penalty at the cap, normalised units."""
    per_token_penalty: float = Field(0.0, ge=0)
    """Subtracted from the score for every answer token."""
    min_response_tokens: int = Field(0, ge=0)
    """Shorter answers get the unfinished score; 0 = off."""
    cap_schedule: list[tuple[int, int]] = []
    """[[iteration, cap], ...]: the cap from that iteration on; later caps may not pass max_new_tokens."""


class KLSection(Section):
    controller: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: the coefficient follows the target. fixed: it stays as it is."""
    coefficient: float = Field(0.05, ge=0)
    """beta, the starting weight of the KL penalty."""
    target: float = Field(6.0, gt=0)
    """Nats per answer (sequence sum)."""
    horizon: float = Field(10_000, gt=0)
    """Episodes over which the controller corrects."""
    stop_factor: float = Field(4.0, gt=1)
    """Stop when the mean sequence KL of 5 updates passes this many targets; the best checkpoint is kept."""
    inner_limit: float = Field(0.1, gt=0)
    """Leave the epoch when k3(old||new) per token passes this."""


class CriticSection(Section):
    init: Literal["reward", "zero"] = "reward"
    """Start from the reward model, its head in normalised units; or from the base with a zero head."""
    warmup: int = Field(5, ge=0)
    """Critic-only minibatch updates before the policy moves."""
    optimiser: OptimiserSection = OptimiserSection(learning_rate=1e-4)
    """Optimiser of the critic, apart from the policy's."""


class PtxSection(Section):
    weight: float = Field(0.0, ge=0)
    """Weight of the language-model loss on pretraining text in each policy step; 0 = off."""
    batch_size: int = Field(8, ge=1)
    """Text windows per policy step."""
    window: int = Field(128, ge=8)
    """Tokens per window."""


class GuardSection(Section):
    """A small general-task probe at every held-out evaluation of PPO: what the policy may not forget."""

    action: Literal["off", "raise_kl", "stop"] = "off"
    """What a drop beyond the bound does: raise the KL weight (and stop once that no longer helps), or stop."""
    tasks: list[str] = []
    """General tasks of the probe, as in `evaluation.general.tasks`; empty = those."""
    items: int = Field(16, ge=2)
    """Documents of each task that a probe scores; always the same ones."""
    max_drop: float = Field(0.03, gt=0, lt=1)
    """Drop of the mean over tasks against the policy's own start; acted upon if its interval also excludes 0."""
    kl_factor: float = Field(2.0, gt=1)
    """Each raise multiplies the KL weight by this; an adaptive weight may not fall below the raised one again."""
    max_raises: int = Field(3, ge=1)
    """Raises after which a further drop stops the run."""


class LagrangianSection(Section):
    """PPO-Lagrangian: reward under a bound on cost, with a critic of its own and a multiplier that learns."""

    enabled: bool = False
    """Off: plain PPO on the reward alone."""
    cost: RewardSource = TrainedReward()
    """What costs come from. A model's cost is -(normalised score); a function or server returns costs, normalised."""
    bound: float = 0.0
    """d, the mean cost allowed, in standard deviations of the base's scores; 0 = as harmful as the base on average."""
    multiplier: float = Field(1.0, gt=0)
    """lambda at the start."""
    learning_rate: float = Field(0.1, ge=0)
    """Step size of log lambda; 0 keeps lambda fixed, which is the weighted sum of reward and cost."""
    max_multiplier: float = Field(10.0, gt=0)
    """lambda never passes this."""
    window: int = Field(128, ge=1)
    """Episodes whose mean cost is compared with the bound."""

    @model_validator(mode="after")
    def _multiplier_below_its_cap(self) -> "LagrangianSection":
        if self.multiplier > self.max_multiplier:
            raise ValueError(f"multiplier ({self.multiplier:g}) may not pass max_multiplier ({self.max_multiplier:g})")
        return self


class PpoSection(Section):
    """PPO, used by the arms direct_ppo (from the base) and sft_ppo (from the SFT model)."""

    iterations: int = Field(20, ge=1)
    """Rounds of sampling, scoring, estimating and updating."""
    rollouts: int = Field(64, ge=1)
    """Answers sampled per iteration."""
    samples_per_prompt: int = Field(1, ge=1)
    """Answers sampled for each prompt of an iteration; must divide `rollouts`."""
    minibatch_size: int = Field(32, ge=1)
    """Answers per optimiser step; must divide `rollouts`."""
    micro_batch_tokens: int = Field(1536, ge=1)
    """Padded tokens (prompt and answer) of a forward and backward, a quarter of scoring's; memory only, not results."""
    epochs: int = Field(4, ge=1)
    """Passes over the rollouts of an iteration."""
    optimiser: OptimiserSection = OptimiserSection(learning_rate=3e-5)
    """Optimiser of the policy."""
    critic: CriticSection = CriticSection()
    """The value model."""
    reward: RewardSource = TrainedReward()
    """Where scores come from; its `type` says which kind."""
    sampling: SamplingSection = SamplingSection()
    """How answers are sampled and how they end."""
    length: LengthSection = LengthSection()
    """Length control and the score of unfinished answers."""
    kl: KLSection = KLSection()
    """The pull towards the base model, and when to stop."""
    ptx: PtxSection = PtxSection()
    """Pretraining text mixed into the policy's loss, against forgetting."""
    guard: GuardSection = GuardSection()
    """Watches general skill while PPO runs."""
    lagrangian: LagrangianSection = LagrangianSection()
    """Harmlessness as a constraint instead of a part of the reward."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE lambda."""
    clip: float = Field(0.2, gt=0)
    """The importance ratio is clipped to 1 +- this."""
    value_clip: float = Field(0.2, gt=0)
    """A value may move this far from its rollout-time value, in normalised reward units."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of a large ratio with a negative advantage. Default: off."""
    entropy: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    score_clip: float = Field(10.0, gt=0)
    """Scores are clipped to +- this, in normalised units, before KL."""
    evaluate_every: int = Field(5, ge=1)
    """Iterations between held-out evaluations, which choose the best checkpoint."""
    evaluate_prompts: int = Field(64, ge=1)
    """Held-out prompts per evaluation."""
    best_kl_limit: float | None = Field(None, gt=0)
    """Only checkpoints below this sequence KL can be best. Default: twice the KL target."""
    checkpoint_every: int = Field(10, ge=1)
    """Iterations between resumable checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that stay on disk."""

    @model_validator(mode="after")
    def _whole_minibatches(self) -> "PpoSection":
        if self.rollouts % self.minibatch_size:
            raise ValueError(f"rollouts ({self.rollouts}) must be a multiple of minibatch_size ({self.minibatch_size})")
        if self.rollouts % self.samples_per_prompt:
            raise ValueError(
                f"rollouts ({self.rollouts}) must be a multiple of samples_per_prompt ({self.samples_per_prompt})"
            )
        for _, cap in self.length.cap_schedule:
            if not 1 <= cap <= self.sampling.max_new_tokens:
                raise ValueError(
                    f"length.cap_schedule: cap {cap} must be between 1 and sampling.max_new_tokens "
                    f"({self.sampling.max_new_tokens})"
                )
        if self.length.overlong_buffer > self.sampling.max_new_tokens:
            raise ValueError(
                f"length.overlong_buffer ({self.length.overlong_buffer}) may not pass sampling.max_new_tokens "
                f"({self.sampling.max_new_tokens})"
            )
        return self


class VllmSection(Section):
    """vLLM as it samples for PPO. Nothing here may change a result but by rounding."""

    mode: Literal["server", "colocated"] = "server"
    """server: a running `vllm serve`. colocated: an engine on this process's GPU, asleep while PPO trains."""
    url: str | None = Field(None, pattern=r"^https?://", json_schema_extra={"must": "start with http:// or https://"})
    """server: its address, such as http://127.0.0.1:8000."""
    model: str | None = Field(None, min_length=1)
    """server: the model's name there. Default: the only one that it serves."""
    api_key_env: str | None = Field(None, min_length=1)
    """server: environment variable that holds its key; it is read there only. null: the server wants none."""
    weights: str | None = Field(None, min_length=1)
    """Folder through which the policy's weights go to vLLM, under the same path there and here. Default: `weights` in
    the run directory. A folder in memory, such as /dev/shm, is fastest where both are on one machine."""
    timeout: float = Field(600.0, gt=0)
    """server: seconds for an answer, or for loading weights, after which it is asked again."""
    retries: int = Field(6, ge=0, le=20)
    """server: further tries of a request that failed in a way that may pass."""
    concurrency: int = Field(256, ge=1, le=4096)
    """server: requests under way at a time, of each process."""
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """colocated: share of the GPU's memory that vLLM takes while it samples. The trainer's weights and optimisers stay
    in the rest."""


class CorrectionSection(Section):
    """The difference between what an engine of other arithmetic says of its samples and what the trainer says."""

    truncate: float = Field(2.0, ge=1)
    """Each token's loss is weighted by min(p_trainer / p_sampler, this): truncated importance sampling."""
    alert_above: float = Field(0.01, gt=0)
    """An alert, where KL(sampler || trainer) stays above this: nats per token, mean of an iteration."""
    stop_above: float = Field(0.1, gt=0)
    """The run ends before it trains on samples above this: they are of other weights, or of another distribution."""


class RolloutSection(Section):
    """Who samples PPO's answers."""

    engine: Literal["native", "vllm"] = "native"
    """native: this package, in the trainer's process, exactly. vllm: vLLM, faster with large models (extra `vllm`)."""
    vllm: VllmSection = VllmSection()
    """For `vllm`."""
    correction: CorrectionSection = CorrectionSection()
    """For `vllm`."""

    @model_validator(mode="after")
    def _a_server_has_an_address(self) -> "RolloutSection":
        if self.engine == "vllm" and self.vllm.mode == "server" and self.vllm.url is None:
            raise ValueError("engine = vllm with mode = server needs vllm.url, the server's address")
        return self


class GeneralSection(Section):
    tasks: list[str] = ["world"]
    """`world` = the 11 embedded tasks, `standard` = the field's 11 tests (`standard:NAME` = one of them), lm-eval task
    names or YAML files."""
    include_path: str | None = None
    """Folder with further lm-eval task YAMLs."""
    limit: int | None = Field(None, ge=1)
    """Documents per task; of a test of several parts (MMLU, AGIEval, BBH) taken from its parts in turn."""
    num_fewshot: int | None = Field(None, ge=0)
    """Default: each task's own."""
    fewshot: Literal["fixed", "per-document"] = "fixed"
    """Worked examples: fixed = the same block for all documents of a task, computed once; per-document = lm-eval's own
    draw for each document, where a task asks for that."""


class JudgeSection(Section):
    """A judge that is asked in words: a server (`judge: endpoint`), a model (`local`) or a file (`recorded`)."""

    base_url: str | None = Field(
        None, pattern=r"^https?://", json_schema_extra={"must": "start with http:// or https://"}
    )
    """endpoint: the server's address up to and with /v1; any that speaks the OpenAI chat protocol."""
    model: str | None = Field(None, min_length=1)
    """endpoint: the model's name there. local: a folder, a hub id or `world:base`."""
    api_key_env: str | None = Field(None, min_length=1)
    """Environment variable that holds the server's key; it is read there only. null: the server wants none."""
    temperature: float | None = Field(0.0, ge=0)
    """The judge's own; null sends none, for servers that allow no other than theirs."""
    max_tokens: int = Field(2048, ge=1)
    """Cap on a reply of the judge. A reply that it cuts is no verdict."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that cap."""
    timeout: float = Field(120.0, gt=0)
    """Seconds without a sign from the server after which a request is sent again."""
    retries: int = Field(6, ge=0, le=20)
    """Further tries of a request that failed in a way that may pass."""
    concurrency: int = Field(8, ge=1, le=256)
    """Requests under way at a time; changes speed, not results."""
    max_calls: int | None = Field(None, ge=1)
    """Calls of the whole run, further tries counted, after which it stops (resumable). Default: no cap."""
    max_cost: float | None = Field(None, gt=0)
    """Money of the whole run that is not passed, in the unit of the prices; it stops before (resumable)."""
    price_in: float | None = Field(None, ge=0)
    """Price of a million tokens that the judge reads."""
    price_out: float | None = Field(None, ge=0)
    """Price of a million tokens that it writes."""
    recorded: str | None = Field(None, min_length=1)
    """recorded: a judgments.jsonl of an earlier run, whose replies are taken for equal requests."""
    batch_size: int = Field(8, ge=1)
    """local: replies written at once; changes memory and speed, not results."""

    @model_validator(mode="after")
    def _priced(self) -> "JudgeSection":
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("max_cost needs price_in and price_out, the prices of a million tokens")
        return self


class ConversationSection(Section):
    questions: str = "world:conversations.jsonl"
    """JSONL of multi-turn questions: {"id", "category", "turns": [{"prompt"}]}, or as MT-Bench and Vicuna have them."""
    references: str | None = None
    """Reference answers, in the shape of MT-Bench's, shown to the judge for math, reasoning and coding."""
    without_references: bool = False
    """Judge what has a reference answer a second time without it; 13 of MT-Bench's 30 are reported wrong."""
    judge_prompts: str | None = None
    """Prompts of the judge, in the shape of MT-Bench's judge_prompts.jsonl; for every judge but the scripted one."""
    judge: Literal["scripted", "endpoint", "local", "recorded"] = "scripted"
    """scripted: exact rules that come with the questions. Others are asked in words: a server, a model, a file."""
    judging: JudgeSection = JudgeSection()
    """The judge, where it is not the scripted one."""
    temperatures: Literal["recipe", "by-category"] = "recipe"
    """recipe: evaluation.temperature. by-category: MT-Bench's own, 0 for math to 0.7 for writing."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Cap on an answer, in tokens; MT-Bench: 1024. Default: evaluation.max_new_tokens."""
    self_check: str | None = None
    """Human-labelled pairs {"input", "output_1", "output_2", "label"} to hold the judge against: better than chance?"""
    self_check_limit: int = Field(100, ge=2)
    """Pairs drawn for that; two calls a pair."""
    self_check_subset: str | None = None
    """Only pairs whose `subset` is this."""
    pairwise: bool = False
    """Also judge each arm's answers against the base's side by side, in both orders."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many questions."""

    @model_validator(mode="after")
    def _what_the_judge_needs(self) -> "ConversationSection":
        if self.judge == "scripted":
            given = [name for name in ("references", "judge_prompts", "self_check") if getattr(self, name) is not None]
            given += [name for name in ("pairwise", "without_references") if getattr(self, name)]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: the scripted judge has no use for this; choose judge: endpoint, local or "
                    "recorded"
                )
            return self
        needs = {"endpoint": ("base_url", "model"), "local": ("model",), "recorded": ("recorded",)}[self.judge]
        missing = [f"judging.{name}" for name in needs if getattr(self.judging, name) is None]
        missing += ["judge_prompts"] if self.judge_prompts is None else []
        missing += ["references"] if self.without_references and self.references is None else []
        if missing:
            raise ValueError(f"judge = {self.judge} needs {', '.join(missing)}")
        return self


class ToxicitySection(Section):
    prompts: str | list[str] = "world:toxicity.jsonl"
    """One file or several: JSONL {"id", "prompt": [turns], "set": "provoking"|"harmful"|"harmless"}, or AdvBench,
    XSTest, HH or RealToxicityPrompts as they come."""
    bad_words: str = "world:bad_words.txt"
    """One word a line."""
    classifier: Literal["auto", "profanity-check", "wordlist", "detoxify", "perspective", "guard"] = "auto"
    """auto: profanity-check where it is installed, else the word list; the report says which. guard: a local model."""
    classifier_path: str | None = None
    """Folder of the guard model, or Detoxify's checkpoint."""
    guard_template: str | None = None
    """What a guard that writes its verdict is asked, with {prompt} and {answer}. Default: a plain question."""
    samples_per_prompt: int = Field(1, ge=1)
    """Answers sampled for each prompt."""
    k: int | None = Field(None, ge=1)
    """Also measure the most toxic of k answers, from at least as many samples per prompt. Default: not measured."""
    lens: bool = True
    """Bad-word probability layer by layer (logit lens), with `neutral_words` beside it."""
    neutral_words: str = "world:neutral_words.txt"
    """Harmless words to hold the lens against, one a line."""
    crows_pairs: str | None = None
    """CrowS-Pairs' CSV, to measure a preference for stereotypes. Default: not measured."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many prompts of each set of a file, and so many sentence pairs."""

    @model_validator(mode="after")
    def _what_each_choice_needs(self) -> "ToxicitySection":
        if not self.prompt_files:
            raise ValueError("prompts: name at least one file")
        if self.k is not None and self.k > self.samples_per_prompt:
            raise ValueError(f"k ({self.k}) may not pass samples_per_prompt ({self.samples_per_prompt})")
        if self.k is not None and self.classifier == "wordlist":
            raise ValueError("k needs a classifier that gives scores; the word list gives none")
        if self.classifier == "guard" and self.classifier_path is None:
            raise ValueError("classifier = guard needs classifier_path, the folder of the guard model")
        return self

    @property
    def prompt_files(self) -> list[str]:
        return [self.prompts] if isinstance(self.prompts, str) else self.prompts


class EvaluationSection(Section):
    suites: list[Suite] = ["general", "conversation", "toxicity"]
    """What every arm is measured on."""
    data: str | None = None
    """Folder with the field's test sets, one folder each (mmlu, mt_bench, xstest ...); `data:` in a path means it."""
    general: GeneralSection = GeneralSection()
    """General skill: multiple-choice and short-answer tasks through lm-eval."""
    conversation: ConversationSection = ConversationSection()
    """Multi-turn conversations with a judge."""
    toxicity: ToxicitySection = ToxicitySection()
    """Bad words, toxic answers, refusal and over-refusal."""
    max_new_tokens: int = Field(64, ge=1)
    """Cap on a sampled answer, in tokens."""
    temperature: float = Field(1.0, ge=0)
    """For sampled answers; 0 = greedy."""
    batch_size: int = Field(64, ge=1)
    """Items per forward; changes memory and speed, not results."""
    bootstrap_draws: int = Field(10_000, ge=100)
    """Resamples behind each interval."""
    min_coverage: float = Field(0.95, ge=0, le=1)
    """Share of items that must be scored before a headline is shown."""


class LoggingSection(Section):
    adapters: list[Adapter] = []
    """Where metrics go beside metrics.jsonl."""
    project: str = "direct-rlhf"
    """Project name that the adapters file this run under."""
    samples: int = Field(4, ge=0)
    """Rollouts written to samples.jsonl per iteration."""


class ParallelSection(Section):
    """Several processes (`direct-rlhf run RECIPE --nproc N`, or torchrun). Nothing here changes a result."""

    shard_size: int | None = Field(None, ge=1)
    """Processes that share one copy of a trained model's weights, gradients and optimiser states. 1: each holds all.
    Default: all processes share one."""
    shard_frozen: bool = True
    """Share the frozen models (reference, reward model) too; false: each process holds them whole. A LoRA trunk goes
    with its adapters."""
    reshard_after_forward: bool = True
    """Let go of a layer's gathered weights until its backward pass; false: keep them, for less communication."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the layer again in the backward pass; with one process too."""
    asynchronous_checkpoints: bool = False
    """Write checkpoints of several processes while training goes on; a copy of what is saved waits in CPU memory."""
    dead_after: float = Field(30.0, ge=2)
    """Seconds without a sign of life after which a process counts as dead or stopped, which ends the run."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds that a process waits for the others in one exchange, however alive they are."""
    grace: float = Field(120.0, ge=0)
    """Seconds that torchrun leaves the processes to save and stop, before it kills them (set by `--nproc`)."""

    @model_validator(mode="after")
    def _the_dead_are_found_first(self) -> "ParallelSection":
        if self.dead_after >= self.timeout:
            raise ValueError(
                f"dead_after ({self.dead_after:g}) must be below timeout ({self.timeout:g}), or no cause would be named"
            )
        return self


class MergeSearch(Section):
    """One way of merging, and the settings that are tried on the validation questions."""

    method: str = Field(min_length=1)
    """The merge method, as in a merge file."""
    settings: dict[str, Any] = {}
    """Its parameters that stay as they are, as in a merge file."""
    grid: dict[str, list[Any]] = {}
    """Parameters and the values that are tried; all combinations are."""


class ThreeHSection(Section):
    """The study of helpful, honest, harmless: is the balance better reached by mixing the data or by merging models?"""

    kinds: list[str] = Field(["helpful", "honest", "harmless"], min_length=2)
    """The H's: kinds of pairs, each with an expert, and categories of the questions."""
    paradigms: list[Literal["dpo", "direct_ppo"]] = Field(["dpo", "direct_ppo"], min_length=1)
    """How experts and mixtures are trained."""
    pairs: int | None = Field(None, ge=2)
    """Training pairs of each mixture, and of all experts together, which share them equally. Default: all there are."""
    mixtures: dict[str, Mixture] = {}
    """The data mixtures, by name; `pairs` and the kinds' reward models are filled in."""
    merges: dict[str, MergeSearch] = {}
    """The ways of merging, by name."""
    ablation: dict[str, MergeSearch] = {}
    """Variants of one of them, in a table of their own."""
    validation: str = "world:three_h_validation.jsonl"
    """Questions that choose the settings, in the shape of evaluation.conversation.questions, which are the test."""


class Recipe(Section):
    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        json_schema_extra={"must": "be 1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit"},
    )
    """Name of the run directory. Default: the name of the recipe file."""
    description: str = ""
    """A sentence on what the run is for; shown in the report."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Every random choice follows from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the first CUDA device where there is one, else the CPU."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch. Default: the cores this process may use."""
    arms: list[Arm] = ["base", "direct_ppo"]
    """Which models are made and compared. base is the model as it was loaded."""
    model: ModelSection = ModelSection()
    """The base model and how it is tuned."""
    dialogue: DialogueSection = DialogueSection()
    """How a conversation becomes text; the same everywhere."""
    data: DataSection = DataSection()
    """Where preferences, prompts and text come from."""
    reward: RewardSection = RewardSection()
    """Training and fitness of the reward model."""
    cost: RewardSection = RewardSection(kinds=["harmless"])
    """Training of the cost model that `ppo.lagrangian` needs: a reward model of its own on harmless pairs."""
    sft: SupervisedSection = SupervisedSection()
    """Supervised fine-tuning, for the arms sft and sft_ppo."""
    dpo: DpoSection = DpoSection()
    """Direct preference optimisation, for the arm dpo."""
    ppo: PpoSection = PpoSection()
    """PPO, for the arms direct_ppo and sft_ppo."""
    rollout: RolloutSection = RolloutSection()
    """Who samples PPO's answers: this package, or vLLM."""
    evaluation: EvaluationSection = EvaluationSection()
    """What every arm is measured on."""
    logging: LoggingSection = LoggingSection()
    """Where metrics and samples go."""
    three_h: ThreeHSection | None = None
    """A study of mixing against merging in place of the arms. Default: none."""
    parallel: ParallelSection = ParallelSection()
    """Several processes: how models lie in them, and when they give up on each other."""

    @model_serializer(mode="wrap")
    def _without_an_unused_rollout(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that says nothing of it has the text and the hash that it had before there was a choice."""
        found: dict[str, Any] = values(self)
        if self.rollout == RolloutSection():
            del found["rollout"]
        return found

    @model_validator(mode="after")
    def _arms_once(self) -> "Recipe":
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("arms: each arm may be named once")
        if "base" not in self.arms:
            raise ValueError("arms: base must be among them, it is what every arm is compared with")
        return self

    @model_validator(mode="after")
    def _no_four_bits_over_an_update(self) -> "Recipe":
        if self.model.quantise != "none" and "sft_ppo" in self.arms:
            raise ValueError(
                f"arms: sft_ppo starts from the SFT model, whose update model.quantise = {self.model.quantise} would "
                "round away; leave that arm out, or set model.quantise: none"
            )
        return self
