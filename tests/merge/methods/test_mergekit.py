"""Cross-check against mergekit where its environment is there (it is no dependency, and pins other packages).

`MERGEKIT_PYTHON` names the interpreter of an environment with mergekit 0.1.5; else it is sought in
`benchmarks/.venvs/mergekit`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from direct_rlhf.merge.methods import METHODS
from direct_rlhf.recipe.merge_methods import OTHER_METHODS
from merge.methods.blocks import merge_block, tensors, whole

ROOT = Path(__file__).parents[3]
PYTHON = os.environ.get("MERGEKIT_PYTHON", str(ROOT / "benchmarks" / ".venvs" / "mergekit" / "bin" / "python"))
pytestmark = pytest.mark.skipif(
    not Path(PYTHON).exists(), reason="an optional cross-check: needs mergekit's environment"
)

PEER = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
folder = sys.argv[1]
models, merged = load_file(folder + "/models.safetensors"), {}
for number, (method, settings, with_base) in enumerate(json.load(open(folder + "/cases.json"))):
    names = sorted(models) if with_base else sorted(set(models) - {"base"})
    inputs = [models[name] for name in names]
    if method == "slerp":
        inputs = inputs[:2]
    base = names.index("base") if with_base else None
    if method == "slerp":
        base = 0
    group = TensorGroup.from_tensors(inputs, base_index=base)
    merged[str(number)] = registry.get(method)([group], parameters=settings, dtype=torch.float32)[0].contiguous()
save_file(merged, folder + "/merged.safetensors")
"""

THREE = {"weight": [1.0, 0.5, 2.0]}
CASES = [
    ("linear", THREE, False),
    ("linear", {"weight": [1.0, 0.5, 2.0], "normalize": False}, False),
    ("slerp", {"t": 0.3}, False),
    ("task_arithmetic", THREE, True),
    ("task_arithmetic", {**THREE, "normalize": True, "lambda": 0.5}, True),
    ("ties", {**THREE, "density": 0.2}, True),
    ("ties", {**THREE, "density": [0.2, 0.5, 1.0], "normalize": False, "lambda": 0.7}, True),
    ("breadcrumbs", {**THREE, "density": 0.3, "gamma": 0.01}, True),
    ("breadcrumbs", {**THREE, "density": 0.95, "gamma": 0.2}, True),
    ("breadcrumbs_ties", {**THREE, "density": 0.3, "gamma": 0.1, "normalize": True}, True),
    ("model_stock", {}, True),
    ("della", {"weight": 1.0, "density": 1.0}, True),
    ("dare_ties", {**THREE, "density": 1.0}, True),
    ("dare_linear", {**THREE, "density": 1.0}, True),
]


def ours(method, settings, models, with_base):
    """The same merge, with mergekit's defaults where ours differ."""
    other = OTHER_METHODS.get(method)
    name, preset = (other.name, other.settings) if other else (method, {})
    chosen = METHODS[name]
    fields = chosen.parameters.model_fields
    defaults = {"lambda": 1.0} if "scale" in fields else {}
    defaults |= {"reference": "mergekit"} if "reference" in fields else {}
    parameters = chosen.parameters.model_validate({**preset, **defaults, **settings})
    experts = [models[key] for key in sorted(models) if key != "base"]
    experts = experts[:2] if method == "slerp" else experts
    return merge_block(name, whole(models["base"] if with_base else None, experts), parameters)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def both(request, tmp_path_factory):
    """(models, merges by mergekit)"""
    folder = tmp_path_factory.mktemp("mergekit")
    base, *noise = tensors(0, 4, (48, 64), torch.float32)
    dtype = getattr(torch, request.param)
    models = {"base": (0.02 * base).to(dtype)}
    models |= {name: (0.02 * base + 0.002 * x).to(dtype) for name, x in zip("xyz", noise, strict=True)}
    save_file(models, folder / "models.safetensors")
    (folder / "cases.json").write_text(json.dumps(CASES))
    subprocess.run([PYTHON, "-c", PEER, str(folder)], check=True, timeout=300)
    return models, load_file(folder / "merged.safetensors")


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_a_merge_is_mergekits(both, number):
    models, theirs = both
    method, settings, with_base = CASES[number]
    found, expected = ours(method, settings, models, with_base), theirs[str(number)].float()
    differs = (found - expected).abs() > 1e-6
    # mergekit's choice among equal magnitudes is not defined, and bfloat16 differences often are equal at the cut
    ties_allowed = 0.03 if models["base"].dtype == torch.bfloat16 and "density" in settings else 0.0
    assert differs.float().mean() <= ties_allowed
    assert_close(found[~differs].bfloat16(), expected[~differs].bfloat16(), rtol=2**-7, atol=0)
