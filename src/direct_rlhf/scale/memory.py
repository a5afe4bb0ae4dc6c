"""Bytes of a GPU, by role and by phase. The numbers of one process are those of `train/forecast.py`, in closed form.

A phase is the sum of what the roles hold then and what the phase itself needs at its highest. Sizes of activations
follow `models/packed.py` and `rollout/decoder.py`: what lies there at once for each token.

Legend of the formulas: H hidden, I inner, Q queries, K keys (heads times size), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from direct_rlhf.models.sizes import moment_bytes, nf4_bytes
from direct_rlhf.recipe.schema import OptimiserSection
from direct_rlhf.scale.setting import SCORE_FACTOR, Setting

PREFILL = 16384  # tokens of prompts in one forward, as in rollout/decoder.py
LOGITS = 2**25  # elements of logits at once, as in models/forward.py
COPIED = 2**30  # bytes of layer weights up to which the decoder copies them
ROUND = 8  # to which the decoder rounds rows

Parts = dict[str, int]


@dataclass(frozen=True)
class Role:
    """What one role holds from step to step, in all processes together that share it."""

    name: str
    weights: int
    gradients: int = 0
    moments: int = 0
    frozen: bool = False

    @property
    def kept(self) -> int:
        return self.weights + self.moments


@dataclass(frozen=True)
class Phase:
    """One phase of one stage, of the GPU that has most."""

    stage: str
    name: str
    parts: Parts

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def roles_of(setting: Setting, stage: str) -> list[Role]:
    """Of ``reward``, ``cost``, ``sft``, ``dpo`` or ``ppo``."""
    if stage == "ppo":
        return _ppo_roles(setting)
    shape, section = setting.shape, getattr(setting.recipe, stage)
    scalar = [shape.hidden, 1] if stage in ("reward", "cost") else []
    if setting.lora:
        own = [*shape.adapter(setting.recipe.model.lora), *scalar]
        weights = _trunk_bytes(setting) + 4 * sum(own)
        return [Role(stage, weights, 4 * sum(own), _moments(own, section.optimiser))]
    own = [*shape.tensors, *(scalar or [shape.head])]
    return [_trained(stage, own, section.optimiser)]


def _ppo_roles(setting: Setting) -> list[Role]:
    shape, ppo = setting.shape, setting.recipe.ppo
    scalar = [shape.hidden, 1]
    if setting.lora:
        own = shape.adapter(setting.recipe.model.lora)
        return [
            Role("trunk (shared, frozen)", _trunk_bytes(setting)),
            _trained("policy", own, ppo.optimiser),
            *(_trained(name, [*own, *scalar], ppo.critic.optimiser) for name in setting.critics),
            *(Role(name, 4 * sum(own)) for name in setting.judges),
        ]
    return [
        _trained("policy", [*shape.tensors, shape.head], ppo.optimiser),
        *(_trained(name, [*shape.tensors, *scalar], ppo.critic.optimiser) for name in setting.critics),
        Role("reference", setting.computed * shape.whole, frozen=True),
        *(Role(name, setting.computed * shape.trunk + 4 * sum(scalar), frozen=True) for name in setting.judges),
    ]


def _trained(name: str, tensors: Sequence[int], optimiser: OptimiserSection) -> Role:
    own = 4 * sum(tensors)
    return Role(name, own, own, _moments(tensors, optimiser))


def _moments(tensors: Sequence[int], optimiser: OptimiserSection) -> int:
    return sum(moment_bytes(n, optimiser.kind) for n in tensors)


def _trunk_bytes(setting: Setting) -> int:
    """A frozen trunk with its head, under the adapters."""
    shape = setting.shape
    if not setting.four_bits:
        return setting.computed * shape.whole
    packed = sum(nf4_bytes(n_in * n_out) for n_in, n_out in shape.linears.values()) * shape.layers
    return packed + setting.computed * (shape.whole - shape.products * shape.layers)


def kept(setting: Setting, role: Role) -> float:
    """The share of a GPU: whole, or a part of it."""
    whole = role.frozen and not setting.recipe.parallel.shard_frozen
    return 1.0 if whole else 1 / setting.shard


def phases(setting: Setting, stage: str) -> list[Phase]:
    """The phases in which memory is at its highest."""
    roles = roles_of(setting, stage)
    held = {"weights and moments": round(sum(role.kept * kept(setting, role) for role in roles))}
    if stage == "ppo":
        return [
            Phase(stage, "sample", held | _sampling(setting)),
            Phase(stage, "score", held | _scoring(setting)),
            Phase(stage, "update", held | _training(setting, roles, "ppo")),
        ]
    return [Phase(stage, "train", held | _training(setting, roles, stage))]


def _sampling(setting: Setting) -> Parts:
    shape, size = setting.shape, setting.computed
    rows = setting.sampled(setting.recipe.ppo.rollouts)
    if setting.recipe.rollout.engine == "vllm":  # its memory is its own
        return {}
    if setting.four_bits:  # the model's own forward
        return {"activations and cache": rows * setting.length * (_forward_bytes(setting) + _cache_bytes(setting))}
    slots = -(-rows // ROUND) * ROUND * setting.length
    parts: Parts = {}
    if setting.gpus > 1:
        parts["the whole policy, gathered"] = size * shape.whole
    copied = shape.products * shape.layers * size <= COPIED and not (setting.lora and size == 2)
    if copied or (setting.gpus == 1 and not setting.lora and size == 2):
        parts["its copy for the decoder"] = size * (shape.products * shape.layers + shape.vocabulary * shape.hidden)
    parts["key-value cache"] = slots * _cache_bytes(setting)
    prompts = rows // setting.recipe.ppo.samples_per_prompt
    prefill = min(max(PREFILL // setting.prompt, 1), prompts) * setting.prompt * _prefill_bytes(setting)
    parts["prompts or logits"] = max(prefill, 12 * rows * shape.vocabulary)
    return parts


def _cache_bytes(setting: Setting) -> int:
    return 2 * setting.shape.layers * setting.shape.key * setting.computed


def _prefill_bytes(setting: Setting) -> int:
    """Of a prompt's token in the decoder: hidden twice in the residual's type; 2 H + 3 Q + 3 K + 3 I."""
    shape, size, residual = setting.shape, setting.computed, setting.residual
    inner = 3 * shape.inner * size
    if setting.lora and size == 2:  # the adapters compute in float32
        inner = 12 * shape.inner + 4 * shape.hidden
    return 2 * shape.hidden * residual + size * (2 * shape.hidden + 3 * shape.query + 3 * shape.key) + inner


def _scoring(setting: Setting) -> Parts:
    shape, size, ppo = setting.shape, setting.computed, setting.recipe.ppo
    rows = min(max(SCORE_FACTOR * ppo.micro_batch_tokens // setting.length, 1), setting.share(ppo.rollouts))
    parts: Parts = {}
    if setting.gpus > 1:
        parts["one whole model, gathered"] = size * shape.whole
    elif not setting.lora and size == 2:
        parts["the critic's weights in bfloat16"] = size * shape.trunk
    logits = min(rows * setting.answer * shape.vocabulary, LOGITS) * (8 if size == 4 else 10)
    parts["activations or logits"] = max(rows * setting.length * _forward_bytes(setting), logits)
    return parts


def _forward_bytes(setting: Setting) -> int:
    """Of a token in a forward that keeps nothing: 3 H + 2 Q + 2 K + 3 I (with adapters 4 I), and what norms widen."""
    shape, size, residual = setting.shape, setting.computed, setting.residual
    turned = shape.query + shape.key  # in the type of the residual stream
    inner = (4 if setting.lora else 3) * shape.inner
    found = residual * (3 * shape.hidden + turned) + size * (shape.query + shape.key + inner)
    return found + (4 * shape.hidden if setting.lora and size == 2 else 0)


def _training(setting: Setting, roles: Sequence[Role], stage: str) -> Parts:
    """Gradients of the role that has most, and activations of one pass."""
    shape, size, parallel = setting.shape, setting.computed, setting.recipe.parallel
    rows, length, scored = setting.micro_rows, setting.length, setting.answer
    if stage != "ppo":
        rows, length = 2 * setting.pairs_at_once(stage), setting.pair_length
        scored = setting.recipe.data.max_answer_tokens if stage in ("sft", "dpo") else 0
    parts = {"gradients": round(max(role.gradients for role in roles) / setting.shard)}
    if setting.gpus > 1:
        at_once = shape.layers if not parallel.reshard_after_forward else 2
        outer = shape.whole - shape.layers * shape.layer
        parts["gathered weights"] = size * (outer + at_once * shape.layer)
        if not setting.lora:  # of a layer, or of embedding and head: as computed, and in float32 to be summed
            parts["gradients on their way"] = (size + 4) * max(shape.layer, outer)
    elif not setting.lora and size == 2:
        parts["weights in bfloat16"] = size * shape.whole
    tokens = rows * length
    layers = tokens * shape.layers * _saved_bytes(setting)
    if parallel.activation_checkpointing:
        layers = tokens * (shape.layers * setting.residual * shape.hidden + _saved_bytes(setting))
    parts["activations"] = layers
    logits = 16 * min(rows * scored * shape.vocabulary, LOGITS)
    parts["logits, or a layer's backward"] = max(logits, 2 * tokens * shape.inner * size)
    return parts


def _saved_bytes(setting: Setting) -> int:
    """Of a token in a layer that keeps what its backward needs.

    one type         4 H + 3 Q + 2 K + 3 I: norms' inputs and outputs, attention, gated product
    autocast         the norms' inputs in float32; their outputs once for each of the five products that read them
    bfloat16, LoRA   the input of each adapter beside what attention and the gated product keep, and norms in float32
    4 bits           one more I: the model's own forward
    """
    shape, size = setting.shape, setting.computed
    hidden, query, key, inner = shape.hidden, shape.query, shape.key, shape.inner
    others = 3 * query + 2 * key + 3 * inner
    if setting.lora and size == 2:
        return size * (7 * hidden + others + (inner if setting.four_bits else 0)) + 8 * hidden
    if setting.residual == size:
        return size * (4 * hidden + others)
    return setting.residual * 2 * hidden + size * (5 * hidden + others)


def host_bytes(setting: Setting) -> int:
    """CPU memory of a node while several processes load: each holds one model, in full tuning a critic's copy too."""
    if setting.gpus == 1:
        return 0
    here = min(setting.gpus, setting.per_node)
    each = setting.computed * setting.shape.whole if setting.lora else 2 * 4 * setting.shape.whole
    return here * each
