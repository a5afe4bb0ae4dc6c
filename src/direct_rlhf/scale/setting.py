"""A recipe on a model's shape and a number of GPUs, as the numbers that memory, traffic and time are made of."""

from dataclasses import dataclass

from direct_rlhf.models.sizes import DTYPE_BYTES
from direct_rlhf.recipe.schema import HttpReward, PythonReward, Recipe
from direct_rlhf.scale.shapes import Shape

# As in the stages: models/batches.py, which needs torch
PAIR_SLOTS = 1024  # of a forward and backward on pairs
SCORE_FACTOR = 4  # forwards without a backward take so many times the slots
STAGES = ("reward", "cost", "sft", "dpo")


@dataclass(frozen=True)
class Setting:
    """``gpus`` processes, one a GPU, ``per_node`` of them on a machine. Every row is as long as the recipe allows."""

    recipe: Recipe
    shape: Shape
    gpus: int = 1
    per_node: int = 8

    @property
    def shard(self) -> int:
        """Processes that share one copy of a trained model."""
        return min(self.recipe.parallel.shard_size or self.gpus, self.gpus)

    @property
    def copies(self) -> int:
        return self.gpus // self.shard

    @property
    def lora(self) -> bool:
        return self.recipe.model.tuning == "lora"

    @property
    def four_bits(self) -> bool:
        return self.recipe.model.quantise != "none"

    @property
    def computed(self) -> int:
        """Bytes of a number in matrix products."""
        return DTYPE_BYTES[self.recipe.model.dtype]

    @property
    def residual(self) -> int:
        """Bytes of a number in the residual stream: float32 where one process trains float32 weights under autocast."""
        return self.computed if self.lora or self.gpus > 1 else 4

    @property
    def critics(self) -> list[str]:
        return ["critic", "cost critic"][: 1 + self.recipe.ppo.lagrangian.enabled]

    @property
    def judges(self) -> list[str]:
        """The models that rate answers; functions and servers are none."""
        ppo = self.recipe.ppo
        sources = {"reward model": ppo.reward} | ({"cost model": ppo.lagrangian.cost} if ppo.lagrangian.enabled else {})
        return [name for name, source in sources.items() if not isinstance(source, PythonReward | HttpReward)]

    # Rows and tokens of one process

    @property
    def prompt(self) -> int:
        return self.recipe.data.max_prompt_tokens

    @property
    def answer(self) -> int:
        return self.recipe.ppo.sampling.max_new_tokens

    @property
    def length(self) -> int:
        return self.prompt + self.answer

    @property
    def pair_length(self) -> int:
        return self.prompt + self.recipe.data.max_answer_tokens

    def share(self, rows: int) -> int:
        """Of so many rows, those of the process that has most."""
        return -(-rows // self.gpus)

    def sampled(self, rows: int) -> int:
        """Of so many answers those that the process with most samples: prompts are not split."""
        each = self.recipe.ppo.samples_per_prompt
        return self.share(rows // each) * each

    @property
    def micro_rows(self) -> int:
        """Answers of one forward and backward."""
        ppo = self.recipe.ppo
        return min(max(ppo.micro_batch_tokens // self.length, 1), self.share(ppo.minibatch_size))

    @property
    def passes(self) -> int:
        """Forwards and backwards of one optimiser step."""
        return -(-self.share(self.recipe.ppo.minibatch_size) // self.micro_rows)

    def pairs_at_once(self, stage: str) -> int:
        """Pairs of one forward and backward."""
        at_once = max(PAIR_SLOTS // 2 // self.pair_length, 1)
        return min(at_once, self.share(getattr(self.recipe, stage).batch_size))
