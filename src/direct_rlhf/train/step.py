"""The optimiser step that every kind of training shares: schedule, finite check on the host, clipping, AdamW."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from direct_rlhf.errors import DivergenceError
from direct_rlhf.recipe.schema import OptimiserSection


def learning_rate(section: OptimiserSection, step: int, total_steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``total_steps``: a pure function, so a resumed run needs the step alone.

    warm-up   peak * (step + 1) / warm                 while step < warm = ceil(warmup * total_steps)
    constant  peak
    linear    peak * (1 - x)                           x = (step - warm) / (total_steps - warm)
    cosine    peak * (1 + cos(pi x)) / 2
    """
    warm = math.ceil(section.warmup * total_steps)
    if step < warm:
        return section.learning_rate * (step + 1) / warm
    share = min((step - warm) / max(total_steps - warm, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1.0 - share, "cosine": (1.0 + math.cos(math.pi * share)) / 2}
    return section.learning_rate * shape[section.schedule]


class Optimiser:
    """AdamW with its schedule over the given parameters; ``steps`` counts the steps taken."""

    def __init__(self, parameters: Iterable[nn.Parameter], section: OptimiserSection, total_steps: int) -> None:
        self.parameters = list(parameters)
        self.section = section
        self.total_steps = total_steps
        self.steps = 0
        self._adamw = torch.optim.AdamW(
            self.parameters,
            lr=section.learning_rate,
            betas=section.betas,
            weight_decay=section.weight_decay,
            fused=True,
        )

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return learning_rate(self.section, self.steps, self.total_steps)

    def step(self, loss: float, *, where: str) -> float:
        """One step from the accumulated gradients, which are cleared; returns their norm before clipping.

        Errors: DivergenceError that says ``where`` if the loss or the norm is not finite; no weight has changed then.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm_value = float(norm)  # on the host, before the step: after it the weights could not be saved any more
        if not (math.isfinite(loss) and math.isfinite(norm_value)):
            self._adamw.zero_grad(set_to_none=True)
            raise DivergenceError(
                f"{where}: loss {loss:g}, gradient norm {norm_value:g}; the step was not taken and the weights are as "
                "before it. Lower the learning rate, or look at this batch; resume from the last checkpoint."
            )
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.section.max_grad_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.steps += 1
        return norm_value

    def state(self) -> dict[str, Any]:
        """Nested dict of tensors and numbers: AdamW's moments by parameter place, and the steps taken."""
        return {"steps": self.steps, "adamw": self._adamw.state_dict()["state"]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``; the recipe's rates and decays hold, not those of the time of saving."""
        self.steps = int(state["steps"])
        moments = {int(place): dict(values) for place, values in state["adamw"].items()}
        groups = self._adamw.state_dict()["param_groups"]
        self._adamw.load_state_dict({"state": moments, "param_groups": groups})
