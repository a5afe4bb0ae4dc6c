"""`direct-rlhf run --nproc N`: starts torchrun with N processes on this machine, and ends as the run does.

torchrun answers 1 whatever its processes' codes were, so the code is read from the run's status.json. Run as a program,
this file is torchrun without the traceback that it ends with when a process has ended with a code.
"""

import importlib.metadata
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.needs import require_processes
from direct_rlhf.run.atomic import read_json
from direct_rlhf.run.directory import STATUS, RunDirectory
from direct_rlhf.run.lock import refuse_if_locked
from direct_rlhf.run.world import launched

SHUTDOWN = "--shutdown-timeout"


def launch(
    loaded: LoadedRecipe,
    root: Path,
    arguments: Sequence[str],
    *,
    resume: bool,
    overwrite: bool,
    nproc: int,
    max_restarts: int = 0,
) -> int:
    """Runs ``direct-rlhf run ARGUMENTS`` in ``nproc`` processes; the exit code of the run.

    The run directory is made or found here, so that the processes always go on with it, started again as well. The
    first signal lets them save and stop; the second ends them at once.
    """
    if launched().by_torchrun:
        raise ConfigError("--nproc starts torchrun; this process has been started by it. Leave --nproc out.")
    require_processes(loaded.recipe, nproc)
    path = RunDirectory.open(root, loaded, resume=resume, overwrite=overwrite).path
    grace = loaded.recipe.parallel.grace
    line = command([*arguments, "--root", str(root), "--resume"], nproc=nproc, max_restarts=max_restarts, grace=grace)
    start = time.time()
    code = _ended(line, nproc)
    return _code(path, start, code)


def command(arguments: Sequence[str], *, nproc: int, max_restarts: int, grace: float) -> list[str]:
    """torchrun's command line; where it knows how, it leaves ``grace`` seconds between SIGTERM and SIGKILL."""
    options = ["--standalone", f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
    if torchrun_has(SHUTDOWN):
        options.append(f"{SHUTDOWN}={round(grace)}")
    return [sys.executable, "-m", "direct_rlhf.launch", *options, "-m", "direct_rlhf", "run", *arguments]


def torchrun_has(option: str) -> bool:
    """Whether the installed torchrun knows an option, without starting torch."""
    file = Path(str(importlib.metadata.distribution("torch").locate_file("torch/distributed/run.py")))
    return file.is_file() and f'"{option}"' in file.read_text(encoding="utf-8")


def _ended(line: Sequence[str], nproc: int) -> int:
    """Runs torchrun to its end, and passes signals on to it."""
    threads = str(max(len(os.sched_getaffinity(0)) // nproc, 1))
    # In a session of its own it gets no Ctrl+C from the terminal beside ours.
    process = subprocess.Popen(line, start_new_session=True, env={"OMP_NUM_THREADS": threads, **os.environ})
    signalled = False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal signalled
        if process.poll() is None:
            # Its processes end within a second once they see that it is gone.
            process.send_signal(signal.SIGKILL if signalled else signal.SIGTERM)
        if not signalled:
            text = f"\n{signal.Signals(number).name}: saving and stopping; a second signal stops at once\n"
            os.write(2, text.encode())  # print() may not be called inside itself
        signalled = True

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
            process.wait()


def _code(path: Path, start: float, code: int) -> int:
    """The run's exit code. What the processes left unsaid is written down here."""
    for _ in range(100):  # a process that has lost its torchrun ends within some seconds
        with suppress(ConfigError):
            refuse_if_locked(path)
            break
        time.sleep(0.1)
    status = path / STATUS
    said = read_json(status) if status.is_file() and status.stat().st_mtime >= start else None
    if said is not None and said["state"] != "running":
        return int(said["exit_code"])
    reason = f"the processes ended without a word (torchrun's code: {code}). Go on with --resume."
    print(f"direct-rlhf: {reason}", file=sys.stderr)
    RunDirectory(path).status("failed", 1, reason)
    return 1


def torchrun(arguments: Sequence[str]) -> int:
    """torchrun, but processes that ended with a code have said why, and those that a signal ended are one line each."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(list(arguments))
    except ChildFailedError as error:
        for failure in error.failures.values():
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                print(f"direct-rlhf: a process (pid {failure.pid}) was ended by {name}", file=sys.stderr)
        return 1
    except SignalException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
