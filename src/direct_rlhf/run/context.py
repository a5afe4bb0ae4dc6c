"""What every stage is given: the recipe, its run directory, a way to be stopped and a way to show progress."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from direct_rlhf.errors import Interrupted
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.run.directory import RunDirectory
from direct_rlhf.run.world import World

log = logging.getLogger(__name__)

QUIET_SECONDS = 1.0  # what is over sooner leaves no line in a log file


class Bar(Protocol):
    """One running task."""

    def advance(self, amount: int = 1, **fields: object) -> None:
        """Moves on by ``amount``; ``fields`` are shown beside the bar (numbers with 3 significant digits)."""


class MakesBars(Protocol):
    """``with progress("rollouts", total=64) as bar``. ``total`` is None where the end is not known."""

    def __call__(self, description: str, total: int | None = None) -> AbstractContextManager[Bar]: ...


class ProgressBars:
    """Bars on a terminal; elsewhere one plain line at the start and one at the end of what takes over a second.

    Bars may be nested: all that run at the same time share one display.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._display: Progress | None = None

    @contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Bar]:
        if not self._console.is_terminal:
            lines = _Lines(description, total)
            yield lines
            lines.end()
            return
        outermost = self._display is None
        if self._display is None:
            self._display = _display(self._console)
            self._display.start()
        bar = _RichBar(self._display, description, total)
        try:
            yield bar
        finally:
            self._display.remove_task(bar.task)
            if outermost:
                self._display.stop()
                self._display = None
        if bar.seconds >= QUIET_SECONDS:
            self._console.print(f"[dim]{bar.summary()}[/dim]", highlight=False)


class NoBars:
    """For the processes beside the first one."""

    @contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Bar]:
        yield self

    def advance(self, amount: int = 1, **fields: object) -> None:
        return


@dataclass(frozen=True)
class StageContext:
    """One attempt at a run, as its stages see it.

    In a run of several processes ``should_stop`` and ``check_stop`` are this process's own view, for work that it does
    by itself (inside ``world.together`` or ``world.main``); where all go on together they ask each other, with
    ``stopping`` and ``check_stop_together``.
    """

    recipe: Recipe
    run: RunDirectory
    device: str = "cpu"  # a torch device name; "auto" is already decided
    should_stop: Callable[[], bool] = lambda: False
    progress: MakesBars = field(default_factory=ProgressBars)
    world: World = field(default_factory=World)

    def check_stop(self) -> None:
        """Raises Interrupted once a signal has asked the run to stop. Call it where stopping loses nothing."""
        if self.should_stop():
            self.stop()

    def stopping(self) -> bool:
        """Whether one of the processes has been asked to stop; the same answer in all."""
        return self.world.any(self.should_stop())

    def check_stop_together(self) -> None:
        """`check_stop` of all processes at once."""
        if self.stopping():
            self.stop()

    def stop(self) -> NoReturn:
        raise Interrupted(f"{self.run.path}: stopped on request. Go on with --resume.")

    def say(self, text: str) -> None:
        """One line to the user, and to the attempt's log. Use it for what a user must know before the report."""
        log.info("%s", text)
        if self.world.is_main:
            print(text, file=sys.stderr, flush=True)


@dataclass
class _Counted:
    description: str
    total: int | None
    done: int = 0
    fields: dict[str, object] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def count(self, amount: int, fields: dict[str, object]) -> None:
        self.done += amount
        self.fields.update(fields)

    def shown_fields(self) -> str:
        return "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.fields.items())

    def shown_count(self) -> str:
        """``16/64``; ``16`` where the end is not known; nothing for work that is one piece."""
        return f"{self.done}/{self.total}" if self.total is not None else str(self.done or "")

    def summary(self) -> str:
        count = f"{self.shown_count()} in " if self.shown_count() else ""
        return f"{self.description}: {count}{self.seconds:.1f} s  {self.shown_fields()}".rstrip()


class _Lines(_Counted):
    """For log files."""

    announced = False

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.count(amount, fields)
        if not self.announced and self.seconds >= QUIET_SECONDS:
            self.announced = True
            print(f"{self.description} ...", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.seconds >= QUIET_SECONDS:
            print(self.summary(), file=sys.stderr, flush=True)


class _RichBar(_Counted):
    def __init__(self, display: Progress, description: str, total: int | None) -> None:
        super().__init__(description, total)
        self.display = display
        self.task = display.add_task(description, total=total, count=self.shown_count(), shown="")

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.count(amount, fields)
        self.display.update(self.task, completed=self.done, count=self.shown_count(), shown=self.shown_fields())


def _display(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", markup=False),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[shown]}", style="dim", markup=False),
        console=console,
        transient=True,
    )
