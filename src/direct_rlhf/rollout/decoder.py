"""The fast path of the sampler: decoder layers of the Llama family over a preallocated key-value cache.

The cache has rows and columns. All rows write their next token into the same column, and a row's tokens stand in the
columns right before it: a prompt can take the row of a finished answer at any time, and a step needs no index. At the
last column everything moves left. Weights that are applied to one input stand together, and a step costs the arithmetic
of the running rows and little beside it. It computes what the model's own forward computes: `supports` tries that on
each model before it is used.

Legend: A rows, N packed prompt tokens of several rows, S positions, C columns, H hidden size, Q query heads, G of them
to each of K key-value heads, D head size; a = A x K.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from direct_rlhf.maths.attention import Rows, attend, few_sizes
from direct_rlhf.precision import arithmetic, prefers_onednn

FAMILY = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}  # the others change with the length of the text
ROUND = 8  # rows and the first attended column are rounded: fewer shapes to prepare kernels for
PREFILL_TOKENS = 16384  # of prompts in one forward
LAID_OUT = 2**16  # elements from which on a weight is laid out for its kernel: MKL reserves megabytes for each
FUSED_BYTES = 2**30  # layer weights beyond this are used where they are: a copy would cost more than it saves
HIDDEN = float("-inf")
TRIED = 6  # tokens on which the fast path is compared with the model's own forward

_verdicts: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor | None  # None: it is in the weights that follow
    qkv: Callable[[Tensor], Tensor]
    query_norm: Tensor | None  # per head, before the rotation (Qwen3)
    key_norm: Tensor | None
    out: Callable[[Tensor], Tensor]
    mlp_norm: Tensor | None
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
    inner = unwrapped(model)
    if not in_family(getattr(inner, "model", inner)) or getattr(getattr(inner, "lm_head", None), "bias", 0) is not None:
        return False
    if inner not in _verdicts:
        _verdicts[inner] = _agrees(model, inner)
    return _verdicts[inner]


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
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


def window_of(config: Any, index: int) -> int | None:
    """How many tokens a layer sees, the last included; None: all."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


@torch.inference_mode()
def _agrees(model: Any, inner: Any) -> bool:
    ids = torch.arange(TRIED, device=inner.device) % inner.config.vocab_size
    own = model(input_ids=ids[None], use_cache=False).logits[0, -1]
    tolerance = 1e-3 if own.dtype is torch.float32 and compute_dtype(model) is torch.float32 else 0.1
    decoder = Decoder(model, rows=1, slots=TRIED, longest=TRIED - 1)
    decoder.prefill([0], [ids[:-1].tolist()])
    ours = decoder.step(ids[-1:])[0]
    if not bool(own.isfinite().all()):  # the sampler finds that itself, and names the prompt
        return True
    return bool((own - ours).abs().max() <= tolerance * (own.abs().max() + 1e-3))


