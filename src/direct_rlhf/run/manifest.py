"""What a run was made with: versions, hashes, seed."""

import hashlib
import importlib.metadata
import os
import platform
import secrets
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import direct_rlhf

FORMAT = 1
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "lm-eval")


def make_manifest(seed: int, recipe_sha256: str) -> dict[str, Any]:
    """What identifies a run. ``sources`` (name -> SHA-256) is filled in once data has been read. Holds no secrets."""
    identity = {"format": FORMAT, "id": secrets.token_hex(8)}
    return {**identity, **start_facts(), "recipe_sha256": recipe_sha256, "seed": seed, "sources": {}}


def start_facts() -> dict[str, Any]:
    """When, where and by what code this attempt was started."""
    package = Path(direct_rlhf.__file__).parent
    return {
        "direct_rlhf": direct_rlhf.__version__,
        "code_sha256": code_sha256(package),
        "git_commit": git_commit(package),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def version(package: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of all Python files below ``folder``."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that tracks ``folder`` (with ``-dirty`` where files differ); None if none does."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or an installed package
        return None
