"""What the tests of PPO's parts are made of: rollouts by hand or sampled, experiences, learners, memory that runs out."""

from dataclasses import asdict, replace

import torch

from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.data.types import Prompt, Turn
from direct_rlhf.models.loading import add_lora, base_sha256, load_causal_lm
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.reward_model import Facts, Normalisation, RewardModel
from direct_rlhf.models.roles import POLICY, Roles, full_roles, lora_roles
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import DialogueSection, LoraSection, ModelSection, PpoSection
from direct_rlhf.rollout.native import sample
from direct_rlhf.rollout.types import FinishReason, Rollout, SampleKey, SamplingSettings
from direct_rlhf.train.experience import Experience, Scored
from direct_rlhf.train.step import Optimiser
from direct_rlhf.train.update import Learner

# (prompt ids, response ids, number of actions, finish, text)
ROWS = [
    ([1, 40, 41], [50, 51, 2], 3, FinishReason.EOS, "ab"),  # EOS is an action
    ([1, 42], [52, 53, 54, 2], 3, FinishReason.STOP, "cde"),  # the swapped EOS is none
    ([1, 43, 44, 45], [2], 1, FinishReason.EOS, ""),  # EOS first
    ([1, 46], [55, 56, 57, 58, 59], 5, FinishReason.LENGTH, "fghij"),
]
PROMPTS = [Prompt(f"p{b}", (Turn("human", "?"),), "helpful", "x:1") for b in range(len(ROWS))]
LONGEST_ROW = max(len(prompt_ids) + len(ids) for prompt_ids, ids, *_ in ROWS)  # tokens
N_ROLLOUTS = 8
CAP = 6  # tokens of a sampled answer
LONGEST_SAMPLED = len("Say ") + N_ROLLOUTS + CAP  # tokens: BOS, prompt and answer of the last row of `sampled`
SETTINGS = SamplingSettings(CAP)