class Decoder:
    """Weights made ready, a cache, and the two forwards: prompts, and one token for each row.

    A prompt and its answer may have ``slots`` tokens, of which at most ``longest`` are the prompt. ``refills``: prompts
    may start while other rows go on, which takes half as many columns again.
    Memory: 2 x layers x rows x columns x K x D cache elements in `compute_dtype`, and a copy of the layer weights where
    these are small or of another type.
    """

    def __init__(self, model: Any, *, rows: int, slots: int, longest: int, refills: bool = True) -> None:
        inner = unwrapped(model)
        config, first = inner.config, inner.model.layers[0]
        self.device, self.dtype = inner.device, compute_dtype(model)
        self.residual_dtype = arithmetic(self.device, inner.dtype)  # as the model's own residual stream
        self.eps = float(config.rms_norm_eps)
        self.head_size = int(first.self_attn.head_dim)
        self.n_keys = int(config.num_key_value_heads)
        self.group = int(config.num_attention_heads) // self.n_keys
        self.scale = self.head_size**-0.5
        self.refills = refills
        self._rows = _rounded(rows)
        self._few = prefers_onednn(self.device, self.dtype)
        self._fuse = self._must_copy(inner)
        with torch.autocast(self.device.type, enabled=False):
            self.embedding = inner.model.embed_tokens.weight
            self.norm = None if self._fuse else inner.model.norm.weight.detach()
            head = inner.lm_head.weight.detach()
            if self._fuse:
                head = head.float() * inner.model.norm.weight.detach().float()
            self.head = _linear(head.to(self.dtype), None, self._rows, fuse=self._fuse)
            self.layers = [self._layer(layer, index, config) for index, layer in enumerate(inner.model.layers)]
            positions = torch.arange(slots, device=self.device)[None]
            sample = torch.empty(1, dtype=torch.float32, device=self.device)
            cos, sin = (part[0] for part in inner.model.rotary_emb(sample, positions))
        # rotate_half as a product: its sign goes into the sine
        sign = torch.ones_like(sin)
        sign[:, : self.head_size // 2] = -1
        self.cos_SD, self.sin_SD = cos.to(self.residual_dtype), (sin * sign).to(self.residual_dtype)

        columns = slots + slots // 2 if refills else slots
        size = (len(self.layers), self._rows, self.n_keys)
        # Keys lie transposed, so that the scores are a plain product.
        self.key = torch.zeros(*size, self.head_size, columns, dtype=self.dtype, device=self.device)
        self.value = torch.zeros(*size, columns, self.head_size, dtype=self.dtype, device=self.device)
        # What is added to the scores: minus infinity on columns before a row's first token and after its last.
        self.bias = torch.full((self._rows, self.n_keys, 1, columns), HIDDEN, dtype=self.dtype, device=self.device)
        self.position_A = torch.zeros(self._rows, dtype=torch.int64, device=self.device)  # of the next token
        self._longest = self.column = longest  # the column of the next token; a prompt fits in before it
        self.first: list[int] = []  # the column of each row's first token, of the rows in use

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

        def norm(module: Any, dtype: torch.dtype) -> Tensor | None:
            return None if module is None else module.weight.detach().to(dtype)

        def linear(*modules: Any, norm: Any = None) -> Callable[[Tensor], Tensor]:
            return _fused(modules, norm, self.dtype, self._rows) if self._fuse else _joined(modules)

        attention_norm, mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        return _Layer(
            attention_norm=None if self._fuse else norm(attention_norm, self.residual_dtype),
            qkv=linear(attention.q_proj, attention.k_proj, attention.v_proj, norm=attention_norm),
            query_norm=norm(getattr(attention, "q_norm", None), self.dtype),
            key_norm=norm(getattr(attention, "k_norm", None), self.dtype),
            out=linear(attention.o_proj),
            mlp_norm=None if self._fuse else norm(mlp_norm, self.residual_dtype),
            gate_up=linear(mlp.gate_proj, mlp.up_proj, norm=mlp_norm),
            down=linear(mlp.down_proj),
            window=window_of(config, index),
        )

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Put prompts into these rows; logits [A, V] after each. A prompt that stands there several times runs once.

        ``rows`` are rows that rest, or the first ones after those in use.
        """
        self._make_room()
        first: dict[tuple[int, ...], int] = {}  # place of each distinct prompt among them
        which = [first.setdefault(tuple(prompt), len(first)) for prompt in prompts]
        source = [rows[which.index(place)] for place in range(len(first))]
        with torch.autocast(self.device.type, enabled=False):
            distinct = list(first)
            parts = [
                self._prefill([source[i] for i in part], [distinct[i] for i in part])
                for part in _by_tokens([len(prompt) for prompt in distinct], PREFILL_TOKENS)
            ]
        logits_AV = torch.cat(parts)
        if len(first) == len(rows):
            return logits_AV
        copies = [(source[place], row) for place, row in zip(which, rows, strict=True) if source[place] != row]
        self._copy(*zip(*copies, strict=True))
        return logits_AV[torch.tensor(which, device=self.device)]

    def _prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Their tokens packed, the shortest prompt first, as attention wants them."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        packed = Rows(tuple(len(prompts[index]) for index in order), self.device, self._few)
        n_tokens = sum(packed.lengths)
        # tokens that the cache, attention and the caller never see: fewer sizes of products
        filler = few_sizes(n_tokens) - n_tokens if self._few else 0
        ids = [token for index in order for token in prompts[index]] + [0] * filler
        ids_N = torch.tensor(ids, device=self.device)
        row_A = torch.tensor([rows[index] for index in order], device=self.device)
        length_A = torch.tensor(packed.lengths, device=self.device)
        start_A = self.column - length_A
        in_row = partial(torch.repeat_interleave, repeats=length_A, output_size=n_tokens)
        here = (in_row(row_A), in_row(start_A) + packed.position_N)
        position_N = F.pad(packed.position_N, (0, filler))
        cos_N1D, sin_N1D = (table[position_N][:, None] for table in (self.cos_SD, self.sin_SD))
        hidden_NH = F.embedding(ids_N, self.embedding).to(self.residual_dtype)
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden_NH, cos_N1D, sin_N1D)
            self.key[index].permute(0, 3, 1, 2).index_put_(here, key[:n_tokens])
            self.value[index].transpose(1, 2).index_put_(here, value[:n_tokens])
            seen = attend(query, key, value, packed, window=layer.window, scale=self.scale)
            hidden_NH = self._finish(layer, hidden_NH, F.pad(seen, (0, 0, 0, 0, 0, filler)) if filler else seen)
        column_C = torch.arange(self.key.shape[-1], device=self.device)
        hidden_AC = (column_C < start_A[:, None]) | (column_C >= self.column)
        self.bias[row_A] = torch.zeros_like(self.bias[row_A]).masked_fill_(hidden_AC[:, None, None], HIDDEN)
        self.position_A[row_A] = length_A
        self._note(rows, [self.column - len(prompt) for prompt in prompts])
        last_A = torch.empty(len(order), dtype=torch.int64, device=self.device)
        last_A[torch.tensor(order, device=self.device)] = length_A.cumsum(0) - 1
        return self._logits(hidden_NH[last_A])

    def step(self, ids_A: Tensor) -> Tensor:
        """Append a token to each row in use; logits [A, V] after it."""
        self._make_room()
        n = len(self.first)
        with torch.autocast(self.device.type, enabled=False):
            logits_AV = self._step(F.pad(ids_A, (0, _rounded(n) - n)))
        self.position_A[:n] += 1
        self.column += 1
        return logits_AV[:n]

    def _step(self, ids_A: Tensor) -> Tensor:
        """Rows that were added to round up give finite numbers, which nobody reads."""
        rows, end = len(ids_A), self.column + 1
        self.bias[..., self.column] = 0.0
        position_A = self.position_A[:rows]
        cos_A1D, sin_A1D = self.cos_SD[position_A][:, None], self.sin_SD[position_A][:, None]
        hidden_AH = F.embedding(ids_A, self.embedding).to(self.residual_dtype)
        size = (rows * self.n_keys, -1, self.head_size)
        bias_a1C = self.bias[:rows].view(rows * self.n_keys, 1, -1)
        earliest = min(self.first)
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden_AH, cos_A1D, sin_A1D)
            key_aDC = self.key[index, :rows].view(rows * self.n_keys, self.head_size, -1)
            value_aCD = self.value[index, :rows].view(size)
            key_aDC[:, :, self.column] = key.reshape(-1, self.head_size)
            value_aCD[:, self.column] = value.reshape(-1, self.head_size)
            begin = earliest // ROUND * ROUND
            if layer.window is not None:
                begin = max(begin, end - layer.window)
            seen = slice(begin, min(_rounded(end), self.key.shape[-1]) if self._few else end)
            score_aGC = torch.baddbmm(bias_a1C[:, :, seen], query.reshape(size), key_aDC[:, :, seen], alpha=self.scale)
            hidden_AH = self._finish(layer, hidden_AH, torch.bmm(score_aGC.softmax(-1), value_aCD[:, seen]))
        return self._logits(hidden_AH)

    def rest(self, rows: Sequence[int]) -> None:
        """These rows are computed along, to no effect, until a prompt takes them or `keep` drops them."""
        self.position_A[torch.tensor(rows, device=self.device)] = 0  # never beyond the last position
        self._note(rows, [self.column] * len(rows))

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows stay in use, in this order."""
        moved = [(source, target) for target, source in enumerate(rows) if source != target]
        if moved:
            self._copy(*zip(*moved, strict=True))
        self.first = self.first[: len(rows)]

    def _copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Give rows ``target`` what rows ``source`` hold."""
        source_a, target_a = (torch.tensor(rows, device=self.device) for rows in (source, target))
        for whole in (self.key, self.value):
            whole[:, target_a] = whole[:, source_a]
        for single in (self.position_A, self.bias):
            single[target_a] = single[source_a]
        self._note(target, [self.first[row] for row in source])

    def _note(self, rows: Sequence[int], first: Sequence[int]) -> None:
        held = dict(enumerate(self.first)) | dict(zip(rows, first, strict=True))
        self.first = [held.get(row, self.column) for row in range(max(held) + 1)]

    def _make_room(self) -> None:
        """Where the last column is taken, move everything left as far as the rows, and the longest prompt, allow."""
        if self.column < self.key.shape[-1]:
            return
        gone = min([*self.first, self.column - self._longest])
        kept = self.column - gone
        for whole, dim in ((self.key, -1), (self.value, -2), (self.bias, -1)):
            whole.narrow(dim, 0, kept).copy_(whole.narrow(dim, gone, kept).clone())
        self.bias.narrow(-1, kept, gone).fill_(HIDDEN)
        self.first = [first - gone for first in self.first]
        self.column = kept

    def _project(self, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [., Q, D] and keys [., K, D], and values [., K, D]."""
        normed = self._normed(hidden, layer.attention_norm)
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
        normed = self._normed(hidden, layer.mlp_norm)
        gate, up = layer.gate_up(normed).chunk(2, -1)
        return hidden + layer.down(F.silu(gate).mul_(up))

    def _logits(self, hidden_AH: Tensor) -> Tensor:
        return self.head(self._normed(hidden_AH, self.norm))

    def _normed(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """RMS norm in float32; without a weight where that stands in the layer that follows."""
        if weight is not None:
            return F.rms_norm(hidden, hidden.shape[-1:], weight, self.eps).to(self.dtype)
        wide = hidden.float()
        scale = torch.linalg.vecdot(wide, wide).div_(wide.shape[-1]).add_(self.eps).rsqrt_().unsqueeze(-1)
        return (wide * scale).to(self.dtype)


def _fused(modules: Sequence[Any], norm: Any, dtype: torch.dtype, rows: int) -> Callable[[Tensor], Tensor]:
    """Linear layers on one input as a single one, with LoRA updates and the norm's weight; ``rows`` as in `_linear`."""
    whole = torch.cat([_weight(module).detach() for module in modules])
    weight = (whole if norm is None else whole.float() * norm.weight.detach().float()).to(dtype)
    biases = [getattr(module, "base_layer", module).bias for module in modules]
    bias = None if biases[0] is None else torch.cat([bias.detach().to(dtype) for bias in biases])
    return _linear(weight, bias, rows, fuse=True)


def _linear(weight: Tensor, bias: Tensor | None, rows: int, *, fuse: bool) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b. On a CPU the weight is laid out once as its kernels want it for inputs of ``rows`` rows."""
    if not fuse or weight.device.type != "cpu" or weight.numel() < LAID_OUT:
        return lambda x: F.linear(x, weight, bias)
    # These operators are what torch.compile itself puts in for frozen weights; a build may lack them.
    mkl, onednn = torch.ops.mkl, torch.ops.mkldnn
    if prefers_onednn("cpu", weight.dtype) and hasattr(onednn, "_linear_pointwise"):
        laid_out = onednn._reorder_linear_weight(weight, rows)
        return lambda x: onednn._linear_pointwise(x, laid_out, bias, "none", [], "")
    if weight.dtype is torch.float32 and torch.backends.mkl.is_available() and hasattr(mkl, "_mkl_linear"):
        laid_out = mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: mkl._mkl_linear(x, laid_out, weight, bias, rows)  # any other number of rows: as F.linear
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


def _by_tokens(lengths: Sequence[int], budget: int) -> Iterator[range]:
    """Places of neighbours with at most ``budget`` tokens together (or one alone)."""
    start = total = 0
    for place, length in enumerate(lengths):
        if total and total + length > budget:
            yield range(start, place)
            start, total = place, 0
        total += length
    yield range(start, len(lengths))


def _rounded(n: int) -> int:
    return -(-n // ROUND) * ROUND
