"""What a PPO run remembers, and its checkpoints: at the border of an iteration and at every border inside one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.models.roles import Roles
from direct_rlhf.rollout.types import Rollout
from direct_rlhf.run.checkpoints import Checkpoint, CheckpointStore
from direct_rlhf.run.packing import pack, unpack
from direct_rlhf.train.experience import Scored
from direct_rlhf.train.step import Optimiser
from direct_rlhf.train.update import Position


@dataclass
class Progress:
    """What a PPO run remembers from iteration to iteration, beside weights and optimisers."""

    iteration: int = 0  # iterations done
    kl_coefficient: float = 0.0
    kl_floor: float = 0.0  # the guard's raises: an adaptive weight stays above it
    multiplier: float = 0.0  # lambda of PPO-Lagrangian
    costs: list[float] = field(default_factory=list)  # of the last episodes, oldest first
    history: list[dict[str, float]] = field(default_factory=list)  # the metrics that detectors and the stop rule read
    alerts: list[str] = field(default_factory=list)  # names already said
    best: dict[str, float] | None = None  # iteration, held_out_reward, held_out_kl
    stopped: str = ""  # why the run ended before its last iteration
    probe_start: dict[str, list[float]] | None = None  # general skill before the first update, by task
    probes: int = 0  # the guard's looks since then
    raises: int = 0  # of the KL weight, by the guard
    worst: float | None = None  # the lowest difference a probe has shown


@dataclass
class Work:
    """An iteration that has begun. What is None (or empty) is still to be done; what is there is used again."""

    rollout: Rollout | None = None
    scored: Scored | None = None
    warmed: bool = False  # the critics' warm-up is behind us, and the values are those after it
    position: Position = field(default_factory=Position)
    values: dict[str, float] = field(default_factory=dict)  # the iteration's metrics, once the update is done
    alerts: list[dict[str, Any]] = field(default_factory=list)  # written when the iteration ends

    def state(self) -> dict[str, Any]:
        return {
            "rollout": None if self.rollout is None or self.scored is not None else self.rollout.state(),
            "scored": None if self.scored is None else self.scored.state(),
            "warmed": self.warmed,
            "position": asdict(self.position),
            "values": self.values,
            "alerts": self.alerts,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        scored = None if state["scored"] is None else Scored.from_state(state["scored"])
        rollout = None if state["rollout"] is None else Rollout.from_state(state["rollout"])
        return cls(
            rollout=rollout if scored is None else scored.rollout,
            scored=scored,
            warmed=state["warmed"],
            position=Position(**state["position"]),
            values=dict(state["values"]),
            alerts=list(state["alerts"]),
        )


def save(
    store: CheckpointStore,
    progress: Progress,
    work: Work,
    roles: Roles,
    optimisers: Mapping[str, Optimiser],
    chunks: Mapping[str, ChunkSize],
    *,
    later: bool = False,
) -> None:
    """One checkpoint: weights, optimisers, counters, and the iteration that has begun (``later``: see the store)."""
    tensors: dict[str, Any] = {role: roles.state(role) for role in roles.trained}
    states: dict[str, Any] = {}
    for role, optimiser in optimisers.items():
        tensors[f"{role}_optimiser"], states[f"{role}_optimiser"] = pack(optimiser.state())
    tensors["work"], states["work"] = pack(work.state())
    sizes = {name: chunk.size for name, chunk in chunks.items()}
    store.save(progress.iteration, tensors, {"progress": asdict(progress), "chunks": sizes, **states}, later=later)


def restore(
    checkpoint: Checkpoint | None,
    progress: Progress,
    roles: Roles,
    optimisers: Mapping[str, Optimiser],
    chunks: Mapping[str, ChunkSize],
) -> Work:
    """Everything as the checkpoint has it, and the iteration that had begun; a new one without any."""
    if checkpoint is None:
        return Work()
    work = checkpoint.part("work")  # before anything is changed
    for role in roles.trained:
        roles.load_state(role, checkpoint.tensors(role, like=roles.named(role)))
    for role, optimiser in optimisers.items():
        name = f"{role}_optimiser"
        optimiser.load_state(unpack(checkpoint.tensors(name, like=optimiser.like()), checkpoint.part(name)))
    for name, value in checkpoint.part("progress").items():
        setattr(progress, name, value)
    for name, size in checkpoint.part("chunks").items():
        chunks[name].size = size
    return Work.from_state(unpack(checkpoint.tensors("work"), work))
