"""Which settings do best: every combination once, written down as it is measured, gone on with after a stop."""

import json

import pytest
from hypothesis import given
from hypothesis.strategies import dictionaries, integers, lists, sampled_from

from direct_rlhf.errors import ConfigError
from direct_rlhf.study.search import Measured, Tried, best, combinations, search, shown, with_settings

MERGE = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}


@given(dictionaries(sampled_from("abc"), lists(integers(0, 9), min_size=1, max_size=3, unique=True)))
def test_every_combination_stands_once_the_last_key_fastest(grid):
    found = combinations(grid)
    sizes = 1
    for values in grid.values():
        sizes *= len(values)
    assert len(found) == sizes == len({json.dumps(one) for one in found})
    assert found[0] == {key: values[0] for key, values in grid.items()}
    if grid and len(last := list(grid.values())[-1]) > 1:
        assert found[1] == found[0] | {list(grid)[-1]: last[1]}


def test_a_parameter_without_values_is_refused():
    with pytest.raises(ConfigError, match="scale: no value to try"):
        combinations({"scale": []})


def test_settings_join_the_parameters_and_weights_go_to_the_models():
    merge = MERGE | {"parameters": {"merge": "sum", "scale": 1.0}}
    found = with_settings(merge, {"scale": 0.5, "weights": [0.2, 0.8]})
    assert found["parameters"] == {"merge": "sum", "scale": 0.5}
    assert [model["parameters"]["weight"] for model in found["models"]] == [0.2, 0.8]
    assert merge["parameters"]["scale"] == 1.0
    with pytest.raises(ConfigError, match=r"weights = \[1\]: give a list with one number for each of the 2 models"):
        with_settings(MERGE, {"weights": [1]})


class Work:
    """Makes and measures nothing but a number; fails at the call that it is told."""

    def __init__(self, stop_at=None):
        self.made, self.stop_at = [], stop_at

    def make(self, merge, out):
        out.mkdir()
        self.made.append(merge["parameters"]["scale"])
        if len(self.made) == self.stop_at:
            raise KeyboardInterrupt

    def measure(self, model):
        assert model.is_dir()
        scale = self.made[-1]
        return Measured(None if scale == 9 else 1 - (scale - 0.7) ** 2, {"scale": scale})


def run(tmp_path, work, scales=(0.3, 0.7, 1.0), key="k"):
    return search(
        MERGE,
        [{"scale": scale} for scale in scales],
        folder=tmp_path,
        place=tmp_path / "search",
        make=work.make,
        measure=work.measure,
        key=key,
        say=lambda text: None,
    )


def test_the_best_is_found_and_no_candidate_is_left(tmp_path):
    work = Work()
    tried = run(tmp_path, work)
    assert best(tried).settings == {"scale": 0.7}
    assert [one.shown["scale"] for one in tried] == [0.3, 0.7, 1.0]
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["tries.jsonl"]


def test_what_was_measured_before_a_stop_is_not_measured_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Work(stop_at=3))
    again = Work()
    assert [one.score for one in run(tmp_path, again)] == [one.score for one in run(tmp_path / "other", Work())]
    assert again.made == [1.0]


def test_another_evaluation_or_other_settings_are_measured(tmp_path):
    run(tmp_path, Work())
    other, more = Work(), Work()
    run(tmp_path, other, key="other questions")
    assert other.made == [0.3, 0.7, 1.0]
    run(tmp_path, more, scales=(0.7, 1.5))
    assert more.made == [1.5]


def test_a_combination_that_cannot_be_is_refused_before_the_first_is_merged(tmp_path):
    work = Work()
    with pytest.raises(ConfigError, match="scale"):
        run(tmp_path, work, scales=(0.3, "large"))
    assert work.made == []


def test_a_candidate_without_a_score_never_wins():
    one, other = (Tried({}, score, {}, 0.0, 0.0) for score in (None, -3.0))
    assert best([one, other]) is other
    with pytest.raises(ConfigError, match="none of the combinations has a score"):
        best([one])


def test_settings_read_as_words():
    assert shown({"scale": 0.5, "density": 0.2}) == "scale 0.5, density 0.2"
    assert shown({}) == "defaults"
