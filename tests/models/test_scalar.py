import pytest
import torch
from tiny_models import random_batch, tiny_lm

from direct_rlhf.models.loading import add_lora
from direct_rlhf.models.scalar import ScalarModel
from direct_rlhf.recipe.schema import LoraSection


@pytest.mark.parametrize("name", ["mistral", "gpt2", "opt"])
def test_score_is_the_value_at_the_last_real_token_wherever_the_padding_is(name):
    scalar = ScalarModel.from_base(tiny_lm(name).eval(), seed=1)
    ids_BL, mask_BL, _ = random_batch()
    value_BL, score_B = scalar.values(ids_BL, mask_BL), scalar.scores(ids_BL, mask_BL)
    assert value_BL.dtype == score_B.dtype == torch.float32
    assert (value_BL[~mask_BL] == 0).all()
    for row in range(len(ids_BL)):
        last = mask_BL[row].nonzero().max()
        assert torch.equal(score_B[row], value_BL[row, last])
        alone = scalar.scores(ids_BL[row, mask_BL[row]].unsqueeze(0), torch.ones(1, int(mask_BL[row].sum())))
        torch.testing.assert_close(alone[0], score_B[row], atol=1e-5, rtol=1e-5)


def test_values_see_only_what_stands_before_them():
    scalar = ScalarModel.from_base(tiny_lm().eval(), seed=1)
    ids_BL, mask_BL = torch.randint(3, 300, (1, 10)), torch.ones(1, 10, dtype=torch.bool)
    other_BL = ids_BL.clone()
    other_BL[0, 6:] = 5
    torch.testing.assert_close(scalar.values(ids_BL, mask_BL)[0, :6], scalar.values(other_BL, mask_BL)[0, :6])


def test_a_head_comes_from_its_seed_and_is_small_at_the_start():
    one, same, other = (ScalarModel.from_base(tiny_lm().eval(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    ids_BL, mask_BL, _ = random_batch()
    assert 0 < one.scores(ids_BL, mask_BL).abs().max() < 0.5


def test_a_critic_from_a_reward_model_gives_its_values_in_normalised_units():
    reward = ScalarModel.from_base(tiny_lm().eval(), seed=1)
    critic = reward.as_critic(mean=0.3, std=0.02)
    ids_BL, mask_BL, _ = random_batch()
    expected = (reward.values(ids_BL, mask_BL) - 0.3) / 0.02
    torch.testing.assert_close(critic.values(ids_BL, mask_BL)[mask_BL], expected[mask_BL], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        next(critic.trunk.parameters()).add_(1.0)
    assert not torch.equal(next(critic.trunk.parameters()), next(reward.trunk.parameters()))
    again = critic.as_critic(mean=1.0, std=2.0)
    torch.testing.assert_close(
        again.values(ids_BL, mask_BL)[mask_BL], (critic.values(ids_BL, mask_BL)[mask_BL] - 1) / 2, atol=1e-4, rtol=1e-4
    )


def test_a_zero_critic_says_zero_and_can_learn():
    critic = ScalarModel.zero(tiny_lm().eval())
    ids_BL, mask_BL, _ = random_batch()
    value_BL = critic.values(ids_BL, mask_BL)
    assert (value_BL == 0).all()
    (value_BL - 1)[mask_BL].square().mean().backward()
    assert critic.head.weight.grad.abs().max() > 0
    assert critic.head.bias.grad.abs().max() > 0


def test_the_trunk_is_shared_or_copied_as_asked_and_has_no_language_head():
    model = tiny_lm().eval()
    assert ScalarModel.zero(model).trunk is model.model
    assert ScalarModel.zero(model, copy_trunk=True).trunk is not model.model
    assert not any("lm_head" in name for name, _ in ScalarModel.zero(model).named_parameters())
    adapted = add_lora(model, LoraSection(rank=2), "critic")
    assert ScalarModel.zero(adapted).trunk is adapted


def test_the_head_computes_in_float32_under_autocast():
    scalar = ScalarModel.from_base(tiny_lm().eval(), seed=1)
    seen = []
    scalar.head.weight.data.mul_(1.0)
    hidden = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.append(scalar._apply_head(hidden))
    assert torch.equal(seen[0], scalar._apply_head(hidden))


def test_a_row_without_a_token_has_no_score():
    scalar = ScalarModel.zero(tiny_lm().eval())
    with pytest.raises(ValueError, match="no token"):
        scalar.scores(torch.ones(2, 3, dtype=torch.long), torch.tensor([[True] * 3, [False] * 3]))
