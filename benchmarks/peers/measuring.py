"""What each side of a comparison writes down: when its steps ended, and its memory. Needs nothing but Python."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def memory_mb(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most so far) of this process, in MB.

    Not ``ru_maxrss``: a process starts with that of its parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


class Clock:
    """``ended`` is called when training begins and at the end of every step.

    Make it after the imports and before the models are loaded.
    """

    def __init__(self) -> None:
        self.before_models_mb = memory_mb("VmRSS")
        self.training_peak_mb = 0.0
        self.times: list[float] = []

    def ended(self) -> None:
        self.times.append(time.perf_counter())
        self.training_peak_mb = memory_mb("VmHWM")

    def finish(self, **facts: Any) -> None:
        """Print the side's one line: seconds of each step, memory, and ``facts``."""
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        memory = {
            "peak_mb": memory_mb("VmHWM"),
            "training_peak_mb": self.training_peak_mb,  # without what came after the last step
            "before_models_mb": self.before_models_mb,
        }
        print(json.dumps({"steps": steps, **memory, **facts}))


class Ticks:
    """A progress display for our stages: it shows nothing, and tells the clock when the bar of this title moves."""

    def __init__(self, clock: Clock, title: str) -> None:
        self.clock, self.title = clock, title

    @contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator["Bar"]:
        yield Bar(self.clock if description.startswith(self.title) else None)


class Bar:
    def __init__(self, clock: Clock | None) -> None:
        self.clock = clock

    def advance(self, amount: int = 1, **fields: object) -> None:
        if self.clock is not None:
            self.clock.ended()
