"""The fast path of the sampler: decoder layers of the Llama family over a preallocated key-value cache.

The cache has rows; the first of them are in use, each at its own position, so that a prompt can take the row of a
finished answer at any time. Weights that are applied to one input stand together, and a step costs the arithmetic of
the running rows and little beside it. It computes what the model's own forward computes: `supports` tries that on each
model before it is used.

Legend: A rows, N packed prompt tokens of several rows, S slots of the cache, H hidden size, Q query heads, G of them to
each of K key-value heads, D head size.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from direct_rlhf.maths.attention import Rows, attend
from direct_rlhf.precision import arithmetic

FAMILY = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}  # the others change with the length of the text
ROUND = 8  # rows and attended slots are rounded up: fewer shapes to prepare kernels for
FUSED_BYTES = 2**30  # layer weights beyond this are used where they are: a copy would cost more than it saves
HIDDEN = float("-inf")
TRIED = 6  # tokens on which the fast path is compared with the model's own forward

log = logging.getLogger(__name__)
_verdicts: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    qkv: Callable[[Tensor], Tensor]
    query_norm: Tensor | None  # per head, before the rotation (Qwen3)
    key_norm: Tensor | None
    out: Callable[[Tensor], Tensor]
    mlp_norm: Tensor
    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    window: int | None  # slots that a token sees, itself included


def compute_dtype(model: Any) -> torch.dtype:
    """What the model's matrix products run in here and now: autocast's type or the weights', if the device has it."""
    device = model.device
    own: torch.dtype = model.dtype
    if torch.is_autocast_enabled(device.type):
        own = torch.get_autocast_dtype(device.type)
    return arithmetic(device, own)


def supports(model: Any) -> bool:
    """Whether the fast path computes this model: known by its class, and tried once against the model's own forward."""
    inner = _unwrapped(model)
    if not in_family(getattr(inner, "model", inner)) or getattr(getattr(inner, "lm_head", None), "bias", 0) is not None:
        return False
    if inner not in _verdicts:
        _verdicts[inner] = _agrees(model, inner)
    return _verdicts[inner]


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def in_family(backbone: Any) -> bool:
    """Whether a model without its head is of the architectures whose arithmetic is written out here."""
    if type(backbone).__name__ not in FAMILY:
        return False
    config = backbone.config
    rope = getattr(config, "rope_parameters", None) or {}
    weights = [layer.self_attn.q_proj for layer in backbone.layers]
    return (
        getattr(config, "hidden_act", None) in {"silu", "swish"}
        and rope.get("rope_type", "default") in STATIC_ROPE
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and all(getattr(linear, "base_layer", linear).weight.is_floating_point() for linear in weights)
    )


@torch.inference_mode()
def _agrees(model: Any, inner: Any) -> bool:
    ids = torch.arange(TRIED, device=inner.device) % inner.config.vocab_size
    own = model(input_ids=ids[None], use_cache=False).logits[0, -1]
    tolerance = 1e-3 if own.dtype is torch.float32 and compute_dtype(model) is torch.float32 else 0.1
    decoder = Decoder(model, rows=1, slots=TRIED)
    decoder.prefill([0], [ids[:-1].tolist()])
    ours = decoder.step(ids[-1:])[0]
    close = (own - ours).abs().max() <= tolerance * (own.abs().max() + 1e-3)
    return bool(close) or not bool(
        own.isfinite().all()
    )  # a model of NaN is found by the sampler, which names the prompt


