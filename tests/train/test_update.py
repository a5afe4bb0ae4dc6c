"""PPO's update: what may not change its gradient, what stops it, and where it goes on after a stop."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_rlhf.errors import DivergenceError, Interrupted, OutOfMemoryError
from direct_rlhf.maths.mismatch import Correction
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import COST_CRITIC, CRITIC, POLICY
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.rollout import native
from direct_rlhf.run.packing import pack, unpack
from direct_rlhf.train import update as update_module
from direct_rlhf.train.update import Position, TextWindows, critic_gradients, policy_gradients, update
from toys import toy_folder
from train.ppo_parts import (
    LONGEST_ROW,
    LONGEST_SAMPLED,
    ROWS,
    Memory,
    everything,
    experience_of,
    gradients,
    learner_of,
    roles_of,
    rollout_of,
    sampled,
    section_of,
    unequal,
)

LATER = (0, 0, 1, 0)  # the key of a minibatch whose ratio need not be 1
STEPS = 4  # two epochs of two minibatches
TEXT = TextWindows([[1, *range(60, 60 + n)] for n in (3, 9, 5, 12, 7)], weight=0.5, batch_size=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(toy_folder(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def even_base(tmp_path_factory):
    """A model whose norms keep float64, so that only rounding of the last digits is left."""
    return str(toy_folder(tmp_path_factory.mktemp("gpt2"), "gpt2"))


@pytest.fixture(scope="module")
def roles(base):
    return roles_of(base)


class Exact(ScalarModel):
    """A critic whose head computes in float64, as the trunks of these tests do."""

    def _apply_head(self, hidden):
        return F.linear(hidden, self.head.weight, self.head.bias).squeeze(-1).float()


@pytest.fixture(scope="module", params=["full", "lora"])
def exact_roles(request, even_base):
    made = roles_of(even_base, request.param)
    critic = Exact(made.critic.trunk, made.critic.head)
    made.policy.double()
    critic.double()
    return replace(made, critic=critic)


def uneven(pad_prompt=0, pad_response=0, seed=0):
    """Eight answers of 1 to 5 tokens to prompts of 2 to 4, with old log-probabilities around those of a flat policy."""
    rollout = rollout_of(ROWS * 2, pad_prompt, pad_response)
    noise_8T = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    noise_BT = F.pad(noise_8T, (0, pad_response))
    return replace(rollout, logprob_BT=torch.where(rollout.action_mask_BT, -5.5 + noise_BT / 2, 0.0))


def one_step(roles, role, experience, size, text=None):
    """Gradient and metrics of one minibatch of all rows in micro-batches of ``size`` rows."""
    learner = learner_of(roles, section_of(minibatch_size=8, entropy=0.01), text=text)
    learner.optimisers[role].forget()
    rows, tokens = list(range(8)), float(experience.train_mask_BT.sum())
    if role == POLICY:
        values = policy_gradients(experience, rows, tokens, learner, LATER, size * LONGEST_ROW)
    else:
        values = critic_gradients(experience, rows, tokens, learner, role, size * LONGEST_ROW)
    gradient = gradients(roles, role)
    learner.optimisers[role].forget()
    return gradient, values


@pytest.mark.promise("N4")
@pytest.mark.parametrize("role", [POLICY, CRITIC])
@pytest.mark.parametrize("keep", [None, [True, False, True, True, True, True, False, True]])
def test_micro_batches_change_neither_gradient_nor_statistics(exact_roles, role, keep):
    experience = experience_of(uneven(), keep=keep)
    gradient, values = one_step(exact_roles, role, experience, 8)
    assert gradient.abs().max() > 1e-2
    for size in (1, 2, 3):
        other, others = one_step(exact_roles, role, experience, size)
        torch.testing.assert_close(other, gradient, atol=1e-10, rtol=0)
        assert others == pytest.approx(values, rel=1e-5)
    if role == POLICY:
        assert 0.1 < values["clip_fraction"] < 0.9  # both sides of the clip are there
        assert values["ratio_mean"] > 0.5
    else:
        assert 0.1 < values["value_clip_fraction"] < 0.9


def test_importance_weights_of_1_change_no_bit_and_others_weigh_each_token(exact_roles):
    """A positive weight times the clipped loss is the clipped loss of that many times the advantage."""
    plain = experience_of(uneven())
    ones = torch.ones_like(plain.advantage_BT)
    weight = ones + torch.rand(ones.shape, generator=torch.Generator().manual_seed(3))
    nothing = torch.tensor(0.0)

    def weighted(weight_BT):
        return replace(plain, correction=Correction(weight_BT, nothing, nothing))

    gradient, values = one_step(exact_roles, POLICY, plain, 3)
    same, also = one_step(exact_roles, POLICY, weighted(ones), 3)
    assert torch.equal(same, gradient)
    assert also == values
    other, _ = one_step(exact_roles, POLICY, weighted(weight), 3)
    expected, _ = one_step(exact_roles, POLICY, replace(plain, advantage_BT=plain.advantage_BT * weight), 3)
    torch.testing.assert_close(other, expected, atol=1e-6, rtol=0)  # advantages are float32
    assert (other - gradient).abs().max() > 1e-3


@pytest.mark.promise("N4")
@settings(max_examples=8, deadline=None)
@given(left=st.integers(0, 4), right=st.integers(0, 4), size=st.integers(1, 8), role=st.sampled_from([POLICY, CRITIC]))
def test_padding_of_prompts_and_answers_changes_no_gradient(exact_roles, left, right, size, role):
    plain, padded = experience_of(uneven()), experience_of(uneven())
    rollout = uneven(left, right)
    widened = {
        name: F.pad(getattr(padded, name), (0, right)) for name in ("train_mask_BT", "advantage_BT", "return_BT")
    }
    values = F.pad(padded.scored.value_BT, (0, right), value=float("nan"))  # what the padding holds is never read
    padded = replace(padded, **widened, scored=replace(padded.scored, rollout=rollout, value_BT=values))
    gradient, _ = one_step(exact_roles, role, plain, 8)
    other, _ = one_step(exact_roles, role, padded, size)
    torch.testing.assert_close(other, gradient, atol=1e-10, rtol=0)


@pytest.mark.promise("N4")
def test_statistics_are_means_over_all_tokens_as_a_loop_over_tokens_has_them(roles):
    experience = experience_of(uneven())
    _, values = one_step(roles, POLICY, experience, 3)
    ratios, k3s, clipped = [], [], []
    scored = experience.scored
    for row, (prompt_ids, ids, actions, _, _) in enumerate(ROWS * 2):
        with torch.no_grad():
            logits_LV = roles.policy(input_ids=torch.tensor([prompt_ids + ids])).logits[0].double()
        logp_L = logits_LV.log_softmax(-1)[len(prompt_ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
        for slot in range(actions):
            gap = float(logp_L[slot]) - float(scored.rollout.logprob_BT[row, slot])
            ratio = torch.tensor(gap).exp().item()
            ratios.append(ratio)
            k3s.append(ratio - 1 - gap)  # KL(old || new) in new / old
            clipped.append(ratio < 0.8 if experience.advantage_BT[row, slot] < 0 else ratio > 1.2)
    assert values["ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert values["k3_old_new"] == pytest.approx(sum(k3s) / len(k3s), rel=1e-4)
    assert values["clip_fraction"] == pytest.approx(sum(clipped) / len(clipped), rel=1e-6)


@pytest.mark.parametrize("role", [POLICY, CRITIC])
@pytest.mark.parametrize("slots", [1, 13, 20, 10**6])
def test_a_micro_batch_holds_no_more_slots_than_it_may_unless_it_is_one_row(roles, monkeypatch, role, slots):
    seen, cut = [], update_module.batch_of

    def watched(rollout, rows, device):
        batch = cut(rollout, rows, device)
        seen.append((rows, batch.mask_BL.sum(1).max() * len(rows)))
        return batch

    monkeypatch.setattr(update_module, "batch_of", watched)
    experience, learner = experience_of(uneven(2, 3)), learner_of(roles, section_of())
    if role == POLICY:
        policy_gradients(experience, range(8), 24.0, learner, LATER, slots)
    else:
        critic_gradients(experience, range(8), 24.0, learner, role, slots)
    learner.optimisers[role].forget()
    assert sorted(row for rows, _ in seen for row in rows) == list(range(8))
    assert all(held <= slots or len(rows) == 1 for rows, held in seen)
    assert len(seen) == {1: 8, 13: 5, 20: 3, 10**6: 1}[slots]


def test_the_entropy_bonus_is_the_gradient_of_the_mean_entropy_and_a_weight_of_0_gives_none(even_base):
    roles = roles_of(even_base)
    experience, weight = experience_of(uneven()), 0.3
    found = {}
    for bonus in (0.0, weight):
        learner = learner_of(roles, section_of(minibatch_size=8, entropy=bonus))
        values = policy_gradients(experience, range(8), 24.0, learner, LATER, 20)
        found[bonus] = gradients(roles, POLICY)
        learner.optimisers[POLICY].forget()
    total = 0.0
    for prompt_ids, ids, actions, _, _ in ROWS * 2:
        logits_LV = roles.policy(input_ids=torch.tensor([prompt_ids + ids])).logits[0]
        logp_TV = logits_LV[len(prompt_ids) - 1 :][:actions].log_softmax(-1)
        total = total - (logp_TV.exp() * logp_TV).sum() / 24
    total.backward()
    assert values["entropy"] == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(found[0.0] - found[weight], weight * gradients(roles, POLICY), atol=1e-5, rtol=1e-3)
    assert gradients(roles, POLICY).abs().max() > 1e-3
    learner.optimisers[POLICY].forget()


def run(roles, rollout, *, position=None, check_stop=lambda: None, experience=None, warm=0, **learner):
    """One update; (its metrics, the learner)."""
    made = learner_of(roles, learner.pop("section", section_of()), **learner)
    experience = experience or experience_of(rollout)
    options = {"critic_only_steps": warm} if warm else {}
    position = position or Position()
    values = update(experience, made, iteration=0, position=position, check_stop=check_stop, **options)
    return values, made


def filtered(real, k):
    """A draw from the ``k`` most likely tokens, with log-probabilities of that distribution."""

    def draw(logits_AV, uniform_A, temperature):
        kept = logits_AV.topk(k).values[:, -1:]
        return real(logits_AV.masked_fill(logits_AV < kept, -torch.inf), uniform_A, temperature)

    return draw


@pytest.mark.promise("N5")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_sampler_and_trainer_agree_when_nothing_is_wrong(base, tuning):
    roles = roles_of(base, tuning)
    rollout = sampled(roles, base)
    values, learner = run(roles, rollout)
    assert values["steps"] == STEPS
    assert values["answer_tokens"] == 2 * rollout.action_mask_BT.sum()
    assert learner.policy_version == STEPS


@pytest.mark.promise("N5")
@pytest.mark.parametrize("fault", ["temperature", "top-k", "stale weights", "padding side"])
def test_a_sampler_that_differs_from_the_trainer_is_stopped_before_any_step(base, monkeypatch, fault):
    roles = roles_of(base)
    if fault == "top-k":
        monkeypatch.setattr(native, "draw", filtered(native.draw, 50))
    rollout = sampled(roles, base, temperature=1.2 if fault == "temperature" else 1.0)
    if fault == "stale weights":
        with torch.no_grad():
            for parameter in roles.parameters(POLICY):
                parameter.mul_(1.01)
    if fault == "padding side":  # ids padded on the right under a mask that pads on the left
        pads = (~rollout.prompt_mask_BP).sum(1).tolist()
        ids = torch.stack([row.roll(-n) for row, n in zip(rollout.prompt_ids_BP, pads, strict=True)])
        rollout = replace(rollout, prompt_ids_BP=ids)
    before = everything(roles)
    with pytest.raises(
        DivergenceError, match=r"sampler and trainer disagree before any update \(iteration 0\).*float32"
    ):
        run(roles, rollout)
    assert unequal(everything(roles), before) == []


@pytest.mark.promise("N5")
def test_a_sampler_that_keeps_every_token_of_the_vocabulary_is_no_fault(base, monkeypatch):
    monkeypatch.setattr(native, "draw", filtered(native.draw, 259))
    roles = roles_of(base)
    run(roles, sampled(roles, base))


@pytest.mark.promise("N5")
def test_bfloat16_may_round_but_not_be_stale(base):
    roles = roles_of(base, dtype="bfloat16")
    rollout = sampled(roles, base)
    run(roles, rollout)
    with torch.no_grad():
        for parameter in roles.parameters(POLICY):
            parameter.mul_(1.05)
    with pytest.raises(DivergenceError, match=r"disagree .* allowed inf and 0\.02 \(bfloat16\)"):
        run(roles, rollout)


@pytest.mark.promise("N5")
@pytest.mark.promise("N4")
@pytest.mark.parametrize("size", [1, 2, 8])
def test_what_bfloat16_may_round_does_not_depend_on_the_micro_batch(base, size):
    roles = roles_of(base, dtype="bfloat16")
    rollout = sampled(roles, base)
    mask_BT, old_BT = rollout.action_mask_BT.clone(), rollout.logprob_BT.clone()
    mask_BT[::2, 1:] = False  # half of the answers have one token only ...
    old_BT[:, 0] += 0.05  # ... which is off by more than the mean may be; over all tokens it is not
    assert 8 * 0.05 / mask_BT.sum() < 0.016
    rollout = replace(rollout, action_mask_BT=mask_BT, logprob_BT=torch.where(mask_BT, old_BT, 0.0))
    values, _ = run(roles, rollout, section=section_of(minibatch_size=8, micro_batch_tokens=size * LONGEST_SAMPLED))
    assert values["steps"] == 2


@pytest.mark.promise("N6")
@pytest.mark.parametrize("version", [0, 4])
def test_a_rollout_of_another_policy_version_is_refused(base, version):
    roles = roles_of(base)
    learner = learner_of(roles, section_of())
    learner.optimisers[POLICY].steps = 3
    before = everything(roles)
    with pytest.raises(
        DivergenceError,
        match=rf"the rollout is of policy version {version}, but the policy has taken 3 optimiser steps: the sampler's "
        r"weights are stale\. Sync its weights before every rollout; nothing was trained\.",
    ):
        update(
            experience_of(sampled(roles, base, version=version)),
            learner,
            iteration=0,
            position=Position(),
            check_stop=lambda: None,
        )
    assert unequal(everything(roles), before) == []
    assert learner.optimisers[CRITIC].steps == 0


@pytest.mark.promise("N6")
def test_the_version_counts_every_step_of_the_policy_and_warm_up_steps_are_none(base):
    roles = roles_of(base)
    rollout = sampled(roles, base)
    _, learner = run(roles, rollout, warm=2)
    assert learner.policy_version == 0
    update(experience_of(rollout), learner, iteration=0, position=Position(), check_stop=lambda: None)
    assert learner.policy_version == STEPS
    with pytest.raises(DivergenceError, match=r"of policy version 0, but the policy has taken 4"):
        update(experience_of(rollout), learner, iteration=1, position=Position(), check_stop=lambda: None)


def interrupt_after(k):
    """A check_stop that lets ``k`` minibatches pass."""
    left = iter([False] * k)

    def check():
        if next(left, True):
            raise Interrupted("stopped on request")

    return check


def through_a_file(state):
    """A nested state as a checkpoint hands it back."""
    tensors, plain = pack(state)
    return unpack({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(plain)))


def resumed(base, tuning, learner, section):
    """Fresh roles and optimisers with the state of ``learner``, as after a restart."""
    roles = roles_of(base, tuning)
    fresh = learner_of(roles, section)
    for role in roles.trained:
        roles.load_state(role, learner.roles.state(role))
        fresh.optimisers[role].load_state(through_a_file(learner.optimisers[role].state()))
    return fresh


@pytest.mark.promise("K7")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_k_minibatches_then_a_resume_equal_all_at_once_bit_for_bit_for_every_k(base, tuning):
    whole = roles_of(base, tuning)
    rollout, section = sampled(whole, base), section_of()
    expected, one = run(whole, rollout, section=section)
    assert expected["steps"] == STEPS
    for k in range(STEPS + 1):
        part, position = roles_of(base, tuning), Position()
        learner = learner_of(part, section)
        arguments = {"iteration": 0, "position": position}
        try:
            update(experience_of(rollout), learner, check_stop=interrupt_after(k), **arguments)
        except Interrupted:
            assert learner.policy_version == k < STEPS
        other = resumed(base, tuning, learner, section)
        again = Position(**through_a_file(asdict(position)))
        assert again == position
        values = update(experience_of(rollout), other, iteration=0, position=again, check_stop=lambda: None)
        assert values == expected
        assert unequal(everything(other.roles), everything(whole)) == []
        for role, optimiser in other.optimisers.items():
            ours, theirs = pack(optimiser.state()), pack(one.optimisers[role].state())
            assert ours[1] == theirs[1]
            assert unequal(ours[0], theirs[0]) == []


def test_every_epoch_sees_every_answer_once_in_an_order_of_its_own(base, monkeypatch):
    seen = []
    real = update_module.batch_of
    monkeypatch.setattr(
        update_module, "batch_of", lambda rollout, rows, device: seen.append(rows) or real(rollout, rows, device)
    )
    roles = roles_of(base)
    run(roles, sampled(roles, base))
    policy_rows = [set(rows) for rows in seen[::2]]  # policy and critic take turns
    assert policy_rows[0] | policy_rows[1] == policy_rows[2] | policy_rows[3] == set(range(8))
    assert policy_rows[0] not in policy_rows[2:]


def test_a_policy_that_moved_too_far_leaves_the_epoch_and_stays_out_of_it_after_a_resume(base):
    roles = roles_of(base)
    rollout, section = sampled(roles, base), section_of(kl={"inner_limit": 1e-9})
    position = Position()
    values, learner = run(roles, rollout, section=section, position=position)
    assert position.left_early
    assert (values["left_epoch_early"], values["steps"]) == (1.0, 2.0)  # k3 is 0 on the first minibatch
    assert learner.policy_version == 2
    before = everything(roles)
    again = Position(**through_a_file(asdict(position)))
    repeated = update(experience_of(rollout), learner, iteration=0, position=again, check_stop=interrupt_after(0))
    assert repeated == values
    assert unequal(everything(roles), before) == []


def test_a_warm_up_trains_no_policy_parameter(base):
    roles = roles_of(base, with_cost=True)
    before = everything(roles)
    experience = experience_of(sampled(roles, base), with_cost=True)
    values, learner = run(roles, None, experience=experience, warm=3)
    changed = unequal(everything(roles), before)
    assert {name.split("/")[0] for name in changed} == {CRITIC, COST_CRITIC}
    assert {role: optimiser.steps for role, optimiser in learner.optimisers.items()} == {
        POLICY: 0,
        CRITIC: 3,
        COST_CRITIC: 3,
    }
    assert values["steps"] == 3
    assert "policy_loss" not in values
    assert {"value_loss", "cost_value_loss", "grad_norm_critic", "grad_norm_cost_critic"} <= values.keys()


def test_a_warm_up_ends_with_the_epochs_and_does_not_read_the_policy_version(base):
    roles = roles_of(base)
    values, learner = run(roles, sampled(roles, base, version=99), warm=50)
    assert values["steps"] == learner.optimisers[CRITIC].steps == STEPS


def test_the_cost_critic_learns_the_cost_return_and_the_critic_the_reward_return(base):
    roles = roles_of(base, with_cost=True)
    rollout = sampled(roles, base)
    mask = rollout.action_mask_BT
    base_experience = experience_of(rollout, with_cost=True)
    experience = replace(
        base_experience,
        return_BT=torch.where(mask, 1.0, 0.0),
        cost_return_BT=torch.where(mask, -1.0, 0.0),
        scored=replace(
            base_experience.scored,
            value_BT=torch.zeros_like(mask, dtype=torch.float32),
            cost_value_BT=torch.zeros_like(mask, dtype=torch.float32),
        ),
    )
    section = section_of(epochs=10, value_clip=100.0, critic={"optimiser": {"learning_rate": 1e-2, "warmup": 0.0}})
    run(roles, None, experience=experience, section=section, warm=20)
    batch = update_module.batch_of(rollout, range(8), "cpu")
    with torch.no_grad():
        reward_BT = update_module.action_values(roles.critic, batch)[mask]
        cost_BT = update_module.action_values(roles.cost_critic, batch)[mask]
    assert reward_BT.mean() > 0.5
    assert cost_BT.mean() < -0.5


@pytest.mark.promise("R3")
@pytest.mark.parametrize(("role", "rows"), [(POLICY, 1), (POLICY, 3), (CRITIC, 2)])
def test_out_of_memory_in_an_update_halves_the_micro_batch_and_changes_no_gradient(base, monkeypatch, role, rows):
    enough, roles, said = roles_of(base), roles_of(base), []
    rollout = sampled(enough, base)
    section = section_of(minibatch_size=8, micro_batch_tokens=8 * LONGEST_SAMPLED, epochs=1)
    expected, one = run(enough, rollout, section=section)
    if role == POLICY:
        memory = Memory(update_module.token_logprobs, rows)
        monkeypatch.setattr(update_module, "token_logprobs", memory)
    else:
        memory = Memory(ScalarModel.values, rows)
        monkeypatch.setattr(ScalarModel, "values", lambda *args: memory(*args))
    whole = 8 * LONGEST_SAMPLED
    chunk = ChunkSize("update", whole, said.append)
    values, other = run(roles, rollout, section=section, chunk=chunk)
    assert memory.raised == ([8, 4, 2] if rows == 1 else [8, 4])
    assert chunk.size == {1: 1, 2: 2, 3: 2}[rows] * LONGEST_SAMPLED
    words = f"update: out of memory; the chunk is {whole // 2} instead of {whole} from now on. Results do not change."
    assert said[0] == words
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for trained in (POLICY, CRITIC):
        ours, theirs = (learner.optimisers[trained].state()["adamw"] for learner in (other, one))
        for place, moments in theirs.items():  # exp_avg is (1 - beta) times the gradient of the one step
            torch.testing.assert_close(ours[place]["exp_avg"], moments["exp_avg"], atol=1e-6, rtol=1e-4)


@pytest.mark.promise("R3")
@pytest.mark.parametrize("role", [POLICY, CRITIC])
def test_an_attempt_that_ran_out_half_way_leaves_nothing_in_the_gradient(base, monkeypatch, role):
    """Memory runs out in the second micro-batch, when the first has added its gradient already."""
    roles, enough = roles_of(base), roles_of(base)
    rollout = sampled(roles, base)
    section = section_of(minibatch_size=8, micro_batch_tokens=4 * LONGEST_SAMPLED, epochs=1)
    _, one = run(enough, rollout, section=section)
    calls = []

    def broken(real):
        def call(*args, **options):
            calls.append(args[1].shape[0])
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(*args, **options)

        return call

    if role == POLICY:
        monkeypatch.setattr(update_module, "token_logprobs", broken(update_module.token_logprobs))
    else:
        monkeypatch.setattr(ScalarModel, "values", broken(ScalarModel.values))
    _, other = run(roles, rollout, section=section)
    assert calls == [4, 4, 2, 2, 2, 2]
    for place, moments in one.optimisers[role].state()["adamw"].items():
        ours = other.optimisers[role].state()["adamw"][place]["exp_avg"]
        torch.testing.assert_close(ours, moments["exp_avg"], atol=1e-6, rtol=1e-4)


@pytest.mark.promise("R3")
def test_pretraining_text_is_cut_finer_as_well_where_memory_runs_out(base, monkeypatch):
    enough, roles = roles_of(base), roles_of(base)
    rollout = sampled(enough, base)
    section = section_of(minibatch_size=8, micro_batch_tokens=8 * LONGEST_SAMPLED, epochs=1)
    expected, one = run(enough, rollout, section=section, text=TEXT)
    memory = Memory(update_module.token_logprobs, 1)
    monkeypatch.setattr(update_module, "token_logprobs", memory)
    values, other = run(roles, rollout, section=section, text=TEXT)
    assert memory.raised
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for place, moments in one.optimisers[POLICY].state()["adamw"].items():
        ours = other.optimisers[POLICY].state()["adamw"][place]["exp_avg"]
        torch.testing.assert_close(ours, moments["exp_avg"], atol=1e-6, rtol=1e-4)


@pytest.mark.promise("R3")
def test_one_answer_that_does_not_fit_ends_the_run_with_the_weights_as_before(base, monkeypatch):
    roles = roles_of(base)
    rollout = sampled(roles, base)
    before = everything(roles)
    memory = Memory(update_module.token_logprobs, 0)
    monkeypatch.setattr(update_module, "token_logprobs", memory)
    with pytest.raises(OutOfMemoryError, match="update: out of memory even with a chunk of 1"):
        run(roles, rollout)
    assert memory.raised[:3] == [4, 2, 1]
    assert set(memory.raised[3:]) == {1}  # fewer slots than one row has are still one row
    assert unequal(everything(roles), before) == []


@pytest.mark.promise("N4")
def test_pretraining_text_counts_once_a_step_with_its_weight_however_the_answers_are_cut(exact_roles):
    experience = experience_of(uneven())
    without, _ = one_step(exact_roles, POLICY, experience, 8)
    with_text, values = one_step(exact_roles, POLICY, experience, 8, text=TEXT)
    for size in (1, 3):
        again, others = one_step(exact_roles, POLICY, experience, size, text=TEXT)
        torch.testing.assert_close(again, with_text, atol=1e-10, rtol=0)
        assert others == pytest.approx(values, rel=1e-5)
    twice, _ = one_step(exact_roles, POLICY, experience, 8, text=replace(TEXT, weight=1.0))
    torch.testing.assert_close(twice - without, 2 * (with_text - without), atol=1e-10, rtol=0)
    assert (with_text - without).abs().max() > 1e-3
    assert values["loss"] == pytest.approx(values["policy_loss"] + 0.5 * values["ptx_nll"], rel=1e-6)


def test_pretraining_text_of_weight_0_is_off(base):
    class Untouched(TextWindows):
        def batch(self, *key):
            raise AssertionError("text of weight 0 was read")

    roles = roles_of(base)
    rollout = sampled(roles, base)
    values, _ = run(roles, rollout, text=Untouched(TEXT.windows, 0.0, 4))
    assert "ptx_nll" not in values
    plain = roles_of(base)
    assert run(plain, rollout)[0] == values
    assert unequal(everything(roles), everything(plain)) == []


@pytest.mark.promise("N1")
@pytest.mark.parametrize("role", [POLICY, CRITIC])
def test_a_step_that_is_not_finite_is_reported_with_its_prompts_and_the_role_keeps_its_weights(base, monkeypatch, role):
    roles, said = roles_of(base), []
    rollout = sampled(roles, base)
    name = {POLICY: "policy_loss", CRITIC: "value_loss"}[role]
    real = getattr(update_module, name)
    monkeypatch.setattr(
        update_module,
        name,
        lambda *args, **options: replace(term := real(*args, **options), loss=term.loss * float("nan")),
    )
    before = everything(roles)
    with pytest.raises(
        DivergenceError, match=rf"^{role}, iteration 0, epoch 0, minibatch at 0, prompts p\d, p\d, p\d, p\d: loss nan"
    ):
        run(roles, rollout, report=lambda step, ids: said.append((step, ids)))
    assert [name for name in unequal(everything(roles), before) if name.startswith(f"{role}/")] == []
    ((step, ids),) = said
    assert (step.fault, step.taken, len(ids)) == ("diverged", False, 4)
    assert step.seen.startswith(f"{role}, iteration 0")


@pytest.mark.promise("N1")
def test_a_skipped_step_of_one_role_leaves_the_other_training_and_no_nan_in_the_metrics(base, monkeypatch):
    roles, said = roles_of(base), []
    rollout = sampled(roles, base)
    real, calls = update_module.policy_loss, []

    def broken(*args, **options):
        calls.append(1)
        term = real(*args, **options)
        return replace(term, loss=term.loss * float("nan")) if len(calls) == 2 else term

    monkeypatch.setattr(update_module, "policy_loss", broken)
    optimiser = {"learning_rate": 1e-3, "warmup": 0.0, "on_nonfinite": "skip"}
    values, learner = run(
        roles, rollout, section=section_of(optimiser=optimiser), report=lambda step, ids: said.append((step, ids))
    )
    assert [(step.fault, len(ids)) for step, ids in said] == [("nonfinite_step", 4)]
    assert learner.optimisers[CRITIC].steps == learner.policy_version == STEPS
    assert values["steps_skipped"] == 1 / STEPS
    assert values["steps"] == STEPS
    assert all(value == value for value in values.values())


@pytest.mark.promise("N9")
@pytest.mark.parametrize("skips", [False, True])
def test_an_update_whose_gradient_is_a_spike_names_role_and_prompts(base, monkeypatch, skips):
    roles, said = roles_of(base), []
    rollout = sampled(roles, base)
    optimiser = {"learning_rate": 1e-3, "warmup": 0.0, "skip_spikes": skips}
    section = section_of(optimiser=optimiser)
    learner = learner_of(roles, section, report=lambda step, ids: said.append((step, ids)))
    state = learner.optimisers[POLICY].state()
    learner.optimisers[POLICY].load_state(state | {"norms": [0.5, 1.5] * 20})
    experience = experience_of(rollout)
    experience = replace(experience, advantage_BT=experience.advantage_BT * 1e4)
    before = everything(roles)
    section_one = replace(learner, section=section.model_copy(update={"epochs": 1, "minibatch_size": 8}))
    update(experience, section_one, iteration=3, position=Position(), check_stop=lambda: None)
    ((step, ids),) = said
    assert step.fault == "gradient_spike"
    assert step.taken != skips
    assert step.seen.startswith("policy, iteration 3, epoch 0, minibatch at 0, prompts p")
    assert "expected at most 4" in step.seen
    assert sorted(ids) == [f"p{row}" for row in range(8)]
    moved = {name.split("/")[0] for name in unequal(everything(roles), before)}
    assert moved == ({CRITIC} if skips else {POLICY, CRITIC})


def test_a_minibatch_of_which_every_answer_is_left_out_takes_no_step(base):
    roles = roles_of(base)
    experience = experience_of(sampled(roles, base), keep=[False] * 8)
    before = everything(roles)
    values, learner = run(roles, None, experience=experience)
    assert values == {"left_epoch_early": 0.0, "steps": 0.0, "answer_tokens": 0.0}
    assert learner.policy_version == 0
    assert unequal(everything(roles), before) == []
