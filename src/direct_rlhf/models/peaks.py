"""Peak memory of each phase of a stage, as the device itself counts it.

    with recording(device, earlier) as peaks:      a stage
        with phase("sample"):                      a part of it, anywhere below; what is in no phase is the rest

On CUDA it is what the allocator gave out (and what it reserved from the device). On Linux it is the resident set of the
process: the kernel keeps its high-water mark, which each phase starts anew by writing to /proc/self/clear_refs. So
`ru_maxrss` of a process that records is that of its last phase. Where the kernel refuses, or is another one, the mark
only rises, and a phase shows the peak so far. Reading costs some tens of microseconds and never fails a run.
"""

import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

MIB = 2**20
REST = "rest"  # loading, saving and whatever else is in no phase
PREFIX, RESERVED = "peak_memory_", "peak_reserved_"  # fact names: either and the phase
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peaks:
    """The peaks of one stage so far, in MiB, by fact name.

    ``earlier``: those of the attempts before this one. ``rest``: how to call what is in no phase.
    """

    def __init__(self, device: str, earlier: Mapping[str, float] | None = None, rest: str = REST) -> None:
        self._on_cuda = torch.device(device).type == "cuda"
        self._device = device
        self._facts = dict(earlier or {})
        self._rest = self._phase = rest
        self.separate = self._restart()  # False: a phase shows the peak of the process so far

    @property
    def facts(self) -> dict[str, float]:
        """``peak_memory_PHASE`` and, on CUDA, ``peak_reserved_PHASE``, MiB."""
        self._read()
        return dict(self._facts)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside counts for ``name``. A phase inside a phase belongs to the outer one."""
        if self._phase != self._rest:
            yield
            return
        self._switch(name)
        try:
            yield
        finally:
            self._switch(self._rest)

    def line(self) -> str:
        """For the screen: each phase with its peak."""
        shown = {name.removeprefix(PREFIX): value for name, value in self.facts.items() if name.startswith(PREFIX)}
        what = "allocated on the GPU" if self._on_cuda else "resident"
        so_far = "" if self.separate else ", the highest so far"
        order = sorted(shown, key=lambda phase: phase == self._rest)
        return f"peak memory ({what}, MiB{so_far}): " + ", ".join(f"{phase} {shown[phase]:,.0f}" for phase in order)

    def _switch(self, name: str) -> None:
        self._read()
        self._phase = name
        self._restart()

    def _read(self) -> None:
        if self._on_cuda:
            self._keep(PREFIX, torch.cuda.max_memory_allocated(self._device))
            self._keep(RESERVED, torch.cuda.max_memory_reserved(self._device))
        else:
            self._keep(PREFIX, resident_peak())

    def _keep(self, kind: str, n_bytes: int) -> None:
        name = kind + self._phase
        self._facts[name] = max(round(n_bytes / MIB, 2), self._facts.get(name, 0.0))

    def _restart(self) -> bool:
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        return restart_resident_peak()


_recording: ContextVar[Peaks | None] = ContextVar("recording", default=None)


@contextmanager
def recording(device: str, earlier: Mapping[str, float] | None = None, rest: str = REST) -> Iterator[Peaks]:
    """Records the phases of a stage on ``device``; see `Peaks`."""
    peaks = Peaks(device, earlier, rest)
    token = _recording.set(peaks)
    try:
        yield peaks
    finally:
        _recording.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What runs inside counts for ``name`` of the stage that is being recorded; without one nothing happens."""
    peaks = _recording.get()
    if peaks is None:
        yield
        return
    with peaks.phase(name):
        yield


def resident_peak() -> int:
    """Bytes: the highest resident set of this process since the last restart (or, outside of Linux, ever)."""
    found = _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if found is None else found


def resident() -> int:
    """Bytes that are resident now; the highest so far where the system does not say."""
    found = _status("VmRSS")
    return resident_peak() if found is None else found


def _status(field: str) -> int | None:
    """One of the sizes that Linux knows of this process, in bytes."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def restart_resident_peak() -> bool:
    """The kernel's high-water mark starts from what is resident now; False where that cannot be asked for."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
