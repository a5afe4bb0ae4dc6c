"""`direct-rlhf doctor`: what this machine and this installation offer. Imports torch only when asked to look deeply."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from direct_rlhf import __version__
from direct_rlhf.errors import ConfigError

PACKAGE = "direct-rlhf"
LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def examine(*, deep: bool = False) -> Iterator[tuple[str, str]]:
    """Pairs of what and what was found. Errors: ConfigError, at the end, if something always needed is missing."""
    yield PACKAGE, __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    core, extras = requirements()
    for name in core:
        yield name, _version(name) or "missing"
    if deep:
        yield from _devices()
    else:
        yield "GPU", "nvidia-smi found; look closer with --deep" if shutil.which("nvidia-smi") else "no nvidia-smi"
    for extra, names in extras.items():
        absent = [name for name in names if _version(name) is None]
        found = ", ".join(f"{name} {_version(name)}" for name in names if name not in absent)
        yield f"extra {extra}", f'{", ".join(absent)} missing: pip install "{PACKAGE}[{extra}]"' if absent else found
    yield "cores", str(_cores())
    yield "memory", f"{_memory_bytes() / 2**30:.1f} GiB"
    yield "free disk here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB in {Path.cwd()}"
    if missing := [name for name in core if _version(name) is None]:
        raise ConfigError(f"missing: {', '.join(missing)}. Run: pip install {PACKAGE}")


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What the installed package says it needs: always, and by extra (without `dev`, which is for its makers)."""
    core: list[str] = []
    extras: dict[str, list[str]] = defaultdict(list)
    for line in importlib.metadata.requires(PACKAGE) or []:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name and not extra:
            core.append(name.group())
        elif name and extra and extra.group(1) != "dev":
            extras[extra.group(1)].append(name.group())
    return core, dict(extras)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    """Of the machine, or of the container if that has less."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits = [file.read_text().strip() for file in LIMIT_FILES if file.is_file()]  # a number, or "max"
    return min(sizes + [int(limit) for limit in limits if limit.isdigit()])


def _processes(distributed: Any) -> str:
    """What processes of one run can speak through."""
    from direct_rlhf.launch import SHUTDOWN, torchrun_has

    if not distributed.is_available():
        return "no: this torch is built without torch.distributed, so a run is one process"
    kinds = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    grace = "the grace time is ours to set" if torchrun_has(SHUTDOWN) else "torchrun kills 30 s after SIGTERM"
    return f"{', '.join(name for name, there in kinds.items() if there)}; {grace}"


def _devices() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        yield "torch starts", f"no: {error}"
        return
    yield "torch starts", f"yes, {torch.get_num_threads()} threads"
    yield "several processes", _processes(torch.distributed)
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bfloat16}"
