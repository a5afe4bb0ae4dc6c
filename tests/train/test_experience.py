"""The four verbs' middle: what is scored, where the score lands, and which numbers reach the update."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Prompt, Turn
from direct_rlhf.errors import DivergenceError
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import CRITIC, POLICY, full_roles, lora_roles
from direct_rlhf.recipe.schema import ModelSection, PpoSection
from direct_rlhf.rollout.types import FinishReason, Rollout, SampleKey
from direct_rlhf.train.experience import Judges, answers_of, batch_of, estimate, rollout_statistics, score
from direct_rlhf.train.update import check_ratio
from toys import toy_folder


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


def rollout_of(rows, pad_prompt=0, pad_response=0):
    """Rows are (prompt ids, response ids, number of actions, finish, text)."""
    longest_prompt = max(len(row[0]) for row in rows) + pad_prompt
    longest = max(len(row[1]) for row in rows) + pad_response
    prompt = torch.zeros(len(rows), longest_prompt, dtype=torch.long)
    response = torch.zeros(len(rows), longest, dtype=torch.long)
    prompt_mask, response_mask, action_mask = prompt.bool(), response.bool(), response.bool()
    for b, (prompt_ids, ids, actions, _, _) in enumerate(rows):
        prompt[b, longest_prompt - len(prompt_ids) :] = torch.tensor(prompt_ids)
        prompt_mask[b, longest_prompt - len(prompt_ids) :] = True
        response[b, : len(ids)] = torch.tensor(ids)
        response_mask[b, : len(ids)] = True
        action_mask[b, :actions] = True
    logprob = torch.where(action_mask, torch.full(action_mask.shape, -2.0), 0.0)
    keys = tuple(SampleKey(0, f"p{b}", 0, 0) for b in range(len(rows)))
    finish, texts = tuple(row[3] for row in rows), tuple(row[4] for row in rows)
    return Rollout(prompt, prompt_mask, response, response_mask, action_mask, logprob, finish, texts, keys, 0)


ROWS = [
    ([1, 40, 41], [50, 51, 2], 3, FinishReason.EOS, "ab"),  # EOS is an action
    ([1, 42], [52, 53, 54, 2], 3, FinishReason.STOP, "cde"),  # the swapped EOS is none
    ([1, 43, 44, 45], [2], 1, FinishReason.EOS, ""),  # EOS first
    ([1, 46], [55, 56, 57, 58, 59], 5, FinishReason.LENGTH, "fghij"),
]
PROMPTS = [Prompt(f"p{b}", (Turn("human", "?"),), "helpful", "x:1") for b in range(len(ROWS))]


def scored_of(roles, rollout, section=None, prompts=PROMPTS):
    section = section or PpoSection()
    return score(
        rollout,
        prompts,
        roles=roles,
        judges=Judges(LengthReward()),
        section=section,
        cap=5,
        check_stop=lambda: None,
        chunk=ChunkSize("score", section.micro_batch_size),
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
    section = PpoSection.model_validate({"micro_batch_size": micro})
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
