"""`merge --sweep`: values tried against an evaluation, the best merged, a stopped sweep gone on with."""

import json

import pytest

from direct_rlhf.cli import main
from direct_rlhf.errors import ConfigError
from direct_rlhf.study.sweep import read_grid
from toys import toy_folder

SMALL = ["evaluation.conversation.limit=2", "evaluation.max_new_tokens=6", "threads=1"]


@pytest.fixture(scope="module")
def merge_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "other")):
        toy_folder(root / name, seed=seed)
    file = root / "merge.yaml"
    file.write_text("merge_method: task_arithmetic\nbase_model: base\nmodels:\n- model: one\n- model: other\n")
    return file


def sweep(merge_file, root, *more):
    sets = [part for override in SMALL for part in ("--set", override)]
    return main(["merge", str(merge_file), "--out", str(root / "out"), "--root", str(root), *sets, *more])


def tries(root):
    return [json.loads(line) for line in (root / "sweep-out/search/tries.jsonl").open()]


def test_every_value_is_tried_and_the_best_is_merged(merge_file, tmp_path, capsys):
    assert sweep(merge_file, tmp_path, "--sweep", "scale=0.0,0.5", "--sweep", "merge=sum,mean") == 0
    found = tries(tmp_path)
    assert [line["settings"] for line in found] == [
        {"scale": scale, "merge": merge} for scale in (0.0, 0.5) for merge in ("sum", "mean")
    ]
    card = (tmp_path / "out/README.md").read_text()
    best = max(found, key=lambda line: line["score"])["settings"]
    assert f"scale: {best['scale']}" in card
    assert "scale 0.5, merge mean" in capsys.readouterr().out


def test_a_sweep_that_broke_off_goes_on_and_an_existing_model_is_not_replaced(merge_file, tmp_path, capsys):
    assert sweep(merge_file, tmp_path, "--sweep", "scale=0.0,0.5") == 0
    lines = (tmp_path / "sweep-out/search/tries.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sweep-out/search/tries.jsonl").write_text(lines[0])
    assert sweep(merge_file, tmp_path, "--sweep", "scale=0.0,0.5") == 2
    assert "out: exists. Choose another folder, or replace it with --overwrite." in capsys.readouterr().err
    assert sweep(merge_file, tmp_path, "--sweep", "scale=0.0,0.5", "--overwrite", "--resume") == 0
    assert [line["score"] for line in tries(tmp_path)] == [json.loads(line)["score"] for line in lines]


def test_a_metric_where_lower_is_better_is_turned_round(merge_file, tmp_path):
    more = ["--metric", "-toxicity.word_rate", "--set", "evaluation.toxicity.limit=2"]
    assert sweep(merge_file, tmp_path, "--sweep", "scale=0.0", *more) == 0
    (line,) = tries(tmp_path)
    assert line["score"] == -line["shown"]["toxicity.word_rate"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sweep", "scal=0.1"], "parameters.scal: unknown parameter"),
        (["--sweep", "scale=0.1", "--dry-run"], "--dry-run checks one merge: leave --sweep out"),
        (["--sweep", "scale"], "--sweep scale: write KEY=VALUE,VALUE"),
        (["--sweep", "scale=0.1", "--metric", "kindness.mean"], "--metric kindness.mean: no such metric"),
        (
            ["--sweep", "scale=0.1", "--metric", "conversation.kindness"],
            "--metric conversation.kindness: was not measured",
        ),
    ],
)
def test_what_is_wrong_is_said_and_no_model_is_left(merge_file, tmp_path, capsys, more, said):
    assert sweep(merge_file, tmp_path, *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_grid_is_read_as_yaml():
    assert read_grid(["scale=0.3,1", "on=delta", "weights=[1, 0.5],[0.5, 1]"]) == {
        "scale": [0.3, 1],
        "on": ["delta"],
        "weights": [[1, 0.5], [0.5, 1]],
    }
    with pytest.raises(ConfigError, match="scale is named twice"):
        read_grid(["scale=1", "scale=2"])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_grid(["scale=[1"])
