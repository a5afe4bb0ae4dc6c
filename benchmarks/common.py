"""What every benchmark shares: the closing JSON line, and the block it appends to RESULTS.md."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "transformers", "peft", "lm-eval", "numpy")


def arguments(description: str | None, **extra: Any) -> argparse.ArgumentParser:
    """``--json``: the closing line alone; ``--quick``: the small version; ``--record``: append to RESULTS.md."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0], **extra)
    parser.add_argument("--json", action="store_true", help="print the closing JSON line alone")
    parser.add_argument("--quick", action="store_true", help="a small version; its figures are not recorded")
    parser.add_argument("--record", action="store_true", help="append what was measured to RESULTS.md")
    return parser


def run_recipe(recipe: str, name: str, root: Path, *overrides: str, only: str | None = None) -> Path:
    """One run of a recipe in a process of its own; its directory."""
    command = [sys.executable, "-m", "direct_rlhf", "run", recipe, "--root", str(root), f"name={name}", *overrides]
    subprocess.run([*command, *(["--only", only] if only else [])], check=True, stdout=sys.stderr)
    return root / name


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def span(values: Sequence[float]) -> str:
    """``+0.123 [+0.100, +0.150]``, for (value, low, high)."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)


def versions(*more: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 2),
    }


def finish(
    bench: str,
    measured: Mapping[str, Any],
    goals: Mapping[str, Any],
    *,
    held: bool,
    options: argparse.Namespace,
    table: Sequence[Sequence[str]] = (),
    note: str = "",
) -> None:
    """Print the table (unless ``--json``) and the closing line; append both to RESULTS.md with ``--record``."""
    line = json.dumps(
        {
            "bench": bench,
            "measured": dict(measured),
            "goals": dict(goals),
            "held": held,
            "versions": versions(),
            "machine": machine(),
        }
    )
    markdown = "\n".join("| " + " | ".join(row) + " |" for row in table[:1])
    markdown += "".join(["\n" + "|---" * len(table[0]) + "|"] if table else [])
    markdown += "".join("\n| " + " | ".join(row) + " |" for row in table[1:])
    if table and not options.json:
        print(markdown, file=sys.stderr)
    if options.record and not options.quick:
        with RESULTS.open("a", encoding="utf-8") as out:
            out.write(f"\n## {bench} ({date.today().isoformat()})\n\n")
            out.write((note + "\n\n") if note else "")
            out.write((markdown + "\n\n") if table else "")
            out.write(f"```json\n{line}\n```\n")
    print(line)