def rollout_of(rows, pad_prompt=0, pad_response=0, logprob=-2.0):
    """A rollout of rows such as `ROWS`, every action at the same log-probability."""
    longest_prompt = max(len(row[0]) for row in rows) + pad_prompt
    longest = max(len(row[1]) for row in rows) + pad_response
    prompt = torch.zeros(len(rows), longest_prompt, dtype=torch.long)
    response = torch.zeros(len(rows), longest, dtype=torch.long)
    prompt_mask, response_mask, action_mask = prompt.bool(), response.bool(), response.bool()
    for b, (prompt_ids, ids, actions, _, _) in enumerate(rows):
        first = longest_prompt - len(prompt_ids)
        prompt[b, first:] = torch.tensor(prompt_ids, dtype=torch.long)
        prompt_mask[b, first:] = True
        response[b, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        response_mask[b, : len(ids)] = True
        action_mask[b, :actions] = True
    logprob_BT = torch.where(action_mask, logprob, 0.0)
    keys = tuple(SampleKey(0, f"p{b}", 0, 0) for b in range(len(rows)))
    finish, texts = tuple(row[3] for row in rows), tuple(row[4] for row in rows)
    return Rollout(prompt, prompt_mask, response, response_mask, action_mask, logprob_BT, finish, texts, keys, 0)


def roles_of(base, tuning="full", *, with_cost=False, dtype="float32"):
    """Fresh roles on the model in the folder ``base``; their critics say something."""
    section = ModelSection.model_validate({"base": base, "tuning": tuning, "dtype": dtype, "lora": {"rank": 4}})
    if tuning == "full":
        roles = full_roles(section, base, None, device="cpu", with_cost=with_cost)
    else:
        roles = lora_roles(section, base, device="cpu", seed=0, with_cost=with_cost)
    draw = torch.Generator().manual_seed(1)
    for critic in filter(None, (roles.critic, roles.cost_critic)):
        with torch.no_grad():
            critic.head.weight.copy_(torch.randn(critic.head.weight.shape, generator=draw) / 10)
    return roles


def section_of(**fields):
    """PPO settings at the size of these tests: two minibatches an epoch, two epochs, micro-batches of four rows."""
    sizes = {"rollouts": N_ROLLOUTS, "minibatch_size": 4, "micro_batch_tokens": 4 * LONGEST_SAMPLED, "epochs": 2}
    rate = {"learning_rate": 1e-3, "warmup": 0.0}
    rates = {"optimiser": rate, "critic": {"optimiser": rate}}
    return PpoSection.model_validate(sizes | rates | {"kl": {"inner_limit": 100.0}} | fields)


def learner_of(roles, section, **fields):
    """A learner with fresh optimisers."""
    sections = {role: section.optimiser if role == POLICY else section.critic.optimiser for role in roles.trained}
    optimisers = {role: Optimiser(roles.parameters(role), sections[role], 100) for role in roles.trained}
    chunk = ChunkSize("update", section.micro_batch_tokens, lambda text: None)
    return Learner(
        **{"roles": roles, "section": section, "optimisers": optimisers, "text": None, "seed": 0, "chunk": chunk}
        | fields
    )


def sampled(roles: Roles, base, *, temperature=1.0, version=0):
    """Answers of the roles' own policy to prompts of unlike length."""
    tokens = load_tokens(base)
    prompts = [tokens.encode("Say " + "x" * row, bos=True) for row in range(N_ROLLOUTS)]
    keys = [SampleKey(0, f"p{row}", 0, 0) for row in range(N_ROLLOUTS)]
    settings = replace(SETTINGS, temperature=temperature)
    with roles.acting() as policy:
        return sample(policy, tokens, prompts, keys, settings, policy_version=version).cpu()


def experience_of(rollout, *, seed=0, with_cost=False, keep=None):
    """An experience with random numbers in place of scores, values and advantages."""
    draw = torch.Generator().manual_seed(seed)
    mask = rollout.action_mask_BT

    def noise(scale=1.0):
        return torch.where(mask, torch.randn(mask.shape, generator=draw) * scale, 0.0)

    score_B = torch.randn(len(rollout), generator=draw)
    keep_B = torch.ones(len(rollout), dtype=torch.bool) if keep is None else torch.tensor(keep)
    reference_BT, value_BT, advantage_BT, return_BT = rollout.logprob_BT + noise(0.1), noise(0.1), noise(), noise()
    scored = Scored(rollout, score_B, 0, score_B, keep_B, reference_BT, value_BT)
    if not with_cost:
        return Experience(scored, mask & keep_B[:, None], advantage_BT, return_BT)
    costs = Scored(rollout, score_B, 0, score_B, keep_B, reference_BT, value_BT, -score_B, -score_B, noise(0.1))
    return Experience(costs, mask & keep_B[:, None], advantage_BT, return_BT, noise())


def gradients(roles, role):
    """Copies of a role's gradients, one flat tensor in float64."""
    return torch.cat([parameter.grad.detach().double().flatten() for parameter in roles.parameters(role)])


def everything(roles):
    """All trained tensors by role and name, as copies."""
    return {f"{role}/{name}": tensor for role in roles.trained for name, tensor in roles.state(role).items()}


def unequal(one, other):
    """Names of tensors that differ by a bit."""
    return [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])]


class Memory:
    """Wraps a function of (model, ids [B, L], ...): memory runs out above ``rows`` rows."""

    def __init__(self, function, rows, *, ids_at=1):
        self.function, self.rows, self.ids_at = function, rows, ids_at
        self.raised: list[int] = []
        self.seen: list[int] = []

    def __call__(self, *args, **options):
        size = args[self.ids_at].shape[0]
        self.seen.append(size)
        if size > self.rows:
            self.raised.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.function(*args, **options)


def write_reward_model(folder, base, tuning="full", *, seed=1, lora=None, settings=None):
    """A reward model of the model in the folder ``base``, random and normalised by (raw - 0.5) / 0.25."""
    tokens, model = load_tokens(base), load_causal_lm(base)
    identity = base_sha256(model)
    if tuning == "lora":
        model = add_lora(model, lora or LoraSection(rank=4), "reward", seed=seed)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) / 5)
    facts = Facts(DialogueSection(), 128, 96, str(base), None, identity, tokens.sha256, tuning)
    quantiles = {"0.01": -0.1, "0.05": 0.0, "0.1": 0.1, "0.5": 0.5}
    normalisation = Normalisation(0.5, 0.25, quantiles, 100, True, identity, asdict(settings or SETTINGS), "00")
    scalar = ScalarModel.from_base(model, seed=seed)
    RewardModel(scalar, tokens, facts, normalisation, "cpu", "float32").save(folder)
    return folder
