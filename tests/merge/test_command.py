import pytest

from direct_rlhf.cli import main
from merge.checkpoint_kit import edit_config, same, write_family


@pytest.fixture
def root(tmp_path):
    write_family(tmp_path)
    (tmp_path / "merge.yaml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    return tmp_path


def run(root, *options):
    return main(["merge", str(root / "merge.yaml"), "--out", str(root / "out"), *options])


@pytest.mark.promise("U6")
def test_a_merge_ends_with_its_folder_and_a_second_one_needs_overwrite(root, capsys):
    assert run(root, "--threads", "1", "--device", "cpu") == 0
    assert capsys.readouterr().out == f"Merged: {root / 'out'}\n"
    first = (root / "out").rename(root / "first")
    assert run(root) == 0
    assert same(first, root / "out")
    assert run(root) == 2
    assert "exists already. Name another folder, or replace it with --overwrite." in capsys.readouterr().err
    assert run(root, "--overwrite") == 0


@pytest.mark.promise("U1", "U6")
def test_a_wrong_file_ends_with_2_and_models_that_do_not_fit_with_1(root, capsys):
    edit_config(root / "b", num_key_value_heads=4)
    assert run(root) == 1
    assert "direct-rlhf: b: num_key_value_heads is 4 in its config.json, 2 in that of a." in capsys.readouterr().err
    (root / "merge.yaml").write_text("merge_method: lineal\nmodels: [{model: a}]\n")
    assert run(root) == 2
    assert "Did you mean linear?" in capsys.readouterr().err
    assert not (root / "out").exists()


def test_a_dry_run_shows_what_would_be_done_and_writes_nothing(root, capsys):
    assert run(root, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "written     0 MB in 1 files" in shown
    assert shown.endswith("Nothing wrong. Nothing was written.\n")
    assert not (root / "out").exists()


def test_an_unknown_device_is_said(root, capsys):
    assert run(root, "--device", "gpu") == 2
    assert "device gpu: must be auto, cpu or cuda" in capsys.readouterr().err
