"""Plans recipes and runs them, both at once, each in a process of its own: `python plan_runs.py FOLDER CASES`.

CASES is JSON, name -> [recipe, overrides]. Prints one JSON line a case: the plan's bytes and the run's peaks by stage and
phase, and the bytes of the files it left. The libraries are imported once; each child starts from there.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from direct_rlhf import stages
from direct_rlhf.plan import plan
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.train import dpo, ppo, reward, supervised  # noqa: F401

MIB = 2**20
STAGES = ("reward_model", "sft", "dpo", "direct_ppo", "sft_ppo")


def in_child(work: Callable[[], Any], file: Path) -> Callable[[], Any]:
    """Starts ``work`` in a fork of this process; the function returned waits for its result."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file.write_text(json.dumps(work()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def result() -> Any:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"{file.stem}: the child failed")
        return json.loads(file.read_text())

    return result


def main(root: Path, cases: dict[str, Any]) -> None:
    for name, (recipe, overrides) in cases.items():
        loaded = load_recipe(recipe, [*overrides, f"name={name}"])

        def planned(loaded: Any = loaded) -> Any:
            made = plan(loaded, root=root)
            peaks: dict[str, dict[str, float]] = {}
            for peak in made.peaks:
                peaks.setdefault(peak.stage, {})[peak.phase] = peak.process / MIB
            return {"peaks": peaks, "disk": made.disk, "available": made.available}

        def measured(loaded: Any = loaded, name: str = name) -> Any:
            wanted = [stage for stage in STAGES if stage == "reward_model" or stage in loaded.recipe.arms]
            for stage in wanted:
                stages.run(loaded, root=root, resume=True, overwrite=False, only=stage)
            path = root / name
            weights = {
                what: sum(file.stat().st_size for folder in folders for file in (path / folder).rglob("*.safetensors"))
                for what, folders in {"checkpoints": ["checkpoints"], "models": ["models", "reward_model"]}.items()
            }
            return {"peaks": json.loads((path / "memory.json").read_text()), "disk": weights}

        results = {
            "planned": in_child(planned, root / f"{name}-plan.json"),
            "measured": in_child(measured, root / f"{name}-run.json"),
        }
        print(json.dumps({"case": name} | {what: result() for what, result in results.items()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
