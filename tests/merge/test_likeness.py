import pytest
import torch
from safetensors.torch import save_file

from direct_rlhf.errors import MergeError
from direct_rlhf.merge.likeness import likeness


def model(folder, **tensors):
    folder.mkdir()
    save_file({name: torch.tensor(values) for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


def test_cosine_and_opposite_signs_are_those_worked_out_by_hand(tmp_path):
    base = model(tmp_path / "base", w=[[1.0, 1.0], [0.0, 0.0]], b=[2.0])
    one = model(tmp_path / "one", w=[[2.0, 1.0], [0.0, 2.0]], b=[2.0])  # moves by 1, 0, 0, 2, 0
    other = model(tmp_path / "other", w=[[0.0, 1.0], [3.0, 4.0]], b=[2.0])  # by -1, 0, 3, 4, 0
    (found,) = likeness(base, {"one": one, "other": other}).values()
    assert found["cosine"] == pytest.approx((-1 + 8) / (5**0.5 * 26**0.5))
    assert found["sign_conflict"] == 1 / 2  # two entries are moved by both


def test_a_vector_is_like_itself_against_its_negative_and_unlike_nothing(tmp_path):
    base = model(tmp_path / "base", w=[0.0, 0.0, 0.0])
    up, down, still = (
        model(tmp_path / name, w=values)
        for name, values in {"up": [1.0, 2.0, 3.0], "down": [-1.0, -2.0, -3.0], "still": [0.0, 0.0, 0.0]}.items()
    )
    found = likeness(base, {"up": up, "same": up, "down": down, "still": still})
    assert found["up", "same"] == {"cosine": pytest.approx(1), "sign_conflict": 0}
    assert found["up", "down"] == {"cosine": pytest.approx(-1), "sign_conflict": 1}
    assert found["up", "still"] == {"cosine": None, "sign_conflict": None}


def test_an_expert_with_other_tensors_is_refused_by_name(tmp_path):
    base, other = model(tmp_path / "base", w=[0.0]), model(tmp_path / "other", w=[0.0, 1.0])
    with pytest.raises(MergeError, match="other: has other tensors than"):
        likeness(base, {"a": base, "b": other})
