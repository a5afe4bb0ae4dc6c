"""Hidden states and token log-probabilities of any causal language model, independent of padding.

Legend: B sequences, L slots (padded anywhere), M slots after compaction, H hidden size, V vocabulary, N real tokens, T
target tokens.

Models of the Llama family run on packed tokens (`packed.py`). For any other, every row is first moved to the left, so
that padding stands at its right end only. A causal model never looks there, so no attention mask and no position ids
are needed: positions count from 0 in every architecture (absolute, rotary, ALiBi, recurrent), and the kernels for plain
causal attention apply. All-padding columns are cut off.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from direct_rlhf.errors import ConfigError
from direct_rlhf.maths.attention import few_sizes
from direct_rlhf.models.packed import hidden as packed_hidden
from direct_rlhf.models.packed import packs, rows_of
from direct_rlhf.models.sharded import call
from direct_rlhf.precision import makes_kernels
from direct_rlhf.rollout.decoder import compute_dtype

CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB in float32


@dataclass(frozen=True)
class TokenLogprobs:
    """Scores of the tokens that are there, both 0 where ``target_mask`` is False."""

    logprob_BL: Tensor  # float32, nats
    entropy_BL: Tensor  # float32, nats, of the distribution that the token was drawn from


@dataclass(frozen=True)
class States:
    """Last hidden states of the real tokens of a padded batch, after the final norm.

    A row's tokens stand together and in order; the rows may stand in any order.
    """

    hidden_NH: Tensor  # in the model's compute type
    row_N: Tensor  # where each token comes from
    column_N: Tensor


def states(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> States:
    """``model`` is a causal LM, its backbone alone, or either wrapped by PEFT; ``mask_BL`` is True on real tokens."""
    return States(*call(model, partial(_states, model), ids_BL, mask_BL))


def _states(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask_BL = mask_BL.bool()
    trunk = backbone(model)
    if packs(trunk) and bool(mask_BL.any()):
        length_B = mask_BL.sum(1)
        order_B = length_B.argsort(stable=True)
        row_N, column_N = mask_BL[order_B].nonzero(as_tuple=True)
        row_N = order_B[row_N]
        lengths = tuple(length for length in length_B[order_B].tolist() if length)
        return packed_hidden(trunk, ids_BL[row_N, column_N], rows_of(trunk, lengths)), row_N, column_N
    ids_BM, slot_BL = _compact(ids_BL, mask_BL)
    hidden_BMH = _run_backbone(model, ids_BM)
    row_N, column_N = mask_BL.nonzero(as_tuple=True)
    return hidden_BMH[row_N, slot_BL[row_N, column_N]], row_N, column_N


def token_logprobs(
    model: nn.Module,
    ids_BL: Tensor,
    mask_BL: Tensor,
    target_mask_BL: Tensor,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenLogprobs:
    """log P(ids[:, l] | ids[:, :l]) at the target slots, from logits / temperature, in float32.

    The head runs at target positions only. When T * V passes ``chunk_elements`` it runs in chunks that are computed
    again in the backward pass, so that neither pass holds all logits. The entropy is detached, unless
    ``entropy_gradient`` asks for its gradient, which costs memory and time.

    Shapes:  all [B, L]; ``mask_BL`` is True on real tokens, ``target_mask_BL`` on those to be scored.
    Errors:  ValueError if a target is padding or the first token of its row (nothing precedes it).
    """
    score = partial(
        _token_logprobs,
        model,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        chunk_elements=chunk_elements,
    )
    return TokenLogprobs(*call(model, score, ids_BL, mask_BL, target_mask_BL))


def _token_logprobs(
    model: nn.Module,
    ids_BL: Tensor,
    mask_BL: Tensor,
    target_mask_BL: Tensor,
    *,
    temperature: float,
    entropy_gradient: bool,
    chunk_elements: int,
) -> tuple[Tensor, Tensor]:
    mask_BL, target_mask_BL = mask_BL.bool(), target_mask_BL.bool()
    first_BL = mask_BL.cumsum(dim=1) == 1
    if bool((target_mask_BL & (~mask_BL | first_BL)).any()):
        raise ValueError("a target slot is padding or the first token of its row, which nothing predicts")
    found = States(*_states(model, ids_BL, mask_BL))
    place_T = target_mask_BL[found.row_N, found.column_N].nonzero(as_tuple=True)[0]
    row_T, column_T = found.row_N[place_T], found.column_N[place_T]
    logprob_T, entropy_T = score_targets(
        causal_lm(model),
        found.hidden_NH[place_T - 1],
        ids_BL[row_T, column_T],
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        chunk_elements=chunk_elements,
    )
    empty_BL = torch.zeros(ids_BL.shape, dtype=torch.float32, device=ids_BL.device)
    return empty_BL.index_put((row_T, column_T), logprob_T), empty_BL.index_put((row_T, column_T), entropy_T)


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def backbone(model: nn.Module) -> nn.Module:
    """The part that turns ids into hidden states (adapters included); a bare backbone is its own."""
    inner = causal_lm(model)
    return cast(nn.Module, getattr(inner, getattr(inner, "base_model_prefix", ""), inner))


def final_logits(model: nn.Module, hidden_NH: Tensor) -> Tensor:
    """Next-token logits [N, V] in float32, with the scale or soft cap that the architecture's own forward applies."""
    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    n_rows = len(hidden_NH)
    if makes_kernels(hidden_NH.device, compute_dtype(inner)):
        hidden_NH = F.pad(hidden_NH, (0, 0, 0, few_sizes(n_rows) - n_rows))
    logits_NV: Tensor = head(hidden_NH.to(head.weight.dtype))[:n_rows].float()
    config = inner.config
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits_NV = logits_NV / scaling
    if (scale := getattr(inner, "logit_scale", None)) is not None:  # Cohere
        logits_NV = logits_NV * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits_NV = torch.tanh(logits_NV / cap) * cap
    return logits_NV


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raise ConfigError if ``final_logits`` differs from the model's own forward (an architecture with other rules)."""
    inner = causal_lm(model)
    ids_BL = torch.arange(3, device=next(inner.parameters()).device).unsqueeze(0)
    own_BLV = inner(input_ids=ids_BL, use_cache=False).logits.float()
    ours_BLV = final_logits(inner, _run_backbone(inner, ids_BL)[0])[None]
    difference = (own_BLV - ours_BLV).abs().max().item()
    if not difference <= 1e-2 * own_BLV.abs().max().item() + 1e-6:
        raise ConfigError(
            f"{type(inner).__name__}: its logits are not its head applied to its last hidden state (they differ by "
            f"{difference:.3g}), so log-probabilities would be wrong. This architecture is not supported."
        )


