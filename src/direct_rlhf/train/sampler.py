"""PPO's samples from vLLM: the policy's weights go there, answers come back, and the trainer recomputes them.

    sync the weights -> sample -> the trainer's own log-probabilities -> are the two close enough?

A rollout is of one policy version or is none: weights are loaded before it begins and nothing loads others until it is
whole. The first process writes and loads the weights for all; each asks for its share of the answers.
"""

import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from direct_rlhf.data.tokens import Tokens
from direct_rlhf.errors import DivergenceError
from direct_rlhf.maths.mismatch import correction
from direct_rlhf.models.forward import causal_lm, token_logprobs
from direct_rlhf.models.loading import save_weights
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import POLICY, Roles
from direct_rlhf.models.sharded import gathered, whole_on_cpu
from direct_rlhf.recipe.schema import CorrectionSection
from direct_rlhf.rollout import vllm
from direct_rlhf.rollout.types import Rollout, SampleKey, SamplingSettings
from direct_rlhf.rollout.vllm_colocated import Colocated
from direct_rlhf.rollout.vllm_server import Server
from direct_rlhf.run.atomic import full_disk_explained
from direct_rlhf.run.context import StageContext
from direct_rlhf.train.experience import Batch, over_actions
from direct_rlhf.train.prompts import sampled_together


@dataclass
class VllmSampler:
    """An engine, and which weights it was given."""

    ctx: StageContext
    engine: vllm.Engine
    tokens: Tokens
    roles: Roles
    folder: Path  # of the weights that go to it, one folder below for each version
    chunk: ChunkSize  # for the trainer's log-probabilities
    written: tuple[int, str] = field(default=(-1, ""))  # policy version, and the name of its folder
    loaded: str = ""  # what the engine holds

    @classmethod
    def start(
        cls, ctx: StageContext, tokens: Tokens, roles: Roles, init: str, longest: int, chunk: ChunkSize
    ) -> "VllmSampler":
        """The engine of the recipe, reached or started; ``longest`` is the most tokens of a prompt and its answer.

        Errors: BackendError, ConfigError.
        """
        section = ctx.recipe.rollout.vllm
        engine: vllm.Engine
        if section.mode == "server":
            engine = server = Server(section)
            ctx.world.together(lambda: server.connect(longest, ctx.should_stop))
        else:
            engine = Colocated(section, ctx.recipe.model, init, longest)
        folder = ctx.run.path / "weights"
        if section.weights is not None:
            folder = Path(section.weights).expanduser().absolute() / f"direct-rlhf-{ctx.run.manifest['id']}"
        return cls(ctx, engine, tokens, roles, folder.absolute(), chunk)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        settings: SamplingSettings,
        *,
        policy_version: int,
        each: int,
    ) -> Rollout:
        """One answer to each prompt, whose log-probabilities are the trainer's; the engine's stand beside them.

        Errors: those of the engine; DivergenceError where the two are too far apart.
        """
        self._sync(policy_version)
        vocabulary = int(causal_lm(self.roles.policy).config.vocab_size)

        def draw(rows: list[int]) -> Rollout:
            return vllm.sample(
                self.engine,
                self.tokens,
                [prompts[row] for row in rows],
                [keys[row] for row in rows],
                settings,
                version=self.loaded,
                vocabulary=vocabulary,
                policy_version=policy_version,
                should_stop=self.ctx.should_stop,
            )

        rollout = sampled_together(self.ctx.world, len(prompts), draw, each=each)
        if not self.engine.rest():
            self.loaded = ""
        rollout = replace(
            rollout, logprob_BT=self._recomputed(rollout, settings), sampler_logprob_BT=rollout.logprob_BT
        )
        check_mismatch(rollout, self.ctx.recipe.rollout.correction, f"policy version {policy_version}")
        return rollout

    def close(self) -> None:
        self.engine.close()
        self.ctx.world.main(lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _sync(self, policy_version: int) -> None:
        """The engine holds the policy's weights, all of them and no others."""
        if self.written[0] != policy_version:
            name = f"version_{policy_version:06d}_{secrets.token_hex(4)}"  # never a folder that was read before
            with whole_on_cpu(self.roles.policy, keep=self.ctx.world.is_main):
                name = self.ctx.world.main(lambda: self._write(name))
            self.written, self.loaded = (policy_version, name), ""
        if self.loaded != self.written[1]:
            name = self.written[1]
            self.ctx.world.main(lambda: self.engine.load(self.folder / name, name, self.ctx.should_stop))
            self.loaded = name

    def _write(self, name: str) -> str:
        if self.folder.is_dir():
            shutil.rmtree(self.folder)  # of the version before, or of an attempt that was broken off
        with full_disk_explained(self.folder):
            save_weights(self.roles.policy, self.folder / name, dtype=self.ctx.recipe.model.dtype, adapter=POLICY)
        return name

    def _recomputed(self, rollout: Rollout, settings: SamplingSettings) -> Tensor:
        """The policy's log-probabilities of its own answers, as the update computes them: [B, T]."""
        with self.roles.acting() as policy, gathered(policy):
            return over_actions(
                rollout,
                lambda batch: _logprobs(policy, batch, settings.temperature),
                "policy's log-probability",
                self.roles.device,
                self.chunk,
                self.ctx.check_stop,
                self.ctx.world,
            )


def check_mismatch(rollout: Rollout, section: CorrectionSection, where: str) -> None:
    """DivergenceError where KL(sampler || trainer) is beyond what rounding explains."""
    assert rollout.sampler_logprob_BT is not None
    found = correction(rollout.logprob_BT, rollout.sampler_logprob_BT, rollout.action_mask_BT, limit=section.truncate)
    if not float(found.kl) <= section.stop_above:
        raise DivergenceError(
            f"vLLM's samples are {float(found.kl):.3g} nats per token from what the trainer computes for them "
            f"({where}), over rollout.correction.stop_above = {section.stop_above:g}. Nothing was trained on them. "
            "Usual causes: stale weights (was the server started again?), another model or type, or, with a "
            "temperature, no --logprobs-mode processed_logprobs. Start it as the how-to on vLLM says, and --resume."
        )


def _logprobs(policy: Any, batch: Batch, temperature: float) -> Tensor:
    found = token_logprobs(policy, batch.ids_BL, batch.mask_BL, batch.action_BL, temperature=temperature)
    return found.logprob_BL[:, batch.prompt_slots :]
