import pytest
import torch
from tiny_models import CONFIGS, random_batch, tiny_lm
from torch.nn import functional as F

from direct_rlhf.maths.attention import Rows
from direct_rlhf.models.forward import backbone, token_logprobs
from direct_rlhf.models.loading import add_lora
from direct_rlhf.models.packed import gated, hidden, norm, packs, rotate
from direct_rlhf.recipe.schema import LoraSection

FAMILY = ["mistral", "llama", "qwen2"]
LENGTHS = (1, 4, 5, 13)  # 23 tokens, with few sizes 24; the longest passes the tiny Mistral's window of 8


def test_the_family_is_packed_and_nothing_else():
    assert [name for name in CONFIGS if packs(backbone(tiny_lm(name).eval()))] == FAMILY


@pytest.mark.parametrize(("lora", "few"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", FAMILY)
def test_packed_rows_equal_the_models_own_forward_one_by_one_in_value_and_gradient(name, lora, few):
    model = tiny_lm(name, scale=2.0).eval()
    if lora:
        model = add_lora(model, LoraSection(rank=2))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    trunk, parameters = backbone(model), [p for p in model.parameters() if p.requires_grad]
    ids_N = torch.randint(3, 300, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    ours = hidden(trunk, ids_N, Rows(LENGTHS, ids_N.device, few))
    own = torch.cat([trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in ids_N.split(LENGTHS)])
    torch.testing.assert_close(ours, own, atol=2e-5, rtol=1e-4)
    weight = torch.randn(own.shape, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad((x * weight).sum(), parameters, allow_unused=True) for x in (ours, own)]
    assert sum(gradient is not None for gradient in gradients[0]) > 4
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() <= 2e-3 * other.abs().max()


def test_a_model_whose_own_forward_differs_is_not_packed():
    model = tiny_lm().eval()
    layer = model.model.layers[1]
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: own(x) + 0.1
    assert not packs(backbone(model))
    batch = random_batch()
    with torch.no_grad():  # and its log-probabilities are those of its own forward
        ours = token_logprobs(model, *batch).logprob_BL
        row = batch[1][0]
        ids = batch[0][0, row]
        logp = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        expected = logp[:-1].gather(-1, ids[1:, None])[:, 0]
    target = batch[2][0, row][1:]
    torch.testing.assert_close(ours[0, row][1:][target], expected[target], atol=1e-4, rtol=1e-4)


class _Module:
    variance_epsilon = 1e-5

    def __init__(self, weight):
        self.weight = weight


def plain_norm(x, module):
    return x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight


def plain_rotation(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


STEPS = {
    "norm": (lambda x, w: norm(x, _Module(w)), lambda x, w: plain_norm(x, _Module(w)), [(5, 3, 8), (8,)]),
    "gated": (gated, lambda gate, up: F.silu(gate) * up, [(7, 8), (7, 8)]),
    "rotation": (
        lambda x: rotate(x, COS, SIN),
        lambda x: plain_rotation(x, COS, SIN),
        [(5, 3, 8)],
    ),
}
ANGLE = torch.arange(5.0)[:, None, None] * torch.linspace(0.1, 1, 4).repeat(2)
COS, SIN = ANGLE.cos(), ANGLE.sin()


@pytest.mark.parametrize("step", STEPS)
def test_a_fused_step_equals_the_plain_formula_in_value_and_gradient(step):
    fused, plain, shapes = STEPS[step]
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes]
    ours, expected = fused(*inputs), plain(*inputs)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn(expected.shape, generator=draw)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_packed_gradients_do_not_depend_on_which_rows_stand_together(name):
    model = tiny_lm(name, scale=2.0).eval()
    ids_BL, mask_BL, target_BL = random_batch()

    def gradients(batches):
        model.zero_grad()
        for rows in batches:
            token_logprobs(model, ids_BL[rows], mask_BL[rows], target_BL[rows]).logprob_BL.sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    rows = list(range(len(ids_BL)))
    together, apart = gradients([rows]), gradients([[row] for row in rows])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
