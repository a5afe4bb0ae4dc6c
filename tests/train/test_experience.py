"""The four verbs' middle: what is scored, where the score lands, and which numbers reach the update."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import integers
from tiny_models import make_context

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Prompt, Turn
from direct_rlhf.errors import DivergenceError, Interrupted, OutOfMemoryError
from direct_rlhf.models import forward as forward_module
from direct_rlhf.models import roles as roles_module
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import parameters_sha256
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import COST_CRITIC, CRITIC, POLICY, full_roles, lora_roles
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import ModelSection, PpoSection
from direct_rlhf.rollout.types import FinishReason
from direct_rlhf.train.experience import Judges, Scored, answers_of, batch_of, estimate, rollout_statistics, score
from direct_rlhf.train.reward_sources import CallableReward, ModelRewardSource
from direct_rlhf.train.start import Sources, start
from direct_rlhf.train.update import Position, check_ratio, critic_gradients, policy_gradients, update
from toys import toy_folder
from train.ppo_parts import (
    LONGEST_ROW,
    PROMPTS,
    ROWS,
    SETTINGS,
    Memory,
    everything,
    learner_of,
    roles_of,
    rollout_of,
    sampled,
    section_of,
    unequal,
    write_reward_model,
)


class LengthReward:
    name, low_quantile = "length", -1.5

    def score(self, answers):
        return torch.tensor([float(len(answer.text)) for answer in answers])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(toy_folder(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def roles(base):
    return full_roles(ModelSection(base=base), base, None, device="cpu")


@pytest.fixture(scope="module")
def priced_roles(base):
    return roles_of(base, with_cost=True)


def scored_of(roles, rollout, section=None, prompts=PROMPTS, judges=None, chunk=None, check_stop=lambda: None):
    section = section or PpoSection()
    return score(
        rollout,
        prompts,
        roles=roles,
        judges=judges or Judges(LengthReward()),
        section=section,
        cap=5,
        check_stop=check_stop,
        chunk=chunk or ChunkSize("score", section.micro_batch_tokens, lambda text: None),
    )


@pytest.mark.promise("N8")
def test_the_score_lands_on_the_last_action_of_every_kind_of_ending(roles):
    scored = scored_of(roles, rollout_of(ROWS))
    assert scored.score_B.tolist() == [2.0, 3.0, 0.0, -1.5]  # cut by the cap: the base's low quantile
    experience = estimate(scored, section=PpoSection(gamma=1.0, lam=1.0), kl_coefficient=0.0)
    # with lambda = gamma = 1 and beta = 0 the return of every action is the score
    for b, (_, _, actions, _, _) in enumerate(ROWS):
        returns = experience.return_BT[b]
        assert returns[:actions].tolist() == pytest.approx([scored.score_B[b].item()] * actions, abs=1e-5)
        assert returns[actions:].abs().sum() == 0
        assert experience.advantage_BT[b, actions:].abs().sum() == 0


def test_a_row_of_rewards_sums_to_the_score_minus_the_weighted_kl(roles):
    scored = scored_of(roles, rollout_of(ROWS))
    free = estimate(scored, section=PpoSection(gamma=1.0, lam=1.0), kl_coefficient=0.0)
    paid = estimate(scored, section=PpoSection(gamma=1.0, lam=1.0), kl_coefficient=0.3)
    mask = scored.rollout.action_mask_BT
    kl = torch.where(mask, scored.rollout.logprob_BT - scored.reference_BT, 0.0).sum(1)
    assert torch.allclose(free.return_BT[:, 0] - paid.return_BT[:, 0], 0.3 * kl, atol=1e-5)


def test_the_mask_rule_leaves_cut_answers_out_of_the_loss_but_not_out_of_the_kl(roles):
    section = PpoSection.model_validate({"length": {"unfinished": "mask"}})
    experience = estimate(scored_of(roles, rollout_of(ROWS), section), section=section, kl_coefficient=0.1)
    assert experience.train_mask_BT.sum(1).tolist() == [3, 3, 1, 0]
    assert experience.advantage_BT[3].abs().sum() == 0
    statistics = rollout_statistics(experience, PROMPTS)
    assert statistics["advantage_kept"] == 0.75
    assert statistics["length_mean"] == 3.0
    assert [statistics[f"rate_{end}"] for end in ("eos", "stop", "length_cut")] == [0.5, 0.25, 0.25]


def test_values_are_those_of_the_state_before_each_action(base):
    roles = full_roles(ModelSection(base=base), base, None, device="cpu")
    torch.nn.init.normal_(roles.critic.head.weight)
    scored = scored_of(roles, rollout_of(ROWS))
    for b, (prompt_ids, ids, actions, _, _) in enumerate(ROWS):
        row = torch.tensor([prompt_ids + ids])
        values = roles.critic.values(row, torch.ones_like(row, dtype=torch.bool))[0]
        expected = values[len(prompt_ids) - 1 : len(prompt_ids) - 1 + actions]
        assert torch.allclose(scored.value_BT[b, :actions], expected, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(left=integers(0, 6), right=integers(0, 6), micro=integers(1, 4))
def test_padding_and_batching_change_no_score(roles, left, right, micro):
    section = PpoSection.model_validate({"micro_batch_tokens": micro * LONGEST_ROW})
    plain, padded = scored_of(roles, rollout_of(ROWS)), scored_of(roles, rollout_of(ROWS, left, right), section)
    width = plain.reference_BT.shape[1]
    assert torch.allclose(plain.reference_BT, padded.reference_BT[:, :width], atol=1e-5)
    assert torch.allclose(plain.value_BT, padded.value_BT[:, :width], atol=1e-5)
    assert torch.equal(plain.score_B, padded.score_B)


def test_a_batch_is_trimmed_to_its_longest_rows():
    batch = batch_of(rollout_of(ROWS, 5, 5), [0, 1], "cpu")
    assert (batch.prompt_slots, batch.response_slots) == (3, 4)
    assert batch.ids_BL.shape == (2, 7)
    assert batch.action_BL.sum().item() == 6


def test_a_reward_reads_the_text_and_whether_it_was_finished():
    answers = answers_of(rollout_of(ROWS), PROMPTS)
    assert [(answer.text, answer.finished) for answer in answers] == [
        ("ab", True),
        ("cde", True),
        ("", True),
        ("fghij", False),
    ]


@pytest.mark.promise("K12")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_reference_stays_the_base_while_the_policy_moves(base, tuning):
    section = ModelSection.model_validate({"base": base, "tuning": tuning, "lora": {"rank": 4}})
    roles = (
        full_roles(section, base, None, device="cpu")
        if tuning == "full"
        else lora_roles(section, base, device="cpu", seed=0)
    )
    batch = batch_of(rollout_of(ROWS), range(4), "cpu")
    arguments = (batch.ids_BL, batch.mask_BL, batch.action_BL)
    before = roles.reference_logprobs(*arguments, 1.0)
    with roles.acting() as policy:
        assert torch.equal(token_logprobs(policy, *arguments).logprob_BL, before)  # the policy starts as the base
    with torch.no_grad():
        for parameter in roles.parameters(POLICY) + roles.parameters(CRITIC):
            parameter.add_(0.1)
    assert torch.equal(roles.reference_logprobs(*arguments, 1.0), before)
    with roles.acting() as policy:
        assert not torch.allclose(token_logprobs(policy, *arguments).logprob_BL, before)


def test_lora_roles_train_their_own_parameters_only(base):
    section = ModelSection.model_validate({"base": base, "tuning": "lora", "lora": {"rank": 4}})
    roles = lora_roles(section, base, device="cpu", seed=0)
    policy, critic = set(map(id, roles.parameters(POLICY))), set(map(id, roles.parameters(CRITIC)))
    assert policy
    assert critic
    assert not policy & critic
    batch = batch_of(rollout_of(ROWS), range(4), "cpu")
    with roles.acting() as model:
        token_logprobs(model, batch.ids_BL, batch.mask_BL, batch.action_BL).logprob_BL.sum().backward()
    assert all(parameter.grad is None for parameter in roles.parameters(CRITIC))
    with roles.criticising() as scalar:
        scalar.values(batch.ids_BL, batch.mask_BL).square().sum().backward()
    assert {id(p) for p in roles.policy.parameters() if p.grad is not None} <= policy | critic
    assert roles.state(POLICY).keys() & roles.state(CRITIC).keys() == set()


@pytest.mark.promise("N5")
def test_the_ratio_check_passes_rounding_and_stops_a_real_difference():
    mask = torch.tensor([[True, True, False]])
    old = torch.tensor([[-1.0, -2.0, 0.0]])
    check_ratio(old + torch.tensor([[5e-5, 0.0, 9.0]]), old, mask, dtype="float32", where="here")
    with pytest.raises(DivergenceError, match=r"\(here\).*is 1.00e-02 at most.*allowed 0.0001"):
        check_ratio(old + torch.tensor([[1e-2, 0.0, 0.0]]), old, mask, dtype="float32", where="here")
    check_ratio(old + torch.tensor([[3e-2, 0.0, 0.0]]), old, mask, dtype="bfloat16", where="here")
    with pytest.raises(DivergenceError, match="disagree"):
        check_ratio(old * float("nan"), old, mask, dtype="float32", where="here")


def test_the_toy_tokenizer_is_what_the_fixtures_say(base):
    tokens = load_tokens(base)
    assert (tokens.bos_id, tokens.eos_id, tokens.pad_id) == (1, 2, 0)
    assert tokens.decode(tokens.encode("\n\nHuman: é")) == "\n\nHuman: é"


@pytest.mark.promise("N2")
def test_a_reward_that_is_not_a_number_is_named_with_its_prompt_and_answer(roles):
    class Model:
        def score(self, items):
            return torch.tensor([1.0, 2.0, 3.0, math.nan])

    raw = CallableReward(lambda items: [1.0, 2.0, 3.0, math.nan], "reward my:own")
    for judge, name in ((raw, "reward my:own"), (ModelRewardSource(Model(), "reward model x", 0.0), "reward model x")):
        words = rf"^{name}: reward nan for prompt p3, answer 'fghij' \(1 of 4 rewards are not finite\)"
        with pytest.raises(DivergenceError, match=words):
            scored_of(roles, rollout_of(ROWS), judges=Judges(judge))


@pytest.mark.promise("N2")
def test_a_cost_that_is_not_a_number_is_named_as_the_costs_fault(base):
    cost = CallableReward(lambda items: [0.0, math.inf, 0.0, 0.0], "cost my:own")
    with pytest.raises(DivergenceError, match=r"^cost my:own: reward inf for prompt p1, answer 'cde'"):
        scored_of(roles_of(base, with_cost=True), rollout_of(ROWS), judges=Judges(LengthReward(), cost))


@pytest.mark.promise("N2")
def test_a_reference_log_probability_of_minus_infinity_is_named_with_prompt_and_token(roles, monkeypatch):
    real = forward_module.final_logits

    def without_token_53(model, hidden_NH):
        logits_NV = real(model, hidden_NH).clone()
        logits_NV[:, 53] = -math.inf
        return logits_NV

    monkeypatch.setattr(forward_module, "final_logits", without_token_53)
    words = r"^the reference log-probability of prompt p1 is -inf at answer token 1 \('cde'\)\. Nothing was trained"
    with pytest.raises(DivergenceError, match=words):
        scored_of(roles, rollout_of(ROWS))


def with_nan_at(monkeypatch, critic, token):
    """The value of the state in which ``critic`` has just read ``token`` becomes NaN, and so does all padding."""
    real = ScalarModel.values

    def values(self, ids_BL, mask_BL):
        value_BL = real(self, ids_BL, mask_BL)
        return value_BL.masked_fill((ids_BL == token) | ~mask_BL, math.nan) if self is critic else value_BL

    monkeypatch.setattr(ScalarModel, "values", values)


@pytest.mark.promise("N2")
@pytest.mark.parametrize("role", [CRITIC, COST_CRITIC])
def test_a_value_that_is_not_a_number_is_named_with_prompt_and_token(priced_roles, monkeypatch, role):
    with_nan_at(monkeypatch, priced_roles.critic if role == CRITIC else priced_roles.cost_critic, 53)
    words = rf"^the {role} value of prompt p1 is nan at answer token 2 \('cde'\)"
    with pytest.raises(DivergenceError, match=words):
        scored_of(priced_roles, rollout_of(ROWS), judges=Judges(LengthReward(), LengthReward()))


@pytest.mark.promise("N2")
@pytest.mark.promise("N8")
def test_what_stands_after_the_last_action_and_in_padding_is_not_read(priced_roles, monkeypatch):
    with_nan_at(monkeypatch, priced_roles.critic, 2)  # EOS ends three of the four answers
    assert scored_of(priced_roles, rollout_of(ROWS, 2, 3)).value_BT.isfinite().all()


answers = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from(["nothing", "eos", "one token", "stopped", "cut"]), st.integers(2, 5)),
    min_size=1,
    max_size=6,
)


def answer_rows(drawn):
    """Rows of the kinds drawn, after one ordinary row."""
    rows = [ROWS[0]]
    for prompt_length, kind, length in drawn:
        prompt, ids = [1, *range(40, 39 + prompt_length)], list(range(50, 50 + length))
        rows.append(
            {
                "nothing": (prompt, [], 0, FinishReason.EOS, ""),  # a row of padding
                "eos": (prompt, [2], 1, FinishReason.EOS, ""),
                "one token": (prompt, [50], 1, FinishReason.LENGTH, "a"),
                "stopped": (prompt, [*ids, 2], length, FinishReason.STOP, "b"),
                "cut": (prompt, ids, length, FinishReason.LENGTH, "c"),
            }[kind]
        )
    return rows


@pytest.mark.promise("N7")
@settings(max_examples=15, deadline=None)
@given(drawn=answers, size=integers(1, 3), rule=st.sampled_from(["replace", "subtract", "scale", "mask"]))
def test_answers_of_every_length_give_finite_scores_advantages_losses_and_gradients(priced_roles, drawn, size, rule):
    rows = answer_rows(drawn)
    rollout = rollout_of(rows, 1, 1, logprob=-5.0)
    prompts = [Prompt(f"p{b}", (Turn("human", "?"),), "helpful", "x:1") for b in range(len(rows))]
    slots = size * max(len(prompt_ids) + len(ids) for prompt_ids, ids, *_ in rows)
    section = section_of(length={"unfinished": rule}, micro_batch_tokens=slots)
    scored = scored_of(priced_roles, rollout, section, prompts, Judges(LengthReward(), LengthReward()))
    experience = estimate(scored, section=section, kl_coefficient=0.1, multiplier=0.5)
    for x in (experience.advantage_BT, experience.return_BT, experience.cost_return_BT, scored.reference_BT):
        assert x.isfinite().all()
        assert not x[~rollout.action_mask_BT].any()
    assert all(math.isfinite(value) for value in rollout_statistics(experience, prompts).values())
    learner, every = learner_of(priced_roles, section), list(range(len(rows)))
    tokens = float(experience.train_mask_BT.sum())
    found = [policy_gradients(experience, every, tokens, learner, (0, 0, 1, 0), slots)]
    found += [critic_gradients(experience, every, tokens, learner, role, slots) for role in (CRITIC, COST_CRITIC)]
    assert all(math.isfinite(value) for values in found for value in values.values())
    for role, optimiser in learner.optimisers.items():
        assert all(p.grad.isfinite().all() for p in priced_roles.parameters(role) if p.grad is not None)
        optimiser.forget()


@pytest.mark.promise("N7")
@pytest.mark.promise("N8")
def test_an_empty_answer_has_one_action_and_its_signal(roles):
    scored = scored_of(roles, rollout_of(ROWS))
    experience = estimate(scored, section=PpoSection(gamma=1.0, lam=1.0), kl_coefficient=0.0)
    assert ROWS[2][1] == [2]  # EOS alone
    assert experience.train_mask_BT[2].tolist() == [True, False, False, False, False]
    assert experience.return_BT[2, 0] == scored.score_B[2]
    paid = replace(scored, score_B=scored.score_B + torch.tensor([0.0, 0.0, 5.0, 0.0]))
    more = estimate(paid, section=PpoSection(gamma=1.0, lam=1.0), kl_coefficient=0.0)
    assert more.advantage_BT[2, 0] > experience.advantage_BT[2, 0] + 0.5


@pytest.mark.promise("R3")
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("who", ["reference", "critic"])
def test_out_of_memory_while_scoring_halves_the_chunk_and_changes_no_number(priced_roles, monkeypatch, who, rows):
    rollout, said, judges = rollout_of(ROWS), [], Judges(LengthReward(), LengthReward())
    whole = 4 * LONGEST_ROW
    plain = scored_of(priced_roles, rollout, judges=judges, chunk=ChunkSize("score", whole))
    memory = Memory(roles_module.token_logprobs if who == "reference" else ScalarModel.values, rows)
    if who == "reference":
        monkeypatch.setattr(roles_module, "token_logprobs", memory)
    else:
        monkeypatch.setattr(ScalarModel, "values", lambda *args: memory(*args))
    chunk = ChunkSize("toy, score", whole, said.append)
    scored = scored_of(priced_roles, rollout, judges=judges, chunk=chunk)
    assert chunk.size == {1: 1, 2: 2, 3: 2}[rows] * LONGEST_ROW
    assert memory.raised == [4, 2][: len(said)]
    words = f"the chunk is {whole // 2} instead of {whole} from now on. Results do not change."
    assert said[0] == f"toy, score: out of memory; {words}"
    for name in ("reference_BT", "value_BT", "cost_value_BT"):
        torch.testing.assert_close(getattr(scored, name), getattr(plain, name), atol=1e-5, rtol=0)
        assert getattr(plain, name).abs().max() > 1e-3


@pytest.mark.promise("R3")
def test_one_answer_that_cannot_be_scored_ends_the_run(roles, monkeypatch):
    monkeypatch.setattr(roles_module, "token_logprobs", Memory(roles_module.token_logprobs, 0))
    with pytest.raises(OutOfMemoryError, match="score: out of memory even with a chunk of 1"):
        scored_of(roles, rollout_of(ROWS))


@pytest.mark.promise("S1")
def test_scoring_asks_before_every_chunk_whether_to_stop(roles):
    asked = iter([False] * 3 + [True])

    def check_stop():
        if next(asked):
            raise Interrupted("stopped on request")

    with pytest.raises(Interrupted):
        scored_of(roles, rollout_of(ROWS), chunk=ChunkSize("score", 1), check_stop=check_stop)
    assert next(asked, None) is None


class Given:
    """A source that says the scores it was given."""

    name, low_quantile = "given", -1.5

    def __init__(self, *scores):
        self.scores = torch.tensor(scores)

    def score(self, answers):
        return self.scores


def test_a_cost_is_the_negative_of_its_models_score_under_the_same_rules_for_endings(priced_roles):
    section = PpoSection.model_validate({"score_clip": 2.5, "length": {"per_token_penalty": 0.1, "overlong_buffer": 2}})
    judges = Judges(Given(1.0, 2.0, 3.0, 4.0), Given(0.5, -9.0, 0.0, 1.0))
    scored = scored_of(priced_roles, rollout_of(ROWS), section, judges=judges)
    assert scored.raw_cost_B.tolist() == [-0.5, 9.0, 0.0, -1.0]
    assert scored.cost_B.tolist() == [-0.5, 2.5, 0.0, 1.5]  # clipped; cut by the cap: the low quantile's cost
    # lengths 3, 3, 1, 5 of a cap of 5: they are priced once, in the reward
    assert scored.score_B.tolist() == pytest.approx([0.7, 1.7, 2.4, -1.5 - 0.5 - 1.0])
    assert rollout_statistics(estimate(scored, section=section, kl_coefficient=0.0), PROMPTS)["cost_mean"] == 1.875


def by_hand(k1=((0.5, -0.5), (0.0,)), score=(1.0, -1.0), cost=(2.0, 0.0), value=0.0, cost_value=0.0):
    """Two answers, of two tokens and of one, with these numbers."""
    rows = [([1, 40], [50, 51], 2, FinishReason.EOS, "a"), ([1, 40], [50], 1, FinishReason.EOS, "b")]
    rollout = rollout_of(rows)
    mask = rollout.action_mask_BT
    k1_BT = torch.zeros(mask.shape)
    k1_BT[0, :2], k1_BT[1, :1] = torch.tensor(k1[0]), torch.tensor(k1[1])
    values = [torch.where(mask, number, 0.0) for number in (value, cost_value)]
    score_B, keep_B = torch.tensor(score), torch.ones(2, dtype=torch.bool)
    scored = Scored(rollout, score_B, 0, score_B, keep_B, rollout.logprob_BT - k1_BT, values[0])
    if cost is None:
        return scored
    return replace(scored, raw_cost_B=torch.tensor(cost), cost_B=torch.tensor(cost), cost_value_BT=values[1])


MONTE_CARLO = PpoSection(gamma=1.0, lam=1.0)


def test_golden_advantages_and_returns_of_reward_and_cost_together():
    """beta = 0.1, lambda = 0.5, gamma = lam = 1.

    rewards  -0.05, 0.05 + 1 | -1      to go  1.00, 1.05 | -1     less the value 0.2:  0.80, 0.85 | -1.2
    costs    +0.05, -0.05 + 2 | 0      to go  2.00, 1.95 |  0     less the value 0.4:  1.60, 1.55 | -0.4
    (A_r - 0.5 A_c) / 1.5             0, 0.05 | -2/3
    """
    scored = by_hand(value=0.2, cost_value=0.4)
    experience = estimate(scored, section=MONTE_CARLO, kl_coefficient=0.1, multiplier=0.5)
    torch.testing.assert_close(experience.return_BT, torch.tensor([[1.0, 1.05], [-1.0, 0.0]]))
    torch.testing.assert_close(experience.cost_return_BT, torch.tensor([[2.0, 1.95], [0.0, 0.0]]))
    combined = [0.0, 0.05, -2 / 3]
    mean, spread = statistics.fmean(combined), statistics.pstdev(combined)
    whitened = [(x - mean) / spread for x in combined]
    assert experience.advantage_BT[experience.train_mask_BT].tolist() == pytest.approx(whitened, abs=1e-5)


def test_without_a_cost_the_multiplier_and_the_cost_fields_do_not_exist():
    scored = by_hand(cost=None)
    plain = estimate(scored, section=PpoSection(), kl_coefficient=0.1)
    other = estimate(scored, section=PpoSection(), kl_coefficient=0.1, multiplier=7.0)
    assert torch.equal(plain.advantage_BT, other.advantage_BT)
    assert torch.equal(plain.return_BT, other.return_BT)
    assert plain.cost_return_BT is other.cost_return_BT is None
    statistics_of = rollout_statistics(other, PROMPTS[:2])
    assert not any("cost" in name for name in statistics_of)


def test_a_multiplier_of_0_gives_the_advantages_of_the_reward_alone():
    plain = estimate(by_hand(cost=None), section=PpoSection(), kl_coefficient=0.1)
    priced = estimate(by_hand(), section=PpoSection(), kl_coefficient=0.1, multiplier=0.0)
    assert torch.equal(plain.advantage_BT, priced.advantage_BT)
    assert torch.equal(plain.return_BT, priced.return_BT)


@settings(deadline=None)
@given(multiplier=st.floats(0, 1e3), beta=st.floats(0, 2), k1=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_the_kl_has_the_weight_beta_whatever_the_multiplier(multiplier, beta, k1):
    """Where the cost is the negative reward, both streams say the same, and the KL must not gain or lose against it."""
    drawn = {"k1": (k1, (0.3,)), "score": (1.0, -1.0)}
    alone = estimate(by_hand(cost=None, **drawn), section=MONTE_CARLO, kl_coefficient=beta)
    both = by_hand(cost=(-1.0, 1.0), **drawn)
    together = estimate(both, section=MONTE_CARLO, kl_coefficient=beta, multiplier=multiplier)
    torch.testing.assert_close(together.advantage_BT, alone.advantage_BT, atol=1e-4, rtol=1e-4)


@settings(deadline=None)
@given(multiplier=st.floats(0.1, 10), more=st.floats(0.5, 5))
def test_a_larger_cost_lowers_an_answers_advantage_and_leaves_the_rewards_stream_alone(multiplier, more):
    cheap = estimate(by_hand(cost=(0.0, 0.0)), section=MONTE_CARLO, kl_coefficient=0.1, multiplier=multiplier)
    dear = estimate(by_hand(cost=(more, 0.0)), section=MONTE_CARLO, kl_coefficient=0.1, multiplier=multiplier)
    assert dear.advantage_BT[0, 0] < cheap.advantage_BT[0, 0]
    assert torch.equal(dear.return_BT, cheap.return_BT)
    assert (dear.cost_return_BT[0] > cheap.cost_return_BT[0]).all()


@pytest.fixture(params=["full", "lora"])
def judged(request, base, tmp_path):
    """Roles with two reward models as a run starts them: (roles, judges, frozen parameters by name)."""
    for which, seed in (("reward", 1), ("cost", 2)):
        write_reward_model(tmp_path / which, base, request.param, seed=seed)
    ppo = {"lagrangian": {"enabled": True}, "sampling": {"max_new_tokens": SETTINGS.max_new_tokens}}
    model = {"base": base, "tuning": request.param, "lora": {"rank": 4}}
    ctx = make_context(tmp_path / "runs", base, model=model, ppo=ppo, dialogue={"stop_strings": []})
    sources = Sources(tmp_path / "reward", tmp_path, tmp_path / "cost")
    roles, judges = start(ctx, init=base, tokens=load_tokens(base), prompts=[], settings=SETTINGS, sources=sources)
    models = {"reward model": judges.reward.model.scalar, "cost model": judges.cost.model.scalar}
    trained = {id(parameter) for role in roles.trained for parameter in roles.parameters(role)}
    frozen = {
        f"{what}, {name}": parameter
        for what, module in (models | {"reference": roles.reference or roles.policy}).items()
        for name, parameter in module.named_parameters()
        if id(parameter) not in trained
    }
    return roles, judges, frozen


def train(roles, judges, base):
    """One iteration: sample, score, estimate, update; the scores."""
    section = section_of()
    rollout = sampled(roles, base)
    prompts = [Prompt(key.prompt_id, (Turn("human", "Say."),), "helpful", "x:1") for key in rollout.keys]
    scored = scored_of(roles, rollout, section, prompts, judges)
    experience = estimate(scored, section=section, kl_coefficient=0.1, multiplier=0.5)
    update(experience, learner_of(roles, section), iteration=0, position=Position(), check_stop=lambda: None)
    return scored


@pytest.mark.promise("K12")
def test_an_update_moves_neither_reference_nor_reward_model_nor_cost_model(judged, base):
    roles, judges, frozen = judged
    adapters = [name for name in frozen if ".reward." in name or ".cost." in name]
    assert bool(adapters) == (roles.reference is None)  # they sit on the policy's trunk

    def forbidden(gradient):
        raise AssertionError("a frozen parameter got a gradient")

    for parameter in frozen.values():
        wanted = parameter.requires_grad
        parameter.requires_grad_(True).register_hook(forbidden)
        parameter.requires_grad_(wanted)
    versions = {name: parameter._version for name, parameter in frozen.items()}  # counts writes in place
    copies = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    before, moving = what_frozen_models_say(roles, judges), everything(roles)
    hashes = [parameters_sha256(roles.reference)] if roles.reference is not None else []
    train(roles, judges, base)
    assert {name: parameter._version for name, parameter in frozen.items()} == versions
    assert [name for name, parameter in frozen.items() if not torch.equal(parameter, copies[name])] == []
    assert all(parameter.grad is None for parameter in frozen.values())
    assert ([parameters_sha256(roles.reference)] if roles.reference is not None else []) == hashes
    assert {name.split("/")[0] for name in unequal(everything(roles), moving)} == {POLICY, CRITIC, COST_CRITIC}
    for ours, theirs in zip(what_frozen_models_say(roles, judges), before, strict=True):
        assert torch.equal(ours, theirs)


def what_frozen_models_say(roles, judges):
    """What the reference and both reward models say of fixed answers."""
    rollout = rollout_of(ROWS)
    batch = batch_of(rollout, range(4), "cpu")
    reference = roles.reference_logprobs(batch.ids_BL, batch.mask_BL, batch.action_BL, 1.0)
    given_answers = answers_of(rollout, PROMPTS)
    return [reference, judges.reward.score(given_answers), judges.cost.score(given_answers)]


def test_the_critics_of_a_run_start_as_its_reward_and_its_cost(judged):
    roles, judges, _ = judged
    turns, text = PROMPTS[0].turns, "Good."
    for role, judge, sign in ((CRITIC, judges.reward, 1.0), (COST_CRITIC, judges.cost, -1.0)):
        ids_BL = torch.tensor([judge.model.encode((turns, text, True))])
        with roles.criticising(role) as critic, torch.no_grad():
            value = critic.values(ids_BL, torch.ones_like(ids_BL).bool())[0, -1]
        score_1 = judge.model.score([(turns, text, True)])
        assert score_1.abs() > 0.1
        torch.testing.assert_close(value, sign * score_1[0], atol=1e-4, rtol=0)
