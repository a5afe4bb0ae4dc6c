"""The closed-form optimum again, with the roles of training: a tiny transformer, in full and as adapters.

Answers of at most two tokens out of four, of which the last one ends the answer at once. The reference is the untrained
transformer itself, so the optimum is computed from its probabilities.
"""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from direct_rlhf.maths.advantages import gae
from direct_rlhf.maths.kl import k1
from direct_rlhf.maths.losses import policy_loss, value_loss
from direct_rlhf.maths.masked import whiten
from direct_rlhf.maths.rewards import token_rewards
from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import add_lora
from direct_rlhf.models.roles import CRITIC, POLICY, Roles
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import LoraSection
from oracle import Problem, distance, f64, sample

N_TOKENS, EPISODES, UPDATES, BETA = 4, 256, 100, 0.5
PROMPT = (0, 3)  # its last token follows no answer's token, so that every state looks different
# states: the prompt, and after each of the tokens 0 to 2
TASK = Problem(
    reference_SA=f64([[0.25] * N_TOKENS] * N_TOKENS),
    reward_SA=f64([[0.0, 0.0, 0.0, -1.0], [1.0, 0.0, 1.5, 2.0], [0.5, 0.0, 2.0, 1.0], [-1.0, 1.5, 0.0, 1.0]]),
    following_SA=torch.tensor([[1, 2, 3, -1], [-1] * N_TOKENS, [-1] * N_TOKENS, [-1] * N_TOKENS]),
    n_slots=2,
)


def make_roles(tuning):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=N_TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    if tuning == "full":
        reference = copy.deepcopy(model).requires_grad_(False)
        return Roles(model, ScalarModel.zero(model, copy_trunk=True), reference, "cpu", "float32")
    section = LoraSection(rank=4, alpha=8)
    policy = add_lora(add_lora(model, section, POLICY, seed=0), section, CRITIC, seed=1)
    return Roles(policy, ScalarModel.zero(policy), None, "cpu", "float32")


def sequences(token_BT, mask_BT):
    """ids, mask and targets [B, L] of prompt + answer."""
    prompt_BP = torch.tensor([PROMPT]).expand(len(token_BT), -1)
    ids_BL = torch.cat([prompt_BP, token_BT], dim=1)
    target_BL = torch.cat([prompt_BP < 0, mask_BT], dim=1)
    return ids_BL, torch.cat([prompt_BP >= 0, mask_BT], dim=1), target_BL


def action_values(critic, ids_BL, mask_BL):
    """V of the state before each answer token, [B, T]."""
    return critic.values(ids_BL, mask_BL)[:, len(PROMPT) - 1 : -1]


def every_answer():
    """Tokens and mask of one answer for each state and next token, and that token's slot."""
    first = torch.cat([torch.arange(N_TOKENS), torch.arange(N_TOKENS - 1).repeat_interleave(N_TOKENS)])
    second = torch.cat([torch.zeros(N_TOKENS, dtype=torch.long), torch.arange(N_TOKENS).repeat(N_TOKENS - 1)])
    slot = (torch.arange(N_TOKENS**2) >= N_TOKENS).long()
    return torch.stack([first, second], dim=1), torch.stack([slot >= 0, slot > 0], dim=1), slot


def policy_table(logprob_BT, slot):
    """Probabilities [S, A], float64, from the log-probabilities of ``every_answer``."""
    return logprob_BT.gather(1, slot[:, None]).view(N_TOKENS, N_TOKENS).exp().double()


@torch.no_grad()
def tables(roles):
    """Policy [S, A], values [S] and reference [S, A] of every state."""
    token_BT, mask_BT, slot = every_answer()
    ids_BL, mask_BL, target_BL = sequences(token_BT, mask_BT)
    with roles.acting() as policy:
        policy_SA = policy_table(token_logprobs(policy, ids_BL, mask_BL, target_BL).logprob_BL[:, len(PROMPT) :], slot)
    with roles.criticising() as critic:
        value_BT = action_values(critic, ids_BL, mask_BL)
    value_S = value_BT.gather(1, slot[:, None])[::N_TOKENS, 0].double()
    reference_SA = policy_table(roles.reference_logprobs(ids_BL, mask_BL, target_BL, 1.0)[:, len(PROMPT) :], slot)
    return policy_SA, value_S, reference_SA


def train(roles, rate):
    """PPO by the project's rules; two epochs an update."""
    draw = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([*roles.parameters(POLICY), *roles.parameters(CRITIC)], lr=rate)
    for update in range(UPDATES):
        adam.param_groups[0]["lr"] = rate * (1 - update / UPDATES)
        policy_SA, _, _ = tables(roles)
        episodes = sample(TASK, policy_SA, EPISODES, draw)
        mask_BT = episodes.mask_BT
        batch = sequences(episodes.token_BT, mask_BT)
        old_BT = policy_SA.log().float()[episodes.state_BT, episodes.token_BT]
        with torch.no_grad(), roles.criticising() as critic:
            old_value_BT = action_values(critic, *batch[:2])
        k1_BT = k1(old_BT, roles.reference_logprobs(*batch, 1.0)[:, len(PROMPT) :])
        reward_BT = token_rewards(episodes.score_KB[0].float(), k1_BT, mask_BT, beta=BETA)
        advantage_BT = gae(reward_BT, old_value_BT, mask_BT, gamma=1.0, lam=0.95)
        for epoch in range(2):
            with roles.acting() as policy:
                logp_BT = token_logprobs(policy, *batch).logprob_BL[:, len(PROMPT) :]
                term = policy_loss(logp_BT, old_BT, whiten(advantage_BT, mask_BT), mask_BT, clip=0.2)
                assert epoch or term.k3 < 1e-9  # the ratio is 1 before the first step
                term.loss.backward()
            with roles.criticising() as critic:
                value_BT = action_values(critic, *batch[:2])
                value_loss(value_BT, old_value_BT, advantage_BT + old_value_BT, mask_BT, clip=0.2).loss.backward()
            adam.step()
            adam.zero_grad()


@pytest.mark.parametrize(("tuning", "rate"), [("full", 0.01), ("lora", 0.03)])
def test_a_transformer_reaches_the_closed_form_optimum(tuning, rate):
    roles = make_roles(tuning)
    start_SA, _, reference_SA = tables(roles)
    assert distance(start_SA, reference_SA) < 1e-6
    best_SA, best_value_S = replace(TASK, reference_SA=reference_SA).optimum(BETA)
    assert distance(start_SA, best_SA) > 0.3
    train(roles, rate)
    policy_SA, value_S, same_reference_SA = tables(roles)
    assert torch.equal(same_reference_SA, reference_SA)
    assert distance(policy_SA, best_SA) < 0.05
    assert (value_S - best_value_S).abs().max() < 0.1
