"""Hidden states and token log-probabilities of any causal language model, independent of padding.

Legend: B sequences, L slots (padded anywhere), M slots after compaction, H hidden size, V vocabulary, N target tokens.

Every row is first moved to the left, so that padding stands at its right end only. A causal model never looks there, so
no attention mask and no position ids are needed: positions count from 0 in every architecture (absolute, rotary, ALiBi,
recurrent), and the kernels for plain causal attention apply. All-padding columns are cut off.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from direct_rlhf.errors import ConfigError

CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB in float32


@dataclass(frozen=True)
class TokenLogprobs:
    """Scores of the tokens that are there, both 0 where ``target_mask`` is False."""

    logprob_BL: Tensor  # float32, nats
    entropy_BL: Tensor | None  # float32, nats, of the distribution that the token was drawn from


def hidden_states(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Last hidden states after the final norm: [B, L, H] in the model's compute type, 0 where ``mask_BL`` is False.

    ``model`` is a causal LM, its backbone alone, or either wrapped by PEFT; ``mask_BL`` is True on real tokens.
    """
    ids_BM, slot_BL = _compact(ids_BL, mask_BL)
    hidden_BMH = _run_backbone(model, ids_BM)
    index_BLH = slot_BL.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden_BMH.shape[-1])
    return torch.where(mask_BL.bool().unsqueeze(-1), hidden_BMH.gather(1, index_BLH), 0.0)


def token_logprobs(
    model: nn.Module,
    ids_BL: Tensor,
    mask_BL: Tensor,
    target_mask_BL: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenLogprobs:
    """log P(ids[:, l] | ids[:, :l]) at the target slots, from logits / temperature, in float32.

    The head runs at target positions only. When N * V passes ``chunk_elements`` it runs in chunks that are computed
    again in the backward pass, so that neither pass holds all logits.

    Shapes:  all [B, L]; ``mask_BL`` is True on real tokens, ``target_mask_BL`` on those to be scored.
    Errors:  ValueError if a target is padding or the first token of its row (nothing precedes it).
    """
    mask_BL, target_mask_BL = mask_BL.bool(), target_mask_BL.bool()
    ids_BM, slot_BL = _compact(ids_BL, mask_BL)
    if bool((target_mask_BL & (~mask_BL | (slot_BL < 1))).any()):
        raise ValueError("a target slot is padding or the first token of its row, which nothing predicts")
    hidden_BMH = _run_backbone(model, ids_BM)
    row_N, column_N = target_mask_BL.nonzero(as_tuple=True)
    hidden_NH = hidden_BMH[row_N, slot_BL[row_N, column_N] - 1]
    target_N = ids_BL[row_N, column_N]
    logprob_N, entropy_N = _score_rows(causal_lm(model), hidden_NH, target_N, temperature, entropy, chunk_elements)
    empty_BL = torch.zeros(ids_BL.shape, dtype=torch.float32, device=ids_BL.device)
    return TokenLogprobs(
        logprob_BL=empty_BL.index_put((row_N, column_N), logprob_N),
        entropy_BL=None if entropy_N is None else empty_BL.index_put((row_N, column_N), entropy_N),
    )


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
    logits_NV: Tensor = head(hidden_NH.to(head.weight.dtype)).float()
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
    ours_BLV = final_logits(inner, _run_backbone(inner, ids_BL))
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


def _score_rows(
    model: Any, hidden_NH: Tensor, target_N: Tensor, temperature: float, entropy: bool, chunk_elements: int
) -> tuple[Tensor, Tensor | None]:
    def score(hidden_nH: Tensor, target_n: Tensor) -> tuple[Tensor, Tensor]:
        logprob_nV = (final_logits(model, hidden_nH) / temperature).log_softmax(dim=-1)
        logprob_n = logprob_nV.gather(-1, target_n.unsqueeze(-1)).squeeze(-1)
        if not entropy:
            return logprob_n, logprob_n
        # p log p -> 0 as p -> 0, also where a logit is -inf
        return logprob_n, -torch.where(logprob_nV.isneginf(), 0.0, logprob_nV.exp() * logprob_nV).sum(-1)

    vocabulary = model.get_output_embeddings().weight.shape[0]
    rows = max(chunk_elements // vocabulary, 1)
    if len(target_N) <= rows:
        logprob_N, entropy_N = score(hidden_NH, target_N)
    else:
        parts = [
            checkpoint(score, hidden_nH, target_n, use_reentrant=False, preserve_rng_state=False)
            for hidden_nH, target_n in zip(hidden_NH.split(rows), target_N.split(rows), strict=True)
        ]
        logprob_N, entropy_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprob_N, entropy_N if entropy else None
