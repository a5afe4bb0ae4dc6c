import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers
from torch.testing import assert_close

from direct_rlhf.maths.advantages import gae

NAN = float("nan")


def random_experience(seed, n_rows=5, n_slots=7):
    """Rewards and values in float64 on rows of length 0 to n_slots, NaN under the padding."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, n_slots + 1, (n_rows,), generator=draw)
    lengths[:3] = torch.tensor([n_slots, 1, 0])
    mask = torch.arange(n_slots) < lengths[:, None]
    reward, value = (
        torch.where(mask, torch.randn(n_rows, n_slots, generator=draw, dtype=torch.float64), NAN) for _ in range(2)
    )
    return reward, value, mask


def gae_by_definition(reward, value, mask, *, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, one sum per slot: O(n^2)."""
    out = torch.zeros_like(reward)
    for b in range(len(reward)):
        length = int(mask[b].sum())
        values = [*value[b, :length].tolist(), 0.0]
        deltas = [reward[b, t].item() + gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            out[b, t] = sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length))
    return out


@given(seed=integers(0, 999), gamma=floats(0.5, 1), lam=floats(0, 1))
def test_recursion_equals_the_definition(seed, gamma, lam):
    experience = random_experience(seed)
    assert_close(
        gae(*experience, gamma=gamma, lam=lam), gae_by_definition(*experience, gamma=gamma, lam=lam), rtol=0, atol=1e-10
    )


def test_lambda_1_is_reward_to_go_minus_value():
    reward, value, mask = random_experience(1)
    reward_to_go = torch.where(mask, reward, 0.0).flip(1).cumsum(1).flip(1)
    assert_close(gae(reward, value, mask, gamma=1.0, lam=1.0), torch.where(mask, reward_to_go - value, 0.0))


def test_lambda_0_is_the_td_error():
    reward, value, mask = random_experience(2)
    chosen = torch.where(mask, value, 0.0)
    following = torch.cat([chosen[:, 1:], torch.zeros_like(chosen[:, :1])], dim=1)
    td_error = torch.where(mask, reward + 0.9 * following - value, 0.0)
    assert_close(gae(reward, value, mask, gamma=0.9, lam=0.0), td_error)


@given(pad=integers(0, 9), seed=integers(0, 999))
def test_padding_on_either_side_does_not_change_advantages(pad, seed):
    reward, value, mask = random_experience(seed)
    expected = gae(reward, value, mask, gamma=0.99, lam=0.95)
    for sides in [(0, pad), (pad, 0)]:
        longer = [
            torch.nn.functional.pad(x, sides, value=fill) for x, fill in [(reward, NAN), (value, NAN), (mask, False)]
        ]
        advantage = gae(*longer, gamma=0.99, lam=0.95)
        assert torch.equal(advantage[:, sides[0] : sides[0] + mask.shape[1]], expected)
        assert not advantage[~longer[2]].any()


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="equal shape"):
        gae(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
