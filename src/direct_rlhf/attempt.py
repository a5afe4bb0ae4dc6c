"""How an attempt at a run begins and ends: device, processes, directory, and what status.json says of it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from direct_rlhf.errors import ConfigError, DirectRLHFError, Interrupted
from direct_rlhf.recipe.load import LoadedRecipe
from direct_rlhf.recipe.needs import require_processes
from direct_rlhf.recipe.schema import Recipe
from direct_rlhf.run.directory import MANIFEST, Follower, RunDirectory
from direct_rlhf.run.signals import StopFlag
from direct_rlhf.run.world import World, joined, launch_id


def device_of(recipe: Recipe) -> str:
    """cpu or cuda. Errors: ConfigError for a device that torch does not see."""
    import torch

    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda: torch sees no CUDA device; set device=cpu, or see `direct-rlhf doctor`")
    return device


@contextmanager
def processes(me: World, recipe: Recipe, stop: StopFlag) -> Iterator[World]:
    """The processes of the run, each with its device."""
    if me.size == 1:
        yield me
        return
    import torch

    require_processes(recipe, me.size)
    device = device_of(recipe)
    if device == "cuda":
        if me.local_size > torch.cuda.device_count():
            raise ConfigError(
                f"{me.local_size} processes on this machine, and {torch.cuda.device_count()} CUDA devices: start one "
                "process a device (--nproc, or torchrun's --nproc-per-node)"
            )
        torch.cuda.set_device(me.local_rank)
    with joined(me, recipe.parallel, device=device, stop=stop) as world:
        yield world


def run_directory(root: Path, loaded: LoadedRecipe, world: World, *, resume: bool, overwrite: bool) -> RunDirectory:
    """The run's directory, made by the first process. Those that torchrun has started again go on with their run."""
    path = root / loaded.recipe.name

    def make() -> str:
        again = world.restarts > 0 and (path / MANIFEST).is_file() and RunDirectory(path).launched_by(launch_id())
        if again and (error := RunDirectory(path).not_worth_another_try()) is not None:
            raise error
        made = RunDirectory.open(root, loaded, resume=resume or again, overwrite=overwrite and not again)
        return str(made.path)

    kind = RunDirectory if world.is_main else Follower
    return kind(Path(world.main(make)), world)


@contextmanager
def attempt(directory: RunDirectory, stop: StopFlag) -> Iterator[None]:
    """The only writer of a run; however the attempt ends, status.json says so."""
    world = directory.world

    def ended(error: BaseException) -> None:
        if not world.speaks:
            return
        state = "interrupted" if isinstance(error, Interrupted) else "failed"
        ours = isinstance(error, DirectRLHFError)
        code = error.exit_code if isinstance(error, DirectRLHFError) else 1
        reason = str(error) if ours else f"{type(error).__name__}: {error}"
        RunDirectory.status(directory, state, code, reason)
        if not world.is_main:
            print(f"direct-rlhf: {reason}", file=sys.stderr, flush=True)

    with directory.locked():
        directory.status("running", None)
        world.when_lost(ended)
        try:
            with stop.at_once():
                yield
        except BaseException as raised:
            error = world.explained(raised)
            if isinstance(error, (Interrupted, KeyboardInterrupt)):
                error = Interrupted(f"{directory.path}: stopped on request. Go on with --resume.")
            ended(error)
            if error is raised:
                raise
            raise error from raised
        directory.status("done", 0)
