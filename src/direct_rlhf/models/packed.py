"""The Llama family's forward on packed tokens: rows stand one after the other, and no padding is computed.

It is the model's own arithmetic on the model's own layers (adapters and autocast included), with three fused steps
whose backward keeps less and reads less: norm, rotation, gated product. Attention alone looks at rows, in groups of
like length. `packs` tries it on each model against the model's own forward before it is used.

Legend: N packed tokens, H hidden size, D head size.
"""

import weakref
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from direct_rlhf.maths.attention import Rows, attend, few_sizes
from direct_rlhf.models.recompute import recomputed
from direct_rlhf.models.sharded import call
from direct_rlhf.precision import makes_kernels
from direct_rlhf.rollout.decoder import compute_dtype, in_family, window_of

TRIED = (5, 3)  # lengths of the rows on which a model is tried

_verdicts: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def packs(backbone: Any) -> bool:
    """Whether a model (without its head and its PEFT wrapper) runs packed: known by its class, and tried once."""
    if not in_family(backbone):
        return False
    if backbone not in _verdicts:
        _verdicts[backbone] = _agrees(backbone)
    return _verdicts[backbone]


@torch.no_grad()
def _agrees(backbone: Any) -> bool:
    """On two rows at once, when the model is first used: later weights follow the same arithmetic."""
    device = backbone.device
    rows = rows_of(backbone, tuple(sorted(TRIED)))
    ids_N = torch.arange(sum(TRIED), device=device) % backbone.config.vocab_size
    ours_NH = hidden(backbone, ids_N, rows)
    own = [backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in ids_N.split(rows.lengths)]
    own_NH = torch.cat(own)
    if not bool(own_NH.isfinite().all()):
        return True
    reduced = torch.is_autocast_enabled(device.type) or own_NH.dtype is not torch.float32
    return bool((own_NH - ours_NH).abs().max() <= (0.1 if reduced else 1e-3) * (own_NH.abs().max() + 1e-3))


def rows_of(model: Any, lengths: tuple[int, ...]) -> Rows:
    """Packed rows of these lengths (shortest first), as the type that ``model`` computes in now wants them."""
    return Rows(lengths, model.device, makes_kernels(model.device, compute_dtype(model)))


def hidden(backbone: Any, ids_N: Tensor, rows: Rows) -> Tensor:
    """Last hidden states after the final norm [N, H] of packed rows."""
    n_tokens = len(ids_N)
    filler = few_sizes(n_tokens) - n_tokens if rows.few else 0  # tokens that attention and the caller never see
    hidden_NH = backbone.embed_tokens(_filled(ids_N, filler))
    cos, sin = backbone.rotary_emb(hidden_NH, _filled(rows.position_N, filler)[None])
    cos_N1D, sin_N1D = cos[0][:, None], sin[0][:, None]
    for index, layer in enumerate(backbone.layers):
        window = window_of(backbone.config, index)
        step = partial(_layer, layer, cos_N1D=cos_N1D, sin_N1D=sin_N1D, rows=rows, window=window, filler=filler)
        hidden_NH = call(layer, recomputed(layer, step), hidden_NH)
    return norm(hidden_NH, backbone.norm)[:n_tokens]


def _layer(
    layer: Any, hidden_NH: Tensor, *, cos_N1D: Tensor, sin_N1D: Tensor, rows: Rows, window: int | None, filler: int
) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    normed = norm(hidden_NH, layer.input_layernorm)
    query, key, value = (
        linear(normed).unflatten(-1, (-1, attention.head_dim))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = norm(query, attention.q_norm), norm(key, attention.k_norm)
    query, key = rotate(query, cos_N1D, sin_N1D), rotate(key, cos_N1D, sin_N1D)
    seen = attend(query, key, value, rows, window=window, scale=attention.scaling)
    hidden_NH = hidden_NH + attention.o_proj(_filled(seen.flatten(1), filler))
    normed = norm(hidden_NH, layer.post_attention_layernorm)
    return hidden_NH + mlp.down_proj(gated(mlp.gate_proj(normed), mlp.up_proj(normed)))


def _filled(x: Tensor, filler: int) -> Tensor:
    """``filler`` zeros more at the end of the first dimension."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, filler)) if filler else x


def norm(x: Tensor, module: Any) -> Tensor:
    """Root-mean-square norm, computed in float32, in the type of ``x``."""
    if x.device.type == "cpu" and x.dtype is torch.float32:
        return _Norm.apply(x, module.weight, module.variance_epsilon)
    if x.device.type == "cuda":
        return F.rms_norm(x, x.shape[-1:], module.weight.to(x.dtype), module.variance_epsilon)
    return module(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [N, heads, D]; cos and sin [N, 1, D]."""
    return _Rotate.apply(x, cos, sin)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _Gated.apply(gate, up)


class _Norm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^(-1/2):  dx = r (g w) - x r^3 mean(x g w),  dw = sum(g x r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (gradient * x).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        inner = gradient * weight
        along = torch.linalg.vecdot(inner, x).unsqueeze(-1).mul_(scale.pow(3)).div_(-x.shape[-1])
        return inner.mul_(scale).addcmul_(x, along), by_weight, None


class _Rotate(torch.autograd.Function):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); backward is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, -sin).to(ctx.dtype), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class _Gated(torch.autograd.Function):
    """silu(g) u; keeps g and u alone, and computes silu(g) again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        gate, up = ctx.saved_tensors
        by_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return by_gate, F.silu(gate).mul_(gradient)
