"""What processes send each other: the collectives of FSDP2 as `train/parallel.py` sets it up, in bytes and seconds.

In a collective over n processes each sends (n - 1) / n of the whole, in an all-reduce twice that. It takes as long as
its slowest link needs for these bytes, and the steps of its ring: n in all, of which as many go between nodes as there
are nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from direct_rlhf.scale.hardware import Hardware
from direct_rlhf.scale.memory import Role, roles_of
from direct_rlhf.scale.setting import Setting

TOKEN_BYTES = 24  # of an answer's token that all processes get: id, masks, three log-probabilities and a value
TRUNK = "trunk (shared, frozen)"


@dataclass(frozen=True)
class Collective:
    """``count`` calls that together move ``bytes`` (of whole tensors) over ``over`` processes on ``nodes`` nodes.

    ``groups``: so many of them share a node's network at the same time.
    """

    what: str
    bytes: float
    count: int
    over: int
    nodes: int
    groups: int = 1
    reduced: bool = False  # an all-reduce, else an all-gather or a reduce-scatter

    @property
    def sent(self) -> float:
        """Bytes that each process sends."""
        return self.bytes * (self.over - 1) / self.over * (2 if self.reduced else 1)

    def seconds(self, hardware: Hardware) -> float:
        if self.over == 1:
            return 0.0
        between = self.nodes > 1
        speed = min(hardware.link, hardware.network / self.groups) if between else hardware.link
        steps = (self.over - self.nodes) * hardware.link_latency + between * self.nodes * hardware.network_latency
        return self.sent / (speed * hardware.traffic_use) + self.count * steps * (2 if self.reduced else 1)


def gather(setting: Setting, what: str, n_bytes: float, *, count: int) -> Collective:
    """Over the processes that share one copy, which stand side by side: weights made whole, or gradients summed."""
    nodes = -(-setting.shard // setting.per_node)
    return Collective(what, n_bytes, count, setting.shard, nodes)


def of_pass(setting: Setting, role: Role) -> list[Collective]:
    """Of one forward and backward of a trained role: FSDP2 sums the gradients after each."""
    shape, size = setting.shape, setting.computed
    has_head = setting.lora or role.name in ("policy", "sft", "dpo")
    again = setting.recipe.parallel.reshard_after_forward
    calls = shape.layers + 1
    found = [gather(setting, "weights, forward", size * (shape.whole if has_head else shape.trunk), count=calls)]
    if again:
        found.append(gather(setting, "weights, backward", size * shape.layers * shape.layer, count=shape.layers))
    found.append(gather(setting, "gradients, to their shares", role.gradients, count=calls))
    if setting.copies > 1:
        here = max(setting.per_node // setting.shard, 1)  # copies on one node
        nodes = -(-setting.copies // here)
        groups = min(setting.per_node, setting.gpus) // min(here, setting.copies)
        share = role.gradients / setting.shard
        found.append(Collective("gradients, between copies", share, calls, setting.copies, nodes, groups, reduced=True))
    return found


def seconds(collectives: Sequence[Collective], hardware: Hardware) -> float:
    """Of several that are under way together: links inside of nodes and the network between them work side by side."""
    sums = [0.0, 0.0]
    for one in collectives:
        sums[one.nodes > 1] += one.seconds(hardware)
    return max(sums)


def of_rollout(setting: Setting) -> list[Collective]:
    """Of one iteration outside of the update: the policy for sampling, and each model that scores."""
    shape, size = setting.shape, setting.computed
    calls = shape.layers + 1
    scoring = [role for role in roles_of(setting, "ppo") if role.name not in ("policy", TRUNK)]
    if setting.lora:
        scoring.append(Role("reference", 0))
    found = [gather(setting, "policy, to sample", size * shape.whole, count=calls)]
    for role in scoring:
        if role.frozen and not setting.recipe.parallel.shard_frozen:
            continue
        has_head = setting.lora or role.name == "reference"
        n_bytes = size * (shape.whole if has_head else shape.trunk)
        found.append(gather(setting, f"{role.name}, to score", n_bytes, count=calls))
    return found


def exchanged(setting: Setting) -> int:
    """Bytes of an iteration's answers and scores, which all processes get (over gloo)."""
    return 0 if setting.gpus == 1 else setting.recipe.ppo.rollouts * setting.answer * TOKEN_BYTES
