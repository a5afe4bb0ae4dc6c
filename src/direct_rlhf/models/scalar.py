"""A language-model trunk with one number per token: the reward model and the critic.

Legend: B sequences, L slots (padded anywhere), H hidden size.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from direct_rlhf.models.forward import backbone, causal_lm, states
from direct_rlhf.models.sharded import call

HEAD_SCALE = 0.1  # spread of a fresh reward head's scores, in nats of preference, for hidden states of unit size


class ScalarModel(nn.Module):
    """A trunk and a linear head in float32 on its last hidden state.

    ``trunk`` is a backbone of its own, or a PeftModel that is shared with other roles (then the caller activates the
    right adapter before a call).
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    @classmethod
    def from_base(cls, model: Any, *, seed: int, copy_trunk: bool = False) -> "ScalarModel":
        """A reward model to be trained: ``model``'s trunk under a small random head (no bias) drawn from ``seed``."""
        head = _new_head(model, bias=False)
        generator = torch.Generator().manual_seed(seed)
        weight_1H = torch.randn(head.weight.shape, generator=generator) * HEAD_SCALE / head.in_features**0.5
        with torch.no_grad():
            head.weight.copy_(weight_1H)
        return cls(_own_trunk(model, copy_trunk), head)

    @classmethod
    def zero(cls, model: Any, *, copy_trunk: bool = False) -> "ScalarModel":
        """A critic that says 0 everywhere, on ``model``'s trunk."""
        return cls(_own_trunk(model, copy_trunk), _new_head(model, bias=True))

    def as_critic(self, mean: float, std: float) -> "ScalarModel":
        """A copy whose values are this model's in normalised units, (v - mean) / std: the head takes it in."""
        head = nn.Linear(self.head.in_features, 1, bias=True, device=self.head.weight.device)
        with torch.no_grad():
            head.weight.copy_(self.head.weight / std)
            head.bias.copy_(((self.head.bias if self.head.bias is not None else 0.0) - torch.tensor(mean)) / std)
        return ScalarModel(copy.deepcopy(self.trunk), head)

    def values(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """One number per token, float32 [B, L], 0 where ``mask_BL`` is False."""
        return call(self, self._values, ids_BL, mask_BL)

    def _values(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        found = states(self.trunk, ids_BL, mask_BL)
        empty_BL = torch.zeros(ids_BL.shape, dtype=torch.float32, device=ids_BL.device)
        return empty_BL.index_put((found.row_N, found.column_N), self._apply_head(found.hidden_NH))

    def scores(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The number at each row's last real token, float32 [B]."""
        return call(self, self._scores, ids_BL, mask_BL)

    def _scores(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        slots_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        last_B = torch.where(mask_BL.bool(), slots_L, -1).max(dim=1).values
        if bool((last_B < 0).any()):
            raise ValueError("a row holds no token, so it has no score")
        found = states(self.trunk, ids_BL, mask_BL)
        place_B = (found.column_N == last_B[found.row_N]).nonzero(as_tuple=True)[0]
        score_B = self._apply_head(found.hidden_NH[place_B])
        return torch.zeros_like(score_B).index_put((found.row_N[place_B],), score_B)

    def _apply_head(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)


def _own_trunk(model: Any, copy_trunk: bool) -> nn.Module:
    trunk = model if causal_lm(model) is not model else backbone(model)
    return copy.deepcopy(trunk) if copy_trunk else trunk


def _new_head(model: Any, *, bias: bool) -> nn.Linear:
    """A zero head for ``model``'s hidden size, float32, on its device."""
    inner = causal_lm(model)
    hidden_size = inner.config.get_text_config().hidden_size
    head = nn.Linear(hidden_size, 1, bias=bias, device=next(inner.parameters()).device, dtype=torch.float32)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head
