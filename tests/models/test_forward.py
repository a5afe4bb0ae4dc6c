import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, random_batch, tiny_lm

from direct_rlhf.errors import ConfigError
from direct_rlhf.models.forward import backbone, check_head, final_logits, states, token_logprobs
from direct_rlhf.models.loading import add_lora
from direct_rlhf.recipe.schema import LoraSection


def naive(model, ids_BL, mask_BL, target_BL, temperature=1.0):
    """Log-probabilities and entropies row by row, without padding, from the model's own full forward."""
    logprob_BL, entropy_BL = torch.zeros(ids_BL.shape), torch.zeros(ids_BL.shape)
    for row in range(len(ids_BL)):
        slots = mask_BL[row].nonzero().flatten()
        ids = ids_BL[row, slots]
        logp = (model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float() / temperature).log_softmax(-1)
        for place, slot in enumerate(slots.tolist()):
            if target_BL[row, slot]:
                logprob_BL[row, slot] = logp[place - 1, ids[place]]
                entropy_BL[row, slot] = -(logp[place - 1].exp() * logp[place - 1]).sum()
    return logprob_BL, entropy_BL


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logprobs_and_entropy_equal_the_models_own_full_forward(name):
    model = tiny_lm(name).eval()
    batch = random_batch()
    ours = token_logprobs(model, *batch, temperature=0.7)
    logprob_BL, entropy_BL = naive(model, *batch, temperature=0.7)
    torch.testing.assert_close(ours.logprob_BL, logprob_BL, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.entropy_BL, entropy_BL, atol=1e-5, rtol=1e-5)
    assert logprob_BL.std() > 0.3  # else the comparison says little
    check_head(model)


@pytest.mark.parametrize("name", ["mistral", "gpt2", "gemma2", "bloom"])
def test_padding_side_and_amount_change_neither_value_nor_gradient(name):
    model = tiny_lm(name).eval()
    ids_BL, mask_BL, target_BL = random_batch()
    left, right = 3, 7
    pad = lambda x_BL, fill: torch.nn.functional.pad(x_BL, (left, right), value=fill)
    results = []
    for ids, mask, target in [
        (ids_BL, mask_BL, target_BL),
        (pad(ids_BL, 9), pad(mask_BL, False), pad(target_BL, False)),
    ]:
        model.zero_grad()
        logprob_BL = token_logprobs(model, ids, mask, target).logprob_BL
        logprob_BL.sum().backward()
        results.append(
            (logprob_BL[target].detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_ids_under_the_padding_do_not_matter_and_padded_slots_are_zero():
    model = tiny_lm().eval()
    ids_BL, mask_BL, target_BL = random_batch()
    other_BL = torch.where(mask_BL, ids_BL, 7)
    ours = token_logprobs(model, ids_BL, mask_BL, target_BL)
    assert torch.equal(ours.logprob_BL, token_logprobs(model, other_BL, mask_BL, target_BL).logprob_BL)
    assert (ours.logprob_BL[~target_BL] == 0).all()
    assert (ours.entropy_BL[~target_BL] == 0).all()
    found, alone = states(model, ids_BL, mask_BL), states(model, ids_BL[1:2, 5:], mask_BL[1:2, 5:])
    assert torch.equal(alone.column_N + 5, found.column_N[found.row_N == 1])
    torch.testing.assert_close(found.hidden_NH[found.row_N == 1], alone.hidden_NH, atol=1e-5, rtol=1e-5)


def test_chunks_change_neither_value_nor_gradient():
    model = tiny_lm().eval()
    batch = random_batch()
    gradients = []
    for chunk_elements in (2**25, VOCABULARY * 3):
        model.zero_grad()
        scored = token_logprobs(model, *batch, chunk_elements=chunk_elements)
        (scored.logprob_BL + 0.1 * scored.entropy_BL).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does():
    batch = random_batch()
    expected = token_logprobs(tiny_lm().eval(), *batch).logprob_BL
    model = add_lora(tiny_lm().eval(), LoraSection(rank=4), "policy")
    assert torch.equal(token_logprobs(model, *batch).logprob_BL, expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    changed = token_logprobs(model, *batch).logprob_BL
    assert (changed - expected).abs().max() > 0.01
    torch.testing.assert_close(changed, naive(model, *batch)[0], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(token_logprobs(model, *batch).logprob_BL, expected)
    assert type(backbone(model)).__name__ == "MistralModel"


def test_gradients_reach_only_the_adapter():
    model = add_lora(tiny_lm().eval(), LoraSection(rank=4), "policy")
    token_logprobs(model, *random_batch()).logprob_BL.sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched
    assert all("lora_" in name for name in touched)


@pytest.mark.promise("N7")
def test_all_padding_rows_and_batches_without_targets_are_finite():
    model = tiny_lm().eval()
    ids_BL, mask_BL, target_BL = random_batch()
    mask_BL[2], target_BL[2] = False, False
    logprob_BL = token_logprobs(model, ids_BL, mask_BL, target_BL).logprob_BL
    assert torch.isfinite(logprob_BL).all()
    nothing = token_logprobs(model, ids_BL, mask_BL, torch.zeros_like(mask_BL)).logprob_BL
    assert (nothing == 0).all()
    nothing.sum().backward()
    padding = torch.zeros_like(mask_BL)
    assert (token_logprobs(model, ids_BL, padding, padding).logprob_BL == 0).all()


@pytest.mark.parametrize("slot", [5, 4], ids=["first token of its row", "padding"])
def test_a_target_that_nothing_precedes_is_refused(slot):
    ids_BL, mask_BL, target_BL = random_batch()
    target_BL[1, slot] = True
    with pytest.raises(ValueError, match="nothing predicts"):
        token_logprobs(tiny_lm().eval(), ids_BL, mask_BL, target_BL)


def test_logits_of_minus_infinity_give_a_finite_entropy():
    model = tiny_lm("cohere").eval()
    batch = random_batch()

    class Head(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).index_fill(-1, torch.tensor([0]), float("-inf"))

    head = Head(32, VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert torch.isfinite(token_logprobs(model, *batch).entropy_BL).all()
    assert final_logits(model, torch.ones(1, 32))[0, 0] == float("-inf")


def test_an_architecture_with_other_logits_is_refused_by_name():
    model = tiny_lm().eval()
    forward = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = out.logits * 3
            return out

    model.__class__ = Odd
    with pytest.raises(ConfigError, match="Odd: its logits are not its head"):
        check_head(model)
