"""The PPO roles: policy, critic and reference, as separate models or as adapters on one frozen trunk.

full  three models (the reward model is a fourth, in `reward_model.py`): each its own weights.
lora  one frozen trunk: the policy and the critic are adapters, the reference is the trunk with its adapters off.

Legend: B sequences, L token slots.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from direct_rlhf.errors import CheckpointError, ConfigError
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import add_lora, autocast, load_for
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import ModelSection

POLICY, CRITIC, COST_CRITIC = "policy", "critic", "cost_critic"


class Place(Protocol):
    """Where models lie: loaded on ``loads_on``, then put in place (over several processes, where there are)."""

    @property
    def loads_on(self) -> str: ...
    def trained(self, module: Any) -> Any: ...
    def frozen(self, module: Any) -> Any: ...


@dataclass(frozen=True)
class OneDevice:
    """The place of one process: whole models on its device."""

    loads_on: str

    def trained(self, module: Any) -> Any:
        return module

    def frozen(self, module: Any) -> Any:
        return module


@dataclass(frozen=True)
class Roles:
    """Policy, critic and reference behind one face; `train` never asks which tuning it has."""

    policy: Any  # transformers causal LM, or a PeftModel around one
    critic: ScalarModel
    reference: Any | None  # None: the policy with its adapters off
    device: str
    dtype: str
    cost_critic: ScalarModel | None = None  # with PPO-Lagrangian

    @property
    def trained(self) -> tuple[str, ...]:
        """The roles whose parameters move."""
        return (POLICY, CRITIC) if self.cost_critic is None else (POLICY, CRITIC, COST_CRITIC)

    @contextmanager
    def acting(self) -> Iterator[Any]:
        """The policy, ready to sample and to be trained."""
        with self._adapter(POLICY), autocast(self.device, self.dtype):
            yield self.policy

    @contextmanager
    def criticising(self, role: str = CRITIC) -> Iterator[ScalarModel]:
        """A critic, ready to value and to be trained."""
        with self._adapter(role), autocast(self.device, self.dtype):
            yield self._critic(role)

    @torch.no_grad()
    def reference_logprobs(self, ids_BL: Tensor, mask_BL: Tensor, target_BL: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of the target tokens under the reference, float32 [B, L], 0 elsewhere."""
        with autocast(self.device, self.dtype):
            if self.reference is not None:
                return token_logprobs(self.reference, ids_BL, mask_BL, target_BL, temperature=temperature).logprob_BL
            with self.policy.disable_adapter():
                return token_logprobs(self.policy, ids_BL, mask_BL, target_BL, temperature=temperature).logprob_BL

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trained parameters of one of `trained`."""
        return [parameter for _, parameter in self._named(role)]

    def state(self, role: str) -> dict[str, Tensor]:
        """The trained tensors of one of `trained`, by name (copies that later steps do not change)."""
        return {name: parameter.detach().clone() for name, parameter in self._named(role)}

    def named(self, role: str) -> dict[str, nn.Parameter]:
        """The trained parameters of one of `trained`, by the names that `state` gives them."""
        return dict(self._named(role))

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
            module = self.policy if role == POLICY else self._critic(role)
            return list(module.named_parameters())
        adapter = [(n, p) for n, p in self.policy.named_parameters() if f".{role}." in n]
        head = [] if role == POLICY else [(f"head.{n}", p) for n, p in self._critic(role).head.named_parameters()]
        return adapter + head

    def _critic(self, role: str) -> ScalarModel:
        critic = self.critic if role == CRITIC else self.cost_critic
        assert critic is not None, role
        return critic

    @contextmanager
    def _adapter(self, name: str) -> Iterator[None]:
        if self.reference is None:
            # set_adapter also moves requires_grad to the active adapter, so one role's graph never holds the other's
            self.policy.set_adapter(name)
        yield


def full_roles(
    section: ModelSection,
    init: str,
    critic: ScalarModel | None,
    *,
    device: str,
    cost_critic: ScalarModel | None = None,
    with_cost: bool = False,
    place: Place | None = None,
) -> Roles:
    """Policy (float32 master weights) and frozen reference from ``init``; critics as given, or a zero head on it."""
    place = place or OneDevice(device)
    where = place.loads_on
    policy = place.trained(load_for(section, init, dtype="float32", device=where).requires_grad_(True))
    reference = place.frozen(load_for(section, init, dtype=section.dtype, device=where).requires_grad_(False))

    def ready(given: ScalarModel | None) -> ScalarModel:
        if given is not None:
            return given.requires_grad_(True)
        fresh = ScalarModel.zero(load_for(section, init, dtype="float32", device=where)).requires_grad_(True)
        return place.trained(fresh)

    return Roles(
        policy,
        ready(critic),
        reference,
        device,
        section.dtype,
        ready(cost_critic) if with_cost else None,
    )


def lora_roles(section: ModelSection, init: str, *, device: str, seed: int, with_cost: bool = False) -> Roles:
    """One frozen trunk from ``init`` with fresh adapters: the policy's and, under a zero head, one for each critic."""
    policy = add_lora(load_for(section, init, dtype=section.dtype, device=device), section.lora, POLICY, seed=seed)
    policy = add_lora(policy, section.lora, CRITIC, seed=seed + 1)
    if with_cost:
        policy = add_lora(policy, section.lora, COST_CRITIC, seed=seed + 2)
    cost_critic = ScalarModel.zero(policy) if with_cost else None
    return Roles(policy, ScalarModel.zero(policy), None, device, section.dtype, cost_critic)


def put_in_place(roles: Roles, place: Place) -> None:
    """LoRA's shared trunk, and then the critics' heads, once every adapter is on it."""
    place.trained(roles.policy)
    for critic in (roles.critic, roles.cost_critic):
        if critic is not None:
            place.trained(critic.head)


def critic_from_adapter(roles: Roles, role: str, adapter: str, head: nn.Linear, mean: float, std: float) -> None:
    """Start a LoRA critic from a reward model on the same trunk: its adapter, its head in normalised units.

    Errors: ConfigError for an adapter of another rank or scale, or on modules where the critic has none.
    """
    named = dict(roles.policy.named_parameters())
    places = {name: name.replace(f".{adapter}.", f".{role}.") for name in named if f".{adapter}." in name}
    there, here = (roles.policy.peft_config[name] for name in (adapter, role))
    odd = [
        f"{field} is {getattr(there, field):g} there, {getattr(here, field):g} here"
        for field in ("r", "lora_alpha")
        if getattr(there, field) != getattr(here, field)
    ]
    odd += [f"{name} has no counterpart here" for name in places if places[name] not in named][:1]
    if odd:
        raise ConfigError(
            f"the {role} cannot start from the reward model's adapter: {'; '.join(odd)}. Use the model.lora that the "
            "reward model was trained with, or set ppo.critic.init=zero."
        )
    scalar = roles.critic if role == CRITIC else roles.cost_critic
    assert scalar is not None, role
    with torch.no_grad():
        for name, place in places.items():
            named[place].copy_(named[name])
        scalar.head.weight.copy_(head.weight / std)
        scalar.head.bias.fill_(-mean / std)
