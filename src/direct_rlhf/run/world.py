"""The processes that make one run together: which of them this is, and what they tell each other.

One process is a world of its own: nothing is sent, no process group is made, and what goes in comes out. Several are
started by torchrun (or by `direct-rlhf run --nproc`, which starts it). All of them hold the same data and take the same
decisions; the first one writes the run directory.

Everything here but the constructor is called by all processes in the same order.
"""

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from direct_rlhf.errors import BackendError, ConfigError, DirectRLHFError
from direct_rlhf.run.lock import process_start
from direct_rlhf.run.packing import pack, unpack
from direct_rlhf.run.signals import StopFlag
from direct_rlhf.run.watch import BEAT, Watch, error_named, name_of

if TYPE_CHECKING:
    from torch import Tensor

    from direct_rlhf.recipe.schema import ParallelSection

T = TypeVar("T")

KNOWN_WITHIN = 3 * BEAT  # seconds after which the watch knows why an exchange has failed


@dataclass
class _Link:
    """What ties the processes together beside the process group."""

    store: Any  # torch's key-value store
    watch: Watch
    calls: int = 0
    side: Any = None  # a process group for what goes on in the background

    def next_key(self, what: str) -> str:
        self.calls += 1
        return f"{what}/{self.calls}"

    def wait(self, key: str) -> str:
        """What the first process says under ``key``, however long it takes (the watch sees if it is gone)."""
        pause = 0.001
        while not self.store.check([key]):
            if (failure := self.watch.failure()) is not None:
                raise failure.error()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return bytes(self.store.get(key)).decode()


@dataclass(frozen=True)
class World:
    """One of ``size`` processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine
    local_size: int = 1
    restarts: int = 0  # how often torchrun has started them again
    by_torchrun: bool = False
    _link: _Link | None = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this process says how the run ended: the first one, or the second where the first is lost."""
        return self.is_main if self._link is None else self._link.watch.speaks

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the processes, in float64; all give the same names."""
        if self.size == 1:
            return dict(values)
        import torch
        from torch import distributed

        total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
        distributed.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of them."""
        return self.sum({"": float(flag)})[""] > 0 if self.size > 1 else flag

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value by rank: tensors (on the CPU) and plain values, nested (see `packing.pack`)."""
        if self.size == 1:
            return [value]
        import torch
        from torch import distributed

        mine = _to_bytes(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(sizes, torch.tensor([len(mine)]))
        longest = max(int(size) for size in sizes)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        distributed.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        return [_from_bytes(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """``work()``, in which each process is by itself; the error of one (a stop as well) is raised by all.

        Other errors than ours end the run through `joined`.
        """
        if self.size == 1:
            return work()
        error: DirectRLHFError | None = None
        try:
            result = work()
        except DirectRLHFError as raised:
            error = raised
        said = [one for one in self.gather(None if error is None else [name_of(error), str(error)]) if one is not None]
        if not said:
            return result
        kind, message = next((one for one in said if one[0] != "Interrupted"), said[0])
        raise error if error is not None and name_of(error) == kind else error_named(kind, message)

    def main(self, work: Callable[[], T]) -> T:
        """``work()`` in the first process alone, which the others wait for, however long it takes; all get its result.

        The result is a plain value (JSON). An error of ours is raised by all.
        """
        if self.size == 1:
            return work()
        assert self._link is not None
        key = self._link.next_key("main")
        if not self.is_main:
            said = json.loads(self._link.wait(key))
            if "error" in said:
                raise error_named(said["error"], said["message"])
            return said["value"]
        try:
            text = json.dumps({"value": work()})
        except DirectRLHFError as error:
            self._link.store.set(key, json.dumps({"error": name_of(error), "message": str(error)}))
            raise
        self._link.store.set(key, text)
        return json.loads(text)["value"]

    def side_group(self) -> Any:
        """A process group (gloo) for what goes on in the background."""
        from torch import distributed

        assert self._link is not None
        self._link.side = self._link.side or distributed.new_group(backend="gloo")
        return self._link.side

    def when_lost(self, tell: Callable[[DirectRLHFError], None]) -> None:
        """``tell`` is called with the cause where the run ends because another process is gone or has failed."""
        if self._link is not None:
            self._link.watch.on_failure = tell

    def explained(self, error: BaseException) -> BaseException:
        """``error``, or the fault of another process where that is behind it; then nothing is watched any more.

        Tells the others that this process cannot go on.
        """
        if self._link is None:
            return error
        watch = self._link.watch
        ours = isinstance(error, (DirectRLHFError, KeyboardInterrupt))
        failure = None if ours else watch.failure(KNOWN_WITHIN)
        if failure is None:
            watch.publish(error)
        watch.end()
        return error if failure is None else failure.error()


def launched() -> World:
    """This process as torchrun's environment describes it; a world of its own without torchrun.

    Errors: ConfigError for an environment that is only half there.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = [name for name in names if name in os.environ]
    if "TORCHELASTIC_RUN_ID" not in os.environ or not given:
        return World()
    if len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ConfigError(f"torchrun's environment lacks {missing}. Start the run with torchrun or --nproc.")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return World(rank, size, local_rank, local_size, restarts, by_torchrun=True)


def launch_id() -> str:
    """Names one start of torchrun, whatever its restarts: its run id, or where that is left open its process."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return given if given != "none" else f"{socket.gethostname()} {os.getppid()} {process_start(os.getppid())}"


_joins = 0  # one process may make several runs, one after the other


@contextmanager
def joined(me: World, section: "ParallelSection", *, device: str, stop: StopFlag) -> Iterator[World]:
    """The processes with a process group (gloo on the CPU, NCCL beside it on CUDA) and a watch over each other.

    On an error no process waits for another: each ends by itself, or is ended by its watch.
    Errors: BackendError if they do not find each other.
    """
    global _joins
    if me.size == 1:
        yield me
        return
    from torch import distributed

    _joins += 1
    wait = timedelta(seconds=section.timeout)
    attempt = f"{_joins}_{me.restarts}"  # what earlier processes have left in torchrun's store is not for these
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=wait))
        own = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        heard = distributed.PrefixStore(f"watch_{attempt}", own)
        watch = Watch(heard, rank, size, patience=section.dead_after, stop=stop)
        watch.start()
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        group = distributed.PrefixStore(f"group_{attempt}", store)
        distributed.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise BackendError(f"the {me.size} processes did not find each other: {error}") from error
    world = replace(me, _link=_Link(group, watch))
    try:
        _meet()
        yield world
    except BaseException as error:
        found = world.explained(error)
        if found is error:
            raise
        raise found from error
    watch.end()
    _meet()
    distributed.destroy_process_group()


def _meet() -> None:
    """Nobody goes on before all are here (a barrier that needs no GPU)."""
    import torch
    from torch import distributed

    distributed.all_reduce(torch.zeros(1))


def _to_bytes(value: Any) -> "Tensor":
    """uint8: the length of the plain part, the plain part as JSON, the tensors as safetensors."""
    import torch
    from safetensors.torch import save

    tensors, plain = pack(value)
    text = json.dumps(plain).encode()
    body = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
    return torch.frombuffer(bytearray(struct.pack("<Q", len(text)) + text + body), dtype=torch.uint8)


def _from_bytes(data: "Tensor") -> Any:
    from safetensors.torch import load

    content = data.numpy().tobytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return unpack(load(content[end:]), json.loads(content[8:end]))
