"""Several threads at parts of tensors, in bounded memory."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from direct_rlhf.merge.plan import Job

MOMENT = 0.02  # seconds


@dataclass(frozen=True)
class Part:
    """What one thread does at a time: elements [start, end) of a tensor."""

    job: Job
    start: int
    end: int
    held: int  # elements of it that are in memory at once


def at_most(
    parts: Sequence[Part], do: Callable[[Part], None], threads: int, room: int, meanwhile: Callable[[], None]
) -> Iterator[Part]:
    """Does the parts in ``threads`` threads, in order of starting; yields each when it is done.

    At any time those in work hold together at most ``room`` elements, or there is one alone. ``meanwhile`` is called
    about every MOMENT, here; what it raises ends the work when the parts that are running are done.
    """
    running: dict[Future[None], Part] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
    last = time.monotonic()
    waiting = list(reversed(parts))
    try:
        while waiting or running:
            while waiting and len(running) < threads and (not running or _held(running) + waiting[-1].held <= room):
                part = waiting.pop()
                running[pool.submit(_inference, do, part)] = part
            done, _ = wait(running, timeout=MOMENT, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                yield running.pop(future)
            if time.monotonic() - last >= MOMENT:
                meanwhile()
                last = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)


def _held(running: Mapping[Future[None], Part]) -> int:
    return sum(part.held for part in running.values())


def _inference(do: Callable[[Part], None], part: Part) -> None:
    with torch.inference_mode():  # which each thread has for itself
        do(part)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """torch's own operations in one thread: ours share the cores, and sums would depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
