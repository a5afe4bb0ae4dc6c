"""What gives PPO its rewards: a reward model, a Python callable, or an HTTP endpoint, all in normalised units.

Normalised = (raw - mean) / std over the base model's own samples, so that the KL weight keeps one meaning whatever the
source. A reward model carries its statistics; the other sources are measured before the first iteration.
"""

import importlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from direct_rlhf.data.types import Turns
from direct_rlhf.errors import BackendError, ConfigError, DivergenceError
from direct_rlhf.models.sharded import gathered
from direct_rlhf.recipe.schema import HttpReward, PythonReward
from direct_rlhf.run.world import World
from direct_rlhf.train.parallel import spread

RawReward = Callable[[list[dict[str, Any]]], Sequence[float]]


@dataclass(frozen=True)
class Answer:
    """One answer to be scored; ``finished`` is False where the length cap cut it."""

    turns: Turns
    text: str
    finished: bool
    kind: str
    prompt_id: str


class Reward(Protocol):
    """A source of rewards."""

    @property
    def name(self) -> str: ...

    @property
    def low_quantile(self) -> float:
        """5 % quantile of the base's finished samples, normalised."""
        ...

    def score(self, answers: Sequence[Answer]) -> Tensor:
        """float32 [n], normalised."""
        ...


@dataclass(frozen=True)
class ModelRewardSource:
    """A `RewardModel` of this project."""

    model: Any
    name: str
    low_quantile: float
    world: World = field(default_factory=World)

    def score(self, answers: Sequence[Answer]) -> Tensor:
        """Each process scores its share."""
        items = [(answer.turns, answer.text, answer.finished) for answer in answers]
        if self.world.size == 1:
            return check_finite(self.model.score(items), answers, self.name)
        with gathered(self.model.scalar):
            scores = spread(
                self.world, [len(item[1]) for item in items], lambda rows: self.model.score([items[r] for r in rows])
            )
        return check_finite(scores, answers, self.name)


@dataclass(frozen=True)
class CallableReward:
    """Raw scores from user code or an endpoint, normalised by ``mean`` and ``std``."""

    raw: RawReward
    name: str
    mean: float = 0.0
    std: float = 1.0
    low_quantile: float = 0.0
    world: World = field(default_factory=World)

    def score(self, answers: Sequence[Answer]) -> Tensor:
        """The user's code is called by the first process alone, with all answers, as where there is but one."""
        if self.world.size > 1:
            scores = self.world.main(lambda: self._score(answers).tolist())
            return torch.tensor(scores, dtype=torch.float32)
        return self._score(answers)

    def _score(self, answers: Sequence[Answer]) -> Tensor:
        return check_finite((self.score_raw(answers) - self.mean) / self.std, answers, self.name)

    def score_raw(self, answers: Sequence[Answer]) -> Tensor:
        items = [
            {
                "prompt": [{"role": turn.role, "content": turn.text} for turn in answer.turns],
                "answer": answer.text.strip(),
                "kind": answer.kind,
            }
            for answer in answers
        ]
        try:
            values = [float(value) for value in self.raw(items)]
        except (TypeError, ValueError) as error:
            raise BackendError(f"{self.name}: rewards must be numbers, one per item ({error})") from error
        if len(values) != len(items):
            raise BackendError(f"{self.name}: returned {len(values)} rewards for {len(items)} items; return one each")
        return check_finite(torch.tensor(values, dtype=torch.float32), answers, self.name)

    def normalised_on(self, answers: Sequence[Answer]) -> "CallableReward":
        """The same source with mean, std and low quantile of its raw scores on the base's samples."""
        raw = self.score_raw(answers)
        std = float(raw.std(correction=0))
        if std < 1e-8:
            raise ConfigError(
                f"{self.name}: gives all {len(answers)} samples of the base the same reward ({float(raw[0]):g}), "
                "so PPO has nothing to learn from. Return rewards that tell answers apart."
            )
        mean = float(raw.mean())
        done = torch.tensor([answer.finished for answer in answers])
        low = torch.quantile(raw[done] if done.any() else raw, 0.05)
        return CallableReward(self.raw, self.name, mean, std, (float(low) - mean) / std, self.world)


def check_finite(scores: Tensor, answers: Sequence[Answer], name: str) -> Tensor:
    """The scores, or a DivergenceError that names the first prompt whose reward is NaN or infinite."""
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        answer = answers[bad[0]]
        raise DivergenceError(
            f"{name}: reward {float(scores[bad[0]])} for prompt {answer.prompt_id}, answer {answer.text[:80]!r} "
            f"({len(bad)} of {len(answers)} rewards are not finite). Mend the reward; nothing was trained on it."
        )
    return scores


def load_callable(section: PythonReward | HttpReward, folder: Path) -> CallableReward:
    """The user's reward, not yet normalised.

    A Python target is looked up beside the recipe (``folder``) before the installed packages.
    """
    if isinstance(section, PythonReward):
        return CallableReward(_import_target(section.target, folder), f"reward {section.target}")
    return CallableReward(_http(section.url, section.timeout), f"reward endpoint {section.url}")


def _import_target(target: str, folder: Path) -> RawReward:
    module_name, _, function = target.partition(":")
    path = str(folder.resolve())
    sys.path.insert(0, path)
    try:
        found: Any = importlib.import_module(module_name)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"ppo.reward.target = {target}: {error}. Looked in {path} and the installed packages; "
            "write it as module:function."
        ) from error
    finally:
        sys.path.remove(path)
    if not callable(found):
        raise ConfigError(f"ppo.reward.target = {target}: {function} is not a function")
    return found


def _http(url: str, timeout: float) -> RawReward:
    def post(items: list[dict[str, Any]]) -> Sequence[float]:
        request = urllib.request.Request(
            url, data=json.dumps({"items": items}).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                body = json.load(response)
        except (OSError, ValueError) as error:
            raise BackendError(
                f"reward endpoint {url}: {error}. Nothing was trained on this batch; start the server and --resume."
            ) from error
        if not isinstance(body, dict) or not isinstance(body.get("scores"), list):
            raise BackendError(f'reward endpoint {url}: expected {{"scores": [numbers]}}, got {str(body)[:120]}')
        return body["scores"]

    return post
