"""The same merge file through mergekit's command and ours, from checkpoint to checkpoint, in bfloat16.

Optional: needs mergekit's environment (benchmarks/peers.sh mergekit). Both compute in float32 and store bfloat16.
Differences of bfloat16 weights often have equal magnitudes; which of those at a cut are kept is a tie rule (ours: the
lower index), so entries whose magnitude is that at a cut are left out of the comparison.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from direct_rlhf.merge.executor import merge_models
from direct_rlhf.recipe.merge import load_merge
from merge.checkpoint_kit import tensors, write_family

MERGEKIT = Path(__file__).parents[2] / "benchmarks" / ".venvs" / "mergekit" / "bin" / "mergekit-yaml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MERGEKIT.exists(), reason="optional: mergekit's environment is not there (benchmarks/peers.sh mergekit)"
    ),
]

WEIGHTS = (1.0, 0.5, 2.0)
CASES = {
    "linear": {"merge_method": "linear", "weights": WEIGHTS},
    "linear, not normalised": {"merge_method": "linear", "weights": WEIGHTS, "parameters": {"normalize": False}},
    "linear, over the layers": {"merge_method": "linear", "weights": ([0.1, 0.9], 1.0, [{"filter": "mlp", "value": 3.0}, {"value": 0.5}])},
    "slerp": {"merge_method": "slerp", "models": ["a", "b"], "base_model": "a", "parameters": {"t": [0.25, 0.75]}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "weights": WEIGHTS, "parameters": {"lambda": 0.7}},
    "ties": {"merge_method": "ties", "weights": WEIGHTS, "density": 0.3, "parameters": {"lambda": 1.0, "normalize": True}},
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "weights": WEIGHTS,
        "density": 0.6,
        "gamma": 0.1,
        "parameters": {"lambda": 1.0, "normalize": False},
    },
    "model_stock": {"merge_method": "model_stock"},
}  # fmt: skip
REFERENCED = ("ties", "breadcrumbs", "model_stock")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"))


def write_files(case, family):
    """(mergekit's file, ours)"""
    each = {name: case[name] for name in ("density", "gamma") if name in case}
    models = case.get("models", ["a", "b", "c"])
    weights = case.get("weights", [None] * len(models))
    listed = [
        {"model": str(family / model), "parameters": ({} if weight is None else {"weight": weight}) | each}
        for model, weight in zip(models, weights, strict=True)
    ]
    method = case["merge_method"]
    content = {"merge_method": method, "models": listed, "dtype": "float32", "out_dtype": "bfloat16"}
    content |= {"parameters": case.get("parameters", {})}
    if method != "linear":
        content["base_model"] = str(family / case.get("base_model", "base"))
    ours = dict(content)
    if method in REFERENCED:
        ours["reference"] = "mergekit"
    return content, ours


def at_a_cut(case, models, base):
    """Entries whose magnitude, in some model, is that of the last that is kept or of the first that is not."""
    density, gamma = case.get("density"), case.get("gamma", 0.0)
    found = torch.zeros_like(base, dtype=torch.bool)
    for model in models if density else ():
        magnitude = (model.float() - base.float()).abs()
        ranked = magnitude.flatten().sort(descending=True).values
        n = len(ranked)
        for kept in (int(density * n), int(gamma * n), int(density * n) + int(gamma * n)):
            for place in (kept - 1, kept, kept + 1):
                if 0 <= place < n:
                    found |= magnitude == ranked[place]
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_merge_of_checkpoints_is_mergekits(family, tmp_path, name):
    case = CASES[name]
    theirs, ours = write_files(case, family)
    for file, content in (("theirs", theirs), ("ours", ours)):
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    command = [str(MERGEKIT), "--quiet", str(tmp_path / "theirs.yaml"), str(tmp_path / "theirs")]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, timeout=300)
    merge_models(load_merge(tmp_path / "ours.yaml"), tmp_path / "ours")
    expected, found = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert found.keys() == expected.keys()
    models = [tensors(family / model) for model in case.get("models", "abc")]
    base = tensors(family / "base")
    compared = 0
    for tensor, value in found.items():
        assert value.dtype == expected[tensor].dtype == torch.bfloat16
        keep = ~at_a_cut(case, [model[tensor] for model in models], base[tensor])
        compared += int(keep.sum())
        torch.testing.assert_close(value[keep].float(), expected[tensor][keep].float(), rtol=2**-7, atol=1e-6)
        assert (value[keep] == expected[tensor][keep]).float().mean() > 0.95  # the others round to the neighbour
    assert compared > 0.8 * sum(value.numel() for value in found.values())
