"""What a model must know of lying in parts over several processes (`train/parallel.py` puts it there).

The weights of a sharded module are whole only inside its forward, where every process has to be at the same time. What
uses weights outside of a forward goes through `call`; what runs without the others needs the weights gathered before.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from direct_rlhf.errors import BackendError
from direct_rlhf.run import shards

T = TypeVar("T")

INSIDE = "inside"  # a sharded module's method that is one of its forwards: inside(function, *arguments)


def call(module: nn.Module, function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` as one of the module's forwards, where its weights are whole.

    Tensors whose gradients flow are among the arguments and, alone or in a tuple, the result.
    """
    inside: Callable[..., T] | None = vars(module).get(INSIDE)
    return function(*arguments) if inside is None else inside(function, *arguments)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """All weights whole in every process, for work that each does by itself and without gradients.

    All processes enter it together; a module that is not sharded is as it is. Inside it FSDP does not see the forwards,
    which are not the same in all processes, and after which it would expect the same backward passes.
    """
    parts: list[Any] = [part for part in module.modules() if INSIDE in vars(part)]
    for part in parts:
        part.unshard()
    forwards = [vars(part).pop(INSIDE) for part in parts]
    hooks = [_take_out_hooks(part) for part in parts]
    try:
        yield
    finally:
        for part, forward, taken in zip(parts, forwards, hooks, strict=True):
            setattr(part, INSIDE, forward)
            for place, key, hook in taken:
                place[key] = hook
                place.move_to_end(key, last=place is part._forward_hooks)  # FSDP's first look and its last
            part.reshard()


def _take_out_hooks(part: nn.Module) -> list[tuple[OrderedDict[int, Any], int, Any]]:
    """FSDP's hooks on a module's forward, which no longer stand there: (where, key, hook)."""
    taken: list[tuple[OrderedDict[int, Any], int, Any]] = []
    places: tuple[Any, Any] = part._forward_pre_hooks, part._forward_hooks
    for place in places:
        fsdps = [key for key, hook in place.items() if _is_fsdps(hook)]
        if len(fsdps) != 1:
            raise BackendError(
                f"{type(part).__name__}: FSDP's hooks are not as they are known. Use torch 2.11 to 2.13."
            )
        taken += [(place, key, place.pop(key)) for key in fsdps]
    return taken


def _is_fsdps(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")


@contextmanager
def whole_on_cpu(module: nn.Module, *, keep: bool) -> Iterator[None]:
    """The weights as they are trained, whole and on the CPU, in the processes that ``keep`` them: to be written.

    All processes enter it together, since they give their parts; nothing may be computed with the module meanwhile. One
    whole tensor at a time is on the device.
    """
    places = [(part, name) for part in module.modules() for name in part._parameters]
    before = [part._parameters[name] for part, name in places]
    distinct = {id(parameter): parameter for parameter in before}  # tied weights stay tied
    whole: dict[int, nn.Parameter] = {}
    for key, parameter in distinct.items():
        if parameter is not None and shards.is_shard(parameter):
            share: Any = parameter.detach()
            full = share.full_tensor()
            if keep:
                whole[key] = nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad)
    for (part, name), parameter in zip(places, before, strict=True):
        part._parameters[name] = whole.get(id(parameter), parameter)
    try:
        yield
    finally:
        for (part, name), parameter in zip(places, before, strict=True):
            part._parameters[name] = parameter
