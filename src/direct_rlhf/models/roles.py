"""The PPO roles: policy, critic and reference, as separate models or as adapters on one frozen trunk.

full  three models (the reward model is a fourth, in `reward_model.py`): each its own weights.
lora  one frozen trunk: the policy and the critic are adapters, the reference is the trunk with its adapters off.

Legend: B sequences, L token slots.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from direct_rlhf.errors import CheckpointError
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import add_lora, autocast, load_for
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import ModelSection

POLICY, CRITIC = "policy", "critic"


@dataclass(frozen=True)
class Roles:
    """Policy, critic and reference behind one face; `train` never asks which tuning it has."""

    policy: Any  # transformers causal LM, or a PeftModel around one
    critic: ScalarModel
    reference: Any | None  # None: the policy with its adapters off
    device: str
    dtype: str

    @contextmanager
    def acting(self) -> Iterator[Any]:
        """The policy, ready to sample and to be trained."""
        with self._adapter(POLICY), autocast(self.device, self.dtype):
            yield self.policy

    @contextmanager
    def criticising(self) -> Iterator[ScalarModel]:
        """The critic, ready to value and to be trained."""
        with self._adapter(CRITIC), autocast(self.device, self.dtype):
            yield self.critic

    @torch.no_grad()
    def reference_logprobs(self, ids_BL: Tensor, mask_BL: Tensor, target_BL: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of the target tokens under the reference, float32 [B, L], 0 elsewhere."""
        with autocast(self.device, self.dtype):
            if self.reference is not None:
                return token_logprobs(self.reference, ids_BL, mask_BL, target_BL, temperature=temperature).logprob_BL
            with self.policy.disable_adapter():
                return token_logprobs(self.policy, ids_BL, mask_BL, target_BL, temperature=temperature).logprob_BL

    def policy_parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._named(POLICY)]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._named(CRITIC)]

    def state(self, role: str) -> dict[str, Tensor]:
        """The trained tensors of `policy` or `critic`, by name (copies that later steps do not change)."""
        return {name: parameter.detach().clone() for name, parameter in self._named(role)}

    def load_state(self, role: str, state: dict[str, Tensor]) -> None:
        named = dict(self._named(role))
        if named.keys() != state.keys():
            odd = sorted(named.keys() ^ state.keys())[:3]
            raise CheckpointError(
                f"the {role}'s checkpoint does not fit this model: tensors such as {odd} do not match"
            )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(state[name])

    def _named(self, role: str) -> list[tuple[str, nn.Parameter]]:
        if self.reference is not None:
            module = self.policy if role == POLICY else self.critic
            return list(module.named_parameters())
        adapter = [(n, p) for n, p in self.policy.named_parameters() if f".{role}." in n]
        head = [(f"head.{n}", p) for n, p in self.critic.head.named_parameters()] if role == CRITIC else []
        return adapter + head

    @contextmanager
    def _adapter(self, name: str) -> Iterator[None]:
        if self.reference is None:
            # set_adapter also moves requires_grad to the active adapter, so one role's graph never holds the other's
            self.policy.set_adapter(name)
        yield


def full_roles(section: ModelSection, init: str, critic: ScalarModel | None, *, device: str) -> Roles:
    """Policy (float32 master weights) and frozen reference from ``init``; the critic as given, or a zero head on it."""
    policy = load_for(section, init, dtype="float32", device=device)
    reference = load_for(section, init, dtype=section.dtype, device=device)
    if critic is None:
        critic = ScalarModel.zero(load_for(section, init, dtype="float32", device=device))
    return Roles(
        policy.requires_grad_(True), critic.requires_grad_(True), reference.requires_grad_(False), device, section.dtype
    )


def lora_roles(section: ModelSection, init: str, *, device: str, seed: int) -> Roles:
    """One frozen trunk from ``init`` with a fresh adapter for the policy and one, under a zero head, for the critic."""
    policy = add_lora(load_for(section, init, dtype=section.dtype, device=device), section.lora, POLICY, seed=seed)
    policy = add_lora(policy, section.lora, CRITIC, seed=seed + 1)
    return Roles(policy, ScalarModel.zero(policy), None, device, section.dtype)


def critic_from_adapter(roles: Roles, adapter: str, head: nn.Linear, mean: float, std: float) -> None:
    """Start a LoRA critic from a reward model on the same trunk: its adapter, its head in normalised units."""
    critic = {name: parameter for name, parameter in roles.policy.named_parameters() if f".{CRITIC}." in name}
    with torch.no_grad():
        for name, parameter in roles.policy.named_parameters():
            if f".{adapter}." in name:
                critic[name.replace(f".{adapter}.", f".{CRITIC}.")].copy_(parameter)
        roles.critic.head.weight.copy_(head.weight / std)
        roles.critic.head.bias.fill_(-mean / std)
