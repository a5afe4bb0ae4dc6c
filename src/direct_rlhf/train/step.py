"""The optimiser step that every kind of training shares: schedule, guards on the host, clipping, AdamW."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from direct_rlhf.errors import DivergenceError
from direct_rlhf.recipe.schema import OptimiserSection
from direct_rlhf.run.shards import is_shard

SPIKE_WINDOW = 128  # steps whose gradient norms a new one is compared with
SPIKE_MIN = 32  # fewer than these say nothing
SPIKE_FLOOR = 0.05  # of the mean: norms that hardly vary would make a spike of every ripple


@dataclass(frozen=True)
class Step:
    """What one call of ``Optimiser.step`` did."""

    norm: float  # of the gradient before clipping
    taken: bool = True  # False: the gradients were dropped and no weight has changed
    fault: str = ""  # name of what was wrong: nonfinite_step or gradient_spike; empty: nothing
    seen: str = ""  # the fault in words


class GradientSpikes:
    """Watches gradient norms for values far above those of the steps before.

    A norm is a spike if it passes mean + sigma * max(std, 0.05 mean) of the last 128 norms (from the 32nd step on). A
    spike enters the window as that limit, so that one cannot hide the next, and a lasting change is learnt.
    """

    def __init__(self, sigma: float | None) -> None:
        self.sigma = sigma
        self.norms: list[float] = []

    def limit(self) -> float:
        """The norm from which on a step is a spike; inf while there is too little to compare with, or if it is off."""
        if self.sigma is None or len(self.norms) < SPIKE_MIN:
            return math.inf
        mean = statistics.fmean(self.norms)
        if mean == 0:  # no scale to compare with, and a limit of 0 would never learn one
            return math.inf
        return mean + self.sigma * max(statistics.pstdev(self.norms, mean), SPIKE_FLOOR * mean)

    def add(self, norm: float) -> None:
        self.norms = [*self.norms, min(norm, self.limit())][-SPIKE_WINDOW:]


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
    """AdamW with its schedule over the given parameters; ``steps`` counts the steps done, skipped ones included."""

    def __init__(self, parameters: Iterable[nn.Parameter], section: OptimiserSection, total_steps: int) -> None:
        self.parameters = list(parameters)
        self.section = section
        self.total_steps = total_steps
        self.steps = 0
        self._skipped = 0  # in a row
        self._spikes = GradientSpikes(section.spike_sigma)
        self._adamw: Any = self._made()

    def _made(self) -> Any:
        section = self.section
        usual: dict[str, Any] = {
            "lr": section.learning_rate,
            "betas": section.betas,
            "weight_decay": section.weight_decay,
        }
        if section.kind == "adamw":
            return torch.optim.AdamW(self.parameters, **usual, fused=True)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(self.parameters, **usual)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return learning_rate(self.section, self.steps, self.total_steps)

    def step(self, loss: float, *, where: str) -> Step:
        """One step from the accumulated gradients, which are cleared.

        A loss or norm that is not finite is never stepped on; the section says whether that ends the run or the batch
        is left out, and whether a batch whose norm is a spike is left out too.
        Errors: DivergenceError that says ``where`` for a non-finite step, or for too many left out in a row; no weight
        has changed then.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        if is_shard(norm):
            norm = norm.full_tensor()
        norm_value = float(norm)  # on the host, before the step: after it the weights could not be saved any more
        found = self._judge(loss, norm_value, where)
        if found.taken:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.section.max_grad_norm, norm)
            for group in self._adamw.param_groups:
                group["lr"] = self.learning_rate
            self._adamw.step()
        self.forget()
        self.steps += 1
        self._skipped = 0 if found.taken else self._skipped + 1
        if math.isfinite(norm_value):
            self._spikes.add(norm_value)
        return found

    def forget(self) -> None:
        """Drops the accumulated gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def _judge(self, loss: float, norm: float, where: str) -> Step:
        """Whether to take the step; raises, with the gradients dropped, where the run has to end."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        limit = self._spikes.limit()
        if finite and norm <= limit:
            return Step(norm)
        if finite:
            seen = f"{where}: gradient norm {norm:g}, expected at most {limit:g} from the steps before"
            found = Step(norm, not self.section.skip_spikes, "gradient_spike", seen)
        else:
            found = Step(norm, False, "nonfinite_step", f"{where}: loss {loss:g}, gradient norm {norm:g}")
        if found.taken:
            return found
        stops = not finite and self.section.on_nonfinite == "stop"
        if stops or self._skipped >= self.section.max_skipped:
            self.forget()
            many = f" (after {self._skipped} steps left out in a row)" if self._skipped else ""
            raise DivergenceError(
                f"{found.seen}; the step was not taken and the weights are as before it{many}. Lower the learning "
                "rate, or look at this batch; resume from the last checkpoint."
            )
        return found

    def like(self) -> dict[str, Tensor]:
        """The moments' names in a packed ``state()``, and the parameter that each lies like."""
        moments = ("exp_avg", "exp_avg_sq")
        return {f"adamw/{place}/{name}": tensor for place, tensor in enumerate(self.parameters) for name in moments}

    def state(self) -> dict[str, Any]:
        """Nested dict of tensors and numbers: AdamW's moments by parameter place, steps done, the guards' memory."""
        return {
            "steps": self.steps,
            "skipped": self._skipped,
            "norms": list(self._spikes.norms),
            "adamw": self._adamw.state_dict()["state"],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``; the recipe's rates and decays hold, not those of the time of saving."""
        self.steps = int(state["steps"])
        self._skipped = int(state["skipped"])
        self._spikes.norms = [float(norm) for norm in state["norms"]]
        moments = {int(place): dict(values) for place, values in state["adamw"].items()}
        groups = self._adamw.state_dict()["param_groups"]
        self._adamw.load_state_dict({"state": moments, "param_groups": groups})