def _compact(ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens moved to the left, as ids [B, M], and each token's place there [B, L] (-1 at leading padding)."""
    mask_BL = mask_BL.bool()
    slot_BL = mask_BL.long().cumsum(dim=1) - 1
    longest = max(int(slot_BL[:, -1].max()) + 1, 1)
    row_N, column_N = mask_BL.nonzero(as_tuple=True)
    # padding repeats the row's first token: transformers warns about pad ids that come without a mask
    ids_BM = ids_BL.gather(1, (slot_BL == 0).long().argmax(dim=1, keepdim=True)).repeat(1, longest)
    ids_BM[row_N, slot_BL[row_N, column_N]] = ids_BL[row_N, column_N]
    return ids_BM, slot_BL


def _run_backbone(model: nn.Module, ids_BM: Tensor) -> Tensor:
    return cast(Tensor, backbone(model)(input_ids=ids_BM, use_cache=False).last_hidden_state)


def score_targets(
    model: Any,
    hidden_TH: Tensor,
    target_T: Tensor,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets after these hidden states, and entropies: float32 [T] each, in nats."""

    def score(hidden_tH: Tensor, target_t: Tensor) -> tuple[Tensor, Tensor]:
        logits_tV = final_logits(model, hidden_tH)
        if temperature != 1:
            logits_tV = logits_tV / temperature
        if entropy_gradient:
            return _with_entropy_gradient(logits_tV, target_t)
        return _TokenScores.apply(logits_tV, target_t)

    vocabulary = model.get_output_embeddings().weight.shape[0]
    rows = max(chunk_elements // vocabulary, 1)
    if len(target_T) <= rows:
        return score(hidden_TH, target_T)
    parts = [
        checkpoint(score, hidden_tH, target_t, use_reentrant=False, preserve_rng_state=False)
        for hidden_tH, target_t in zip(hidden_TH.split(rows), target_T.split(rows), strict=True)
    ]
    logprob_T, entropy_T = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprob_T, entropy_T


def _with_entropy_gradient(logits_tV: Tensor, target_t: Tensor) -> tuple[Tensor, Tensor]:
    logprob_tV = logits_tV.log_softmax(dim=-1)
    logprob_t = logprob_tV.gather(-1, target_t.unsqueeze(-1)).squeeze(-1)
    # p log p -> 0 as p -> 0, also where a logit is -inf
    return logprob_t, -torch.where(logprob_tV.isneginf(), 0.0, logprob_tV.exp() * logprob_tV).sum(-1)


class _TokenScores(torch.autograd.Function):
    """log p of the targets, and the entropy without gradient; keeps the probabilities alone.

    log p_y = z_y - log sum exp z,  d/dz = onehot(y) - p;  H = log sum exp z - sum p z.
    """

    @staticmethod
    def forward(ctx: Any, logits_tV: Tensor, target_t: Tensor) -> tuple[Tensor, Tensor]:
        chance_tV = logits_tV.softmax(-1)
        total_t = logits_tV.amax(-1) - chance_tV.amax(-1).log()  # the largest p is exp(largest z) / sum exp z
        entropy_t = total_t - torch.linalg.vecdot(chance_tV, logits_tV)
        if bool(entropy_t.isnan().any()):  # 0 * -inf: p z -> 0 as z -> -inf
            entropy_t = total_t - torch.where(chance_tV > 0, chance_tV * logits_tV, 0.0).sum(-1)
        logprob_t = logits_tV.gather(-1, target_t.unsqueeze(-1)).squeeze(-1) - total_t
        ctx.save_for_backward(chance_tV, target_t)
        ctx.mark_non_differentiable(entropy_t)
        return logprob_t, entropy_t

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        chance_tV, target_t = ctx.saved_tensors
        gradient_t1 = gradients[0].unsqueeze(-1)
        return (chance_tV * -gradient_t1).scatter_add_(-1, target_t.unsqueeze(-1), gradient_t1), None
