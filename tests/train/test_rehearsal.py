"""What would fail at full length fails before the first step, in words, and changes nothing (R5)."""

from copy import deepcopy

import pytest
import torch

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Prompt, Turn
from direct_rlhf.errors import BackendError, DivergenceError, Interrupted, OutOfMemoryError
from direct_rlhf.models import forward as forward_module
from direct_rlhf.models.reward_model import RewardModel
from direct_rlhf.models.roles import COST_CRITIC, CRITIC, POLICY
from direct_rlhf.run.packing import pack
from direct_rlhf.train import update as update_module
from direct_rlhf.train.experience import Judges
from direct_rlhf.train.rehearsal import rehearse
from direct_rlhf.train.reward_sources import CallableReward, ModelRewardSource
from direct_rlhf.train.update import TextWindows
from toys import toy_folder
from train.ppo_parts import (
    CAP,
    LONGEST_SAMPLED,
    SETTINGS,
    Memory,
    everything,
    learner_of,
    roles_of,
    section_of,
    unequal,
    write_reward_model,
)

LONGEST = 11  # prompt tokens
FULL = LONGEST + CAP


def never(items):
    raise AssertionError("the user's reward was called")


USERS_OWN = Judges(CallableReward(never, "reward my:own"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(toy_folder(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def reward_model(base, tmp_path_factory):
    return RewardModel.load(write_reward_model(tmp_path_factory.mktemp("reward") / "model", base))


@pytest.fixture(scope="module")
def tokens(base):
    return load_tokens(base)


def prompts(*lengths):
    """Prompts of so many tokens."""
    turns = (Turn("human", "?"),)
    return [
        (Prompt(f"p{i}", turns, "helpful", "x:1"), [1, *(40 + j % 200 for j in range(n - 1))])
        for i, n in enumerate(lengths)
    ]


PROMPTS = prompts(4, LONGEST, 7)


def rehearsal(learner, tokens, judges=USERS_OWN, given=PROMPTS, check_stop=lambda: None):
    rehearse(learner, judges, given, tokens, SETTINGS, check_stop)


def state(learner):
    """Everything of a learner that a step would change."""
    packed = {role: pack(optimiser.state()) for role, optimiser in learner.optimisers.items()}
    tensors = {f"{role}/{name}": t.clone() for role, (named, _) in packed.items() for name, t in named.items()}
    return everything(learner.roles) | tensors, {role: plain for role, (_, plain) in packed.items()}


def assert_untouched(learner, before):
    now = state(learner)
    assert unequal(now[0], before[0]) == []
    assert now[1] == before[1]
    modules = [learner.roles.policy, learner.roles.critic, learner.roles.reference, learner.roles.cost_critic]
    assert all(p.grad is None for module in filter(None, modules) for p in module.parameters())


def stepped(learner):
    """The learner after one step of each role, so that there are moments to be changed."""
    for role, optimiser in learner.optimisers.items():
        for parameter in learner.roles.parameters(role):
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimiser.step(1.0, where="")
    return learner


def fails_at_full_length(module, error=RuntimeError):
    """The trunk ``module`` fails from ``FULL`` slots on: its rotary module is what every path tells the positions."""

    def look(_, args, options):
        positions = options["position_ids"] if "position_ids" in options else args[1]
        if int(positions.max()) + 1 >= FULL:
            raise error("no room for this position")

    module.rotary_emb.register_forward_pre_hook(look, with_kwargs=True)


def watch_states(monkeypatch, look):
    """``look(model, ids_BL, mask_BL)`` before every forward pass of any role."""

    inner = forward_module._states

    def watched(model, ids_BL, mask_BL):
        look(model, ids_BL, mask_BL)
        return inner(model, ids_BL, mask_BL)

    monkeypatch.setattr(forward_module, "_states", watched)


@pytest.mark.promise("R5")
@pytest.mark.parametrize("role", [POLICY, CRITIC, COST_CRITIC, "reference", "reward model"])
@pytest.mark.parametrize("error", [RuntimeError, IndexError, ValueError])
def test_a_model_that_fails_at_full_length_is_found_at_the_start_with_both_lengths(
    base, tokens, reward_model, role, error
):
    roles, reward = roles_of(base, with_cost=True), deepcopy(reward_model)
    judges = Judges(ModelRewardSource(reward, "reward model x", 0.0), USERS_OWN.reward)
    trunks = {
        POLICY: roles.policy.model,
        CRITIC: roles.critic.trunk,
        COST_CRITIC: roles.cost_critic.trunk,
        "reference": roles.reference.model,
        "reward model": reward.scalar.trunk,
    }
    learner = stepped(learner_of(roles, section_of()))
    before = state(learner)
    fails_at_full_length(trunks[role], error)
    words = rf"^the {role} fails on the longest batch, {LONGEST} prompt and {CAP} answer tokens \(no room for this"
    with pytest.raises(BackendError, match=words) as caught:
        rehearsal(learner, tokens, judges)
    assert "Nothing was trained. Lower data.max_prompt_tokens or ppo.sampling.max_new_tokens." in str(caught.value)
    assert isinstance(caught.value.__cause__, error)
    assert_untouched(learner, before)


@pytest.mark.promise("R5")
def test_a_cost_model_that_fails_at_full_length_is_found_as_well(base, tokens, reward_model):
    roles, cost = roles_of(base, with_cost=True), deepcopy(reward_model)
    fails_at_full_length(cost.scalar.trunk)
    judges = Judges(USERS_OWN.reward, ModelRewardSource(cost, "cost model x", 0.0))
    with pytest.raises(BackendError, match=r"^the reward model fails on the longest batch"):
        rehearsal(learner_of(roles, section_of()), tokens, judges)


@pytest.mark.promise("R5")
def test_a_model_with_too_few_positions_is_found_at_the_start(tmp_path):
    """No hook here: the position table of a real architecture is too short."""
    base = str(toy_folder(tmp_path / "gpt2", "gpt2"))
    learner = learner_of(roles_of(base), section_of(minibatch_size=1))
    before = state(learner)
    rehearsal(learner, load_tokens(base), given=prompts(1024 - CAP))
    with pytest.raises(
        BackendError, match=rf"^the policy fails on the longest batch, {1025 - CAP} prompt and {CAP} answer"
    ):
        rehearsal(learner, load_tokens(base), given=prompts(3, 1025 - CAP))
    assert_untouched(learner, before)


@pytest.mark.promise("R5")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_rehearsal_changes_no_weight_no_moment_and_leaves_no_gradient(base, tokens, reward_model, tuning):
    learner = stepped(learner_of(roles_of(base, tuning, with_cost=True), section_of()))
    before, size = state(learner), learner.chunk.size
    source = ModelRewardSource(reward_model, "reward model x", 0.0)
    rehearsal(learner, tokens, Judges(source, source))
    assert_untouched(learner, before)
    assert learner.chunk.size == size


@pytest.mark.promise("R5")
def test_every_role_sees_the_longest_prompt_with_a_full_length_answer(base, tokens, reward_model, monkeypatch):
    roles, seen, reward = roles_of(base, with_cost=True), {}, deepcopy(reward_model)
    items = []
    names = {id(roles.policy): "policy", id(roles.critic.trunk): "critic", id(roles.cost_critic.trunk): "cost"}
    names[id(roles.reference)] = "reference"

    def look(model, ids_BL, mask_BL):
        if model is not reward.scalar.trunk:  # what it reads are `items`
            assert mask_BL.all()
            seen.setdefault(names[id(model)], []).append(tuple(ids_BL.shape))

    watch_states(monkeypatch, look)

    class Watched(ModelRewardSource):
        def score(self, answers):
            items.extend(answers)
            return super().score(answers)

    rehearsal(learner_of(roles, section_of()), tokens, Judges(Watched(reward, "x", 0.0), Watched(reward, "y", 0.0)))
    assert seen == {name: [(4, FULL)] for name in ("policy", "critic", "cost", "reference")}
    assert len(items) == 8  # four of the reward, four of the cost
    assert {(item.prompt_id, item.finished, len(tokens.encode(item.text))) for item in items} == {("p1", False, CAP)}


@pytest.mark.promise("R5")
def test_rewards_of_the_users_own_code_are_not_called(base, tokens):
    judges = Judges(CallableReward(never, "reward my:own"), CallableReward(never, "cost my:own"))
    rehearsal(learner_of(roles_of(base, with_cost=True), section_of()), tokens, judges)


@pytest.mark.promise("R5")
def test_pretraining_text_is_tried_as_well(base, tokens, monkeypatch):
    text = TextWindows([[1, *range(40, 70)]] * 3, weight=0.5, batch_size=3)
    roles, lengths = roles_of(base), []
    learner = learner_of(roles, section_of(micro_batch_tokens=3 * 31), text=text)
    watch_states(
        monkeypatch, lambda model, ids_BL, _: lengths.extend([ids_BL.shape[1]] if model is roles.policy else [])
    )
    rehearsal(learner, tokens)
    assert lengths == [FULL, 31]


@pytest.mark.promise("R3")
@pytest.mark.promise("R5")
def test_where_memory_runs_out_the_rehearsal_finds_the_micro_batch_that_fits(base, tokens, monkeypatch):
    learner = learner_of(roles_of(base), section_of())
    before = state(learner)
    memory = Memory(update_module.token_logprobs, 1)
    monkeypatch.setattr(update_module, "token_logprobs", memory)
    rehearsal(learner, tokens)
    assert memory.raised == [4, 2]
    assert learner.chunk.size == LONGEST_SAMPLED
    assert_untouched(learner, before)


@pytest.mark.promise("R3")
def test_one_answer_that_does_not_fit_ends_the_run_as_out_of_memory(base, tokens, monkeypatch):
    monkeypatch.setattr(update_module, "token_logprobs", Memory(update_module.token_logprobs, 0))
    with pytest.raises(OutOfMemoryError, match="update: out of memory even with a chunk of 1") as caught:
        rehearsal(learner_of(roles_of(base), section_of()), tokens)
    assert caught.value.exit_code == 4


@pytest.mark.promise("S1")
def test_a_stop_and_our_own_errors_pass_through_as_they_are(base, tokens, reward_model):
    class NotANumber:
        def score(self, items):
            return torch.full((len(items),), float("nan"))

    def check_stop():
        raise Interrupted("stopped on request")

    learner = learner_of(roles_of(base), section_of())
    with pytest.raises(Interrupted):
        rehearsal(learner, tokens, check_stop=check_stop)
    with pytest.raises(DivergenceError, match="reward model x: reward nan for prompt p1"):
        rehearsal(learner, tokens, Judges(ModelRewardSource(NotANumber(), "reward model x", 0.0)))
