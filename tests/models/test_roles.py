"""Who trains what among the PPO roles, and the critic that continues a reward model."""

from dataclasses import replace

import pytest
import torch

from direct_rlhf.data.types import Turn
from direct_rlhf.errors import CheckpointError, ConfigError
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.reward_model import RewardModel
from direct_rlhf.models.roles import COST_CRITIC, CRITIC, POLICY, critic_from_adapter
from direct_rlhf.recipe.schema import LoraSection
from toys import toy_folder
from train.ppo_parts import roles_of, write_reward_model

ROLES = (POLICY, CRITIC, COST_CRITIC)
ITEMS = [
    ((Turn("human", "One?"),), "Good.", True),
    ((Turn("human", "One?"), Turn("assistant", "Two."), Turn("human", "Three?")), "Bad bad bad.", True),
    ((Turn("human", "One?"),), "Good.", False),
    ((Turn("human", "One?"),), "", True),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(toy_folder(tmp_path_factory.mktemp("base")))


@pytest.fixture(params=["full", "lora"])
def roles(request, base):
    return roles_of(base, request.param, with_cost=True)


def a_batch():
    ids_BL = torch.randint(3, 259, (3, 7), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones(3, 7, dtype=torch.bool)
    mask_BL[0, :2] = False
    target_BL = mask_BL.clone()
    target_BL[:, :4] = False
    return ids_BL, mask_BL, target_BL


def backward(roles, role):
    """One gradient of a role, as its update takes it."""
    ids_BL, mask_BL, target_BL = a_batch()
    if role == POLICY:
        with roles.acting() as policy:
            token_logprobs(policy, ids_BL, mask_BL, target_BL).logprob_BL.sum().backward()
    else:
        with roles.criticising(role) as critic:
            critic.values(ids_BL, mask_BL).square().sum().backward()


def with_gradient(roles):
    """The roles' parameters, and all others in sight, that hold a gradient."""
    modules = [roles.policy, roles.critic, roles.cost_critic, roles.reference]
    return {id(p) for module in modules if module is not None for p in module.parameters() if p.grad is not None}


def test_the_three_trained_roles_share_no_parameter_and_no_memory(roles):
    assert roles.trained == ROLES
    owned = {role: roles.parameters(role) for role in ROLES}
    ids = [id(parameter) for role in ROLES for parameter in owned[role]]
    places = [parameter.data_ptr() for role in ROLES for parameter in owned[role]]
    assert all(owned.values())
    assert len(set(ids)) == len(ids)
    assert len(set(places)) == len(places)
    if roles.reference is not None:
        assert not set(ids) & set(map(id, roles.reference.parameters()))


@pytest.mark.parametrize("role", ROLES)
def test_a_roles_gradient_reaches_its_own_parameters_and_no_others(roles, role):
    for other in ROLES:  # in turn, as an update goes through them
        backward(roles, other)
    for module in (roles.policy, roles.critic, roles.cost_critic):
        module.zero_grad(set_to_none=True)
    backward(roles, role)
    assert with_gradient(roles) <= set(map(id, roles.parameters(role)))
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in roles.parameters(role))


def test_without_a_cost_there_is_no_cost_critic(base):
    for tuning in ("full", "lora"):
        roles = roles_of(base, tuning)
        assert roles.trained == (POLICY, CRITIC)
        assert roles.cost_critic is None
        with pytest.raises(AssertionError, match="cost_critic"):
            roles.parameters(COST_CRITIC)


def test_a_cost_critic_changes_neither_policy_nor_critic(base):
    for tuning in ("full", "lora"):
        plain, priced = roles_of(base, tuning), roles_of(base, tuning, with_cost=True)
        for role in (POLICY, CRITIC):
            ours, theirs = plain.state(role), priced.state(role)
            if role == CRITIC:  # the fixture draws the heads' weights
                ours, theirs = ({n: t for n, t in state.items() if "head" not in n} for state in (ours, theirs))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_state_is_a_copy_and_brings_every_role_back(roles):
    before = {role: roles.state(role) for role in ROLES}
    with torch.no_grad():
        for role in ROLES:
            for parameter in roles.parameters(role):
                parameter.add_(1.0)
    for role in ROLES:
        assert not any(torch.equal(before[role][name], tensor) for name, tensor in roles.state(role).items())
        roles.load_state(role, before[role])
        assert all(torch.equal(before[role][name], tensor) for name, tensor in roles.state(role).items())


@pytest.mark.parametrize("role", ROLES)
def test_a_state_of_another_model_is_refused_with_the_tensors_that_differ(roles, role):
    state = roles.state(role)
    missing = sorted(state)[0]
    kept = {name: tensor + 1 for name, tensor in state.items() if name != missing}
    with pytest.raises(CheckpointError, match=rf"^the {role}'s checkpoint does not fit this model: .*'{missing}'"):
        roles.load_state(role, kept)
    assert all(torch.equal(state[name], tensor) for name, tensor in roles.state(role).items())


def lora_roles_with_reward_model(base, folder, lora=None):
    write_reward_model(folder, base, "lora", lora=lora)
    roles = roles_of(base, "lora", with_cost=True)
    model = RewardModel.load(folder, trunk=roles.policy, adapter="cost")
    return roles, model


def last_values(roles, role, model):
    """What a critic says at the last token of each item."""
    values = []
    for item in ITEMS:
        ids_BL = torch.tensor([model.encode(item)])
        with roles.criticising(role) as critic, torch.no_grad():
            values.append(critic.values(ids_BL, torch.ones_like(ids_BL).bool())[0, -1])
    return torch.stack(values)


@pytest.mark.parametrize(("role", "sign"), [(CRITIC, 1.0), (COST_CRITIC, -1.0)])
def test_a_critic_from_an_adapter_says_the_normalised_score_and_of_a_cost_its_negative(base, tmp_path, role, sign):
    roles, model = lora_roles_with_reward_model(base, tmp_path / "cost_model")
    facts, other = model.normalisation, COST_CRITIC if role == CRITIC else CRITIC
    untouched = roles.state(other) | roles.state(POLICY)
    critic_from_adapter(roles, role, model.adapter, model.scalar.head, facts.mean, sign * facts.std)
    scores = model.score(ITEMS)
    assert scores.std() > 0.1  # the scores say something
    torch.testing.assert_close(last_values(roles, role, model), sign * scores, atol=1e-5, rtol=0)
    after = roles.state(other) | roles.state(POLICY)
    assert all(torch.equal(untouched[name], tensor) for name, tensor in after.items())


def test_a_full_cost_critic_is_the_negative_of_its_reward_model_as_well(base, tmp_path):
    write_reward_model(tmp_path / "cost_model", base)
    model = RewardModel.load(tmp_path / "cost_model")
    facts = model.normalisation
    roles = roles_of(base)
    cost_critic = model.scalar.as_critic(facts.mean, -facts.std)
    torch.testing.assert_close(
        last_values(replace(roles, cost_critic=cost_critic), COST_CRITIC, model), -model.score(ITEMS), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoraSection(rank=4, alpha=64), "lora_alpha is 64 there, 32 here"),
        (LoraSection(rank=2), "r is 2 there, 4 here"),
        (LoraSection(rank=4, target_modules=["q_proj", "lm_head"]), "lm_head.lora_A.cost.weight has no counterpart"),
    ],
)
def test_an_adapter_of_another_scale_or_place_is_refused_in_words(base, tmp_path, lora, words):
    roles, model = lora_roles_with_reward_model(base, tmp_path / "cost_model", lora)
    facts = model.normalisation
    with pytest.raises(ConfigError, match=words) as caught:
        critic_from_adapter(roles, CRITIC, model.adapter, model.scalar.head, facts.mean, facts.std)
    assert str(caught.value).startswith("the critic cannot start from the reward model's adapter: ")
    assert str(caught.value).endswith("was trained with, or set ppo.critic.init=zero.")


def test_an_adapter_on_fewer_modules_is_continued_all_the_same(base, tmp_path):
    lora = LoraSection(rank=4, target_modules=["q_proj"])
    roles, model = lora_roles_with_reward_model(base, tmp_path / "cost_model", lora)
    facts = model.normalisation
    critic_from_adapter(roles, CRITIC, model.adapter, model.scalar.head, facts.mean, facts.std)
    torch.testing.assert_close(last_values(roles, CRITIC, model), model.score(ITEMS), atol=1e-5, rtol=0)
