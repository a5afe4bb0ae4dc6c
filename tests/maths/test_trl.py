"""Cross-check against TRL 1.12.0, the last release with PPO, where it is installed (it is no dependency)."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from direct_rlhf.maths.masked import masked_mean, masked_var, whiten
from direct_rlhf.maths.rewards import token_rewards
from direct_rlhf.rollout.native import sample
from direct_rlhf.rollout.types import FinishReason, SampleKey, SamplingSettings
from maths.batches import exactly, random_batch

pytest.importorskip("trl.experimental.ppo", reason="an optional cross-check: pip install trl==1.12.0")
from trl.experimental.ppo import ppo_trainer as trl

PAD, EOS, NEVER, VOCABULARY = 0, 2, 999, 8


@pytest.mark.parametrize("seed", range(5))
def test_whitening_is_theirs_but_for_the_unbiased_variance(seed):
    (x, _, _), mask = random_batch(seed, n_rows=40)
    n = int(mask.sum())
    exactly(masked_mean(x, mask), trl.masked_mean(x, mask))
    exactly(masked_var(x, mask), trl.masked_var(x, mask, unbiased=False))
    theirs = trl.masked_whiten(x, mask).masked_fill(~mask, 0)
    # their n / (n - 1) is float32
    assert_close(whiten(x, mask) * ((n - 1) / n) ** 0.5, theirs, rtol=0, atol=2e-7)


class Ids:
    """Stands in for ``Tokens`` with the given EOS: the cross-check is about ids, not text."""

    def __init__(self, eos_id):
        self.pad_id, self.bos_id, self.eos_id, self.eos_ids = PAD, 1, eos_id, frozenset([eos_id])

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def test_answers_end_where_theirs_are_truncated_and_the_score_is_paid_there():
    """Our sampler stops at EOS; theirs runs to the cap and cuts afterwards. One stream of random numbers, two ways."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).eval()
    keys = [SampleKey(0, str(i), 0, 0) for i in range(64)]
    settings = SamplingSettings(max_new_tokens=12)
    uncut = sample(model, Ids(NEVER), [[1, 3]] * 64, keys, settings)
    ours = sample(model, Ids(EOS), [[1, 3]] * 64, keys, settings)
    theirs = trl.truncate_response(EOS, PAD, uncut.response_ids_BT)
    assert ours.finish.count(FinishReason.EOS) > 20
    assert ours.finish.count(FinishReason.LENGTH) > 5
    assert torch.equal(ours.response_ids_BT, theirs)
    paid = token_rewards(torch.ones(64), torch.zeros(64, 12), ours.action_mask_BT, beta=0.1)
    last = trl.first_true_indices(uncut.response_ids_BT == EOS).clamp(max=11)
    assert torch.equal(paid.argmax(1), last)
    assert torch.equal(paid.sum(1), torch.ones(64))
