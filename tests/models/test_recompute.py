import pytest
import torch
from tiny_models import tiny_lm

from direct_rlhf.models.forward import token_logprobs
from direct_rlhf.models.loading import add_lora
from direct_rlhf.models.packed import packs
from direct_rlhf.models.recompute import layers_of, recompute_layers
from direct_rlhf.recipe.schema import LoraSection


def gradients(model):
    """Gradients by name, and the bytes that the forward pass keeps for them."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids_BL = torch.arange(64).view(2, 32) % 300 + 3
    mask_BL = torch.ones_like(ids_BL).bool()
    target_BL = mask_BL.clone()
    target_BL[:, 0] = False
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = -token_logprobs(model, ids_BL, mask_BL, target_BL).logprob_BL.mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["mistral", "gpt2"])  # our own forward, and the model's
def test_layers_that_are_computed_again_give_the_same_gradients_and_keep_less(name, lora):
    found = []
    for again in (False, True):
        model = tiny_lm(name).eval()
        if lora:
            model = add_lora(model, LoraSection(rank=4), "policy", seed=0)
        if again:
            recompute_layers(model)
            recompute_layers(model)  # a trunk that two roles share is marked once
        found.append(gradients(model))
        assert packs(getattr(model.get_base_model() if lora else model, "model", model)) == (name == "mistral")
    (plain, all_kept), (recomputed, less) = found
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-6, atol=1e-8)
    assert less < 0.8 * all_kept


def test_layers_are_found_whatever_their_family_calls_them():
    assert [len(layers_of(tiny_lm(name))) for name in ("mistral", "gpt2", "opt", "bloom", "phi")] == [2] * 5
    assert layers_of(torch.nn.Linear(1, 1)) == []