class Decoder:
    """Weights made ready, a cache of ``rows`` x ``slots``, and the two forwards: prompts, and one token for each row.

    Memory: 2 x layers x rows x slots x K x D cache elements in `compute_dtype`, and a copy of the layer weights where
    these are small or of another type.
    """

    refills = True  # a prompt may start while other rows go on

    def __init__(self, model: Any, *, rows: int, slots: int) -> None:
        inner = _unwrapped(model)
        config, first = inner.config, inner.model.layers[0]
        self.device, self.dtype = inner.device, compute_dtype(model)
        self.residual_dtype = arithmetic(self.device, inner.dtype)  # as the model's own residual stream
        self.eps = float(config.rms_norm_eps)
        self.head_size = int(first.self_attn.head_dim)
        self.n_keys = int(config.num_key_value_heads)
        self.group = int(config.num_attention_heads) // self.n_keys
        self.scale = self.head_size**-0.5
        self._rows = _rounded(rows)
        self._fuse = self._must_copy(inner)
        with torch.autocast(self.device.type, enabled=False):
            self.embedding = inner.model.embed_tokens.weight
            self.norm = inner.model.norm.weight.to(self.residual_dtype)
            self.head = _linear(inner.lm_head.weight.detach().to(self.dtype), None, self._rows, fuse=self._fuse)
            self.layers = [self._layer(layer, index, config) for index, layer in enumerate(inner.model.layers)]
            positions = torch.arange(slots, device=self.device)[None]
            sample = torch.empty(1, dtype=torch.float32, device=self.device)
            cos, sin = (part[0] for part in inner.model.rotary_emb(sample, positions))
        # rotate_half as a product: its sign goes into the sine
        sign = torch.ones_like(sin)
        sign[:, : self.head_size // 2] = -1
        self.cos_SD, self.sin_SD = cos.to(self.residual_dtype), (sin * sign).to(self.residual_dtype)

        size = (len(self.layers), _rounded(rows), self.n_keys)
        slots = _rounded(slots)
        # Keys lie transposed, so that the scores are a plain product.
        self.key = torch.zeros(*size, self.head_size, slots, dtype=self.dtype, device=self.device)
        self.value = torch.zeros(*size, slots, self.head_size, dtype=self.dtype, device=self.device)
        self.windows = sorted({layer.window for layer in self.layers if layer.window and layer.window < slots})
        # What is added to the scores: 0 on a slot that the row may see, else minus infinity; one for each window.
        self.bias = {
            window: torch.full((_rounded(rows), slots), HIDDEN, dtype=self.dtype, device=self.device)
            for window in (None, *self.windows)
        }
        self.position_A = torch.zeros(_rounded(rows), dtype=torch.int64, device=self.device)  # of the next token
        self.lengths: list[int] = []  # the same on the host, of the rows in use

    def _must_copy(self, inner: Any) -> bool:
        """Whether the layers' weights are copied: another type is computed in, or they are small enough.

        LoRA updates are merged into such a copy, but never in bfloat16, whose rounding would swallow them.
        """
        weights = [parameter for parameter in inner.model.layers.parameters() if parameter.dim() == 2]
        adapted = any(hasattr(linear, "base_layer") for linear in inner.model.layers.modules())
        if inner.dtype is not self.dtype:
            return True
        small = sum(weight.numel() for weight in weights) * self.dtype.itemsize <= FUSED_BYTES
        return small and not (adapted and self.dtype is torch.bfloat16)

    def _layer(self, layer: Any, index: int, config: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        types = getattr(config, "layer_types", None)
        windowed = types[index] == "sliding_attention" if types else True

        def norm(module: Any, dtype: torch.dtype) -> Tensor | None:
            return None if module is None else module.weight.detach().to(dtype)

        def linear(*modules: Any) -> Callable[[Tensor], Tensor]:
            return _fused(modules, self.dtype, self._rows) if self._fuse else _joined(modules)

        return _Layer(
            attention_norm=layer.input_layernorm.weight.detach().to(self.residual_dtype),
            qkv=linear(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=norm(getattr(attention, "q_norm", None), self.dtype),
            key_norm=norm(getattr(attention, "k_norm", None), self.dtype),
            out=linear(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight.detach().to(self.residual_dtype),
            gate_up=linear(mlp.gate_proj, mlp.up_proj),
            down=linear(mlp.down_proj),
            window=getattr(config, "sliding_window", None) if windowed else None,
        )

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Put prompts into these rows; logits [A, V] after each. A prompt that stands there several times runs once.

        ``rows`` are rows that rest, or the first ones after those in use.
        """
        first: dict[tuple[int, ...], int] = {}  # place of each distinct prompt among them
        which = [first.setdefault(tuple(prompt), len(first)) for prompt in prompts]
        source = [rows[which.index(place)] for place in range(len(first))]
        with torch.autocast(self.device.type, enabled=False):
            logits_AV = self._prefill(source, list(first))
        if len(first) == len(rows):
            return logits_AV
        copies = [(source[place], row) for place, row in zip(which, rows, strict=True) if source[place] != row]
        self._copy(*zip(*copies, strict=True))
        return logits_AV[torch.tensor(which, device=self.device)]

    def _prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Their tokens packed, the shortest prompt first, as attention wants them."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        packed = Rows(tuple(len(prompts[index]) for index in order), self.device)
        ids_N = torch.tensor([token for index in order for token in prompts[index]], device=self.device)
        row_A = torch.tensor([rows[index] for index in order], device=self.device)
        length_A = torch.tensor(packed.lengths, device=self.device)
        here = (row_A.repeat_interleave(length_A, output_size=len(ids_N)), packed.position_N)
        cos_N1D, sin_N1D = (table[packed.position_N][:, None] for table in (self.cos_SD, self.sin_SD))
        hidden_NH = F.embedding(ids_N, self.embedding).to(self.residual_dtype)
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden_NH, cos_N1D, sin_N1D)
            self.key[index].permute(0, 3, 1, 2).index_put_(here, key)
            self.value[index].transpose(1, 2).index_put_(here, value)
            seen = attend(query, key, value, packed, window=layer.window, scale=self.scale)
            hidden_NH = self._finish(layer, hidden_NH, seen)
        self._open(rows, [len(prompt) for prompt in prompts])
        last_A = torch.empty(len(order), dtype=torch.int64, device=self.device)
        last_A[torch.tensor(order, device=self.device)] = length_A.cumsum(0) - 1
        return self._logits(hidden_NH[last_A])

    def step(self, ids_A: Tensor) -> Tensor:
        """Append a token to each row in use; logits [A, V] after it."""
        n = len(self.lengths)
        rows, slots = _rounded(n), min(_rounded(max(self.lengths) + 1), self.key.shape[-1])
        with torch.autocast(self.device.type, enabled=False):
            logits_AV = self._step(F.pad(ids_A, (0, rows - n)), rows, slots)
        self.position_A[:n] += 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits_AV[:n]

    def _step(self, ids_A: Tensor, rows: int, slots: int) -> Tensor:
        """``rows`` and ``slots`` are what is computed: rows that were added to round up give finite numbers, unused."""
        position_A = self.position_A[:rows]
        self._reveal(position_A)
        cos_A1D, sin_A1D = self.cos_SD[position_A][:, None], self.sin_SD[position_A][:, None]
        hidden_AH = F.embedding(ids_A, self.embedding).to(self.residual_dtype)
        biases = {
            window: bias[:rows, :slots].repeat_interleave(self.n_keys, 0)[:, None] for window, bias in self.bias.items()
        }
        size = (rows * self.n_keys, -1, self.head_size)  # a = A x K from here on
        here = (torch.arange(size[0], device=self.device), position_A.repeat_interleave(self.n_keys))
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden_AH, cos_A1D, sin_A1D)
            key_aDS = self.key[index, :rows].view(rows * self.n_keys, self.head_size, -1)
            value_aSD = self.value[index, :rows].view(size)
            key_aDS.transpose(1, 2).index_put_(here, key.reshape(-1, self.head_size))
            value_aSD.index_put_(here, value.reshape(-1, self.head_size))
            bias_a1S = biases[layer.window if layer.window in self.bias else None]
            score_aGS = torch.baddbmm(bias_a1S, query.reshape(size), key_aDS[:, :, :slots], alpha=self.scale)
            seen_aGD = torch.bmm(score_aGS.softmax(-1), value_aSD[:, :slots])
            hidden_AH = self._finish(layer, hidden_AH, seen_aGD)
        return self._logits(hidden_AH)

    def rest(self, rows: Sequence[int]) -> None:
        """These rows are computed along until a prompt takes them; they start again at position 0."""
        self.position_A[torch.tensor(rows, device=self.device)] = 0
        self.lengths = [0 if row in rows else length for row, length in enumerate(self.lengths)]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay in use, in this order."""
        moved = [(source, target) for target, source in enumerate(rows) if source != target]
        if moved:
            self._copy(*zip(*moved, strict=True))
        self.lengths = self.lengths[: len(rows)]

    def _copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Give rows ``target`` what rows ``source`` hold."""
        source_a, target_a = (torch.tensor(rows, device=self.device) for rows in (source, target))
        for whole in (self.key, self.value):
            whole[:, target_a] = whole[:, source_a]
        for single in (self.position_A, *self.bias.values()):
            single[target_a] = single[source_a]
        self._note(target, [self.lengths[row] for row in source])

    def _note(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        held = dict(enumerate(self.lengths)) | dict(zip(rows, lengths, strict=True))
        self.lengths = [held.get(row, 0) for row in range(max(held) + 1)]

    def _open(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Rows hold prompts of these lengths: what they see, and where their next token goes."""
        rows_A, length_A = (torch.tensor(list(x), device=self.device) for x in (rows, lengths))
        place_S = torch.arange(self.key.shape[-1], device=self.device)
        for window, bias in self.bias.items():
            seen_AS = place_S < length_A[:, None]
            if window is not None:
                seen_AS &= place_S > length_A[:, None] - window  # the next token moves it on by one
            bias[rows_A] = torch.zeros_like(bias[rows_A]).masked_fill_(~seen_AS, HIDDEN)
        self.position_A[rows_A] = length_A
        self._note(rows, lengths)

    def _reveal(self, position_A: Tensor) -> None:
        """Each row sees the slot its token goes to, and no longer the one that leaves its window."""
        rows = len(position_A)
        for window, bias in self.bias.items():
            if window is not None:
                left_A = (position_A - window).clamp(min=0)[:, None]
                kept_A = torch.where(position_A[:, None] >= window, HIDDEN, bias[:rows].gather(1, left_A))
                bias[:rows].scatter_(1, left_A, kept_A.to(bias.dtype))
            bias[:rows].scatter_(1, position_A[:, None], 0.0)

    def _project(self, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [., Q, D] and keys [., K, D], and values [., K, D]."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.attention_norm, self.eps).to(self.dtype)
        heads = layer.qkv(normed).view(len(hidden), -1, self.head_size)
        n_queries = self.n_keys * self.group
        turned, value = heads[:, : n_queries + self.n_keys], heads[:, n_queries + self.n_keys :]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = turned[:, :n_queries], turned[:, n_queries:]
            query = F.rms_norm(query, query.shape[-1:], layer.query_norm, self.eps)
            turned = torch.cat([query, F.rms_norm(key, key.shape[-1:], layer.key_norm, self.eps)], 1)
        half = self.head_size // 2
        swapped = torch.cat([turned[..., half:], turned[..., :half]], -1)
        turned = torch.addcmul(turned * cos, swapped, sin).to(self.dtype)
        return turned[:, :n_queries], turned[:, n_queries:], value

    def _finish(self, layer: _Layer, hidden: Tensor, seen: Tensor) -> Tensor:
        """The layer's output from what attention saw."""
        hidden = hidden + layer.out(seen.reshape(len(hidden), -1))
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.eps).to(self.dtype)
        gate, up = layer.gate_up(normed).chunk(2, -1)
        return hidden + layer.down(F.silu(gate).mul_(up))

    def _logits(self, hidden_AH: Tensor) -> Tensor:
        return self.head(F.rms_norm(hidden_AH, hidden_AH.shape[-1:], self.norm, self.eps).to(self.dtype))


def _fused(modules: Sequence[Any], dtype: torch.dtype, rows: int) -> Callable[[Tensor], Tensor]:
    """Linear layers on one input as a single one, LoRA updates merged; ``rows`` as in `_linear`."""
    weight = torch.cat([_weight(module).detach().to(dtype) for module in modules])
    biases = [getattr(module, "base_layer", module).bias for module in modules]
    bias = None if biases[0] is None else torch.cat([bias.detach().to(dtype) for bias in biases])
    return _linear(weight, bias, rows, fuse=True)


def _linear(weight: Tensor, bias: Tensor | None, rows: int, *, fuse: bool) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b. On a CPU the weight is laid out once as its kernels want it for inputs of ``rows`` rows."""
    if not fuse or weight.device.type != "cpu":
        return lambda x: F.linear(x, weight, bias)
    # These operators are what torch.compile itself puts in for frozen weights; a build may lack them.
    mkl, onednn = torch.ops.mkl, torch.ops.mkldnn
    if weight.dtype is torch.float32 and torch.backends.mkl.is_available() and hasattr(mkl, "_mkl_linear"):
        laid_out = mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: mkl._mkl_linear(x, laid_out, weight, bias, rows)  # any other number of rows: as F.linear
    if weight.dtype is torch.bfloat16 and torch.backends.mkldnn.is_available() and hasattr(onednn, "_linear_pointwise"):
        laid_out = onednn._reorder_linear_weight(weight, rows)
        return lambda x: onednn._linear_pointwise(x, laid_out, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def _joined(modules: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """The same from the modules themselves, without a copy."""
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)


def _weight(linear: Any) -> Tensor:
    """A layer's weight, with the updates of its active LoRA adapters."""
    if not hasattr(linear, "base_layer"):
        return linear.weight
    weight: Tensor = linear.base_layer.weight
    if linear.disable_adapters or linear.merged:
        return weight
    updates = [linear.get_delta_weight(name) for name in linear.active_adapters if name in linear.lora_A]
    return sum((update.float() for update in updates), weight.float())


def _rounded(n: int) -> int:
    return -(-n // ROUND) * ROUND
