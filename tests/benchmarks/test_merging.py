import json
import sys

import pytest
import yaml
from safetensors import safe_open

import merging
from direct_rlhf.merge.plan import plan_merge
from direct_rlhf.recipe.merge import load_merge

SMALL = {"hidden": 64, "inner": 96, "layers": 1, "vocabulary": 128}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return merging.write_models(tmp_path_factory.mktemp("models"), SMALL, 4)


def test_the_checkpoints_are_of_one_shape_in_several_files_and_near_their_base(models):
    index = json.loads((models[0] / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == merging.SHARDS
    name = "model.layers.0.mlp.up_proj.weight"
    found = []
    for model in models:
        with safe_open(model / index["weight_map"][name], "pt") as file:
            found.append(file.get_tensor(name).float())
    assert tuple(found[0].shape) == (96, 64)
    changes = [(expert - found[0]).abs().mean() / found[0].abs().mean() for expert in found[1:]]
    assert all(0 < change < 0.1 for change in changes)


@pytest.mark.parametrize("method", [*merging.METHODS, *merging.SINGULAR])
def test_both_sides_get_the_same_merge_and_ours_is_a_merge_file(models, tmp_path, method):
    ours = merging.merge_file(tmp_path / "ours.yaml", method, models, ours=True)
    theirs = merging.merge_file(tmp_path / "theirs.yaml", method, models, ours=False)
    mine, their = (yaml.safe_load(path.read_text()) for path in (ours, theirs))
    assert mine.pop("reference", "mergekit") == "mergekit"
    assert mine == their
    assert len(plan_merge(load_merge(ours), tmp_path / "out").jobs) == 12


def test_a_process_is_measured_from_start_to_end_and_its_result_deleted(tmp_path):
    code = "import sys, os, pathlib; held = bytearray(60_000_000); out = pathlib.Path(sys.argv[1]); out.mkdir(); "
    code += "(out / 'config.json').write_text('{}'); __import__('time').sleep(0.1)"
    found = merging.whole([sys.executable, "-c", code], tmp_path / "out")
    assert found["seconds"] > 0.1
    assert 60 < found["anonymous_mb"] < 120
    assert found["rss_mb"] >= found["anonymous_mb"]
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match=r"ended with 3\n(.|\n)*no such thing"):
        merging.whole(
            [sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], tmp_path / "out"
        )


def test_floor_and_executor_leave_nothing_behind(models, tmp_path):
    merging.warm(models)
    assert merging.floor(models, tmp_path / "floor") > 0
    assert merging.executor(merging.merge_file(tmp_path / "m.yaml", "linear", models, ours=True), tmp_path / "out") > 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.yaml"]


def test_the_work_of_singular_values_counts_matrices_of_layers_only():
    def work(m, n):
        joint = sum(14 * rows * n**2 + 8 * n**3 for rows in (m, n))
        return 4 * (14 * m * n**2 + 8 * n**3) + joint

    assert merging.singular_work(SMALL, 4) == 4 * work(64, 64) + 3 * work(96, 64)


def test_a_ratio_is_taken_within_each_round():
    assert merging.ratio([1.0, 2.0, 1.0], [3.0, 8.0, 2.0]) == (3.0, 2.0, 4.0)
