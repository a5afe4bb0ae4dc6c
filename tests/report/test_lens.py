"""The logit lens as curves: what is missing is a gap, and a probability of 0 is no point of a log axis."""

import json
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

from direct_rlhf.report.lens import LayerCurve, layer_curves, lens_notes, lens_pictures, read_curves
from direct_rlhf.report.samples import _dialogues

XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink" '


def point(value, ci=None):
    return {"value": value, "ci": ci or (None if value is None else [value / 2, value * 2]), "n_scored": 4}


def series(folder: Path, name: str, lens, index: int = 0):
    path = folder / f"evaluation/{name}/toxicity.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"lens": lens}))
    arm = SimpleNamespace(name=name, files={"toxicity": f"evaluation/{name}/toxicity.json"})
    return SimpleNamespace(run=SimpleNamespace(path=folder), index=index, arm=arm, label=name)


def both(bad, neutral):
    return {"bad_words": {"by_point": bad}, "neutral_words": {"by_point": neutral}}


def texts(svg):
    root = ElementTree.fromstring(str(svg).replace("<svg ", f"<svg {XLINK}", 1))
    return [element.text for element in root.iter() if element.tag.endswith("text")]


def test_every_arm_has_two_lines_and_one_band_on_the_same_axes(tmp_path):
    arms = [
        series(tmp_path, "base", both([point(0.1), point(0.2)], [point(0.3), point(0.2)])),
        series(tmp_path, "direct_ppo", both([point(0.1), point(0.05)], [point(0.3), point(0.25)])),
    ]
    (picture,) = lens_pictures(arms)
    assert picture.svg.count("var(--arm-base)") == picture.svg.count("var(--arm-direct_ppo)") >= 3
    assert "Thin: harmless words" in picture.caption
    assert lens_notes(arms) == []


def test_a_wide_range_is_drawn_on_a_log_axis_in_plain_numbers(tmp_path):
    svg = layer_curves([LayerCurve("base", 0, "bad_words", [1e-6, 1e-3, 0.2], [(0.0, 2e-6), (5e-4, 2e-3), (0.1, 0.3)])])
    assert {"10 %", "1 %", "0.1 %"} <= set(texts(svg)) or {"1 %", "0.01 %"} <= set(texts(svg))
    assert not any("$" in (text or "") for text in texts(svg))


def test_a_probability_of_zero_is_said_to_be_left_out_of_a_log_axis_alone(tmp_path):
    wide = [
        series(tmp_path, "base", both([point(0.0), point(0.001), point(0.2)], [point(0.0), point(0.1), point(0.1)]))
    ]
    narrow = [series(tmp_path, "sft", both([point(0.0), point(0.1)], [point(0.1), point(0.1)]))]
    assert "A probability of 0 has no place" in lens_pictures(wide)[0].caption
    assert "A probability of 0 has no place" not in lens_pictures(narrow)[0].caption


def test_faint_neutral_words_do_not_squeeze_the_bad_ones_into_a_log_axis():
    bad = LayerCurve("base", 0, "bad_words", [0.1, 0.2], [None, None])
    svg = layer_curves([bad, LayerCurve("base", 0, "neutral_words", [1e-6, 1e-5], [None, None])])
    assert "0 %" in texts(svg)


def test_a_narrow_range_stands_on_zero(tmp_path):
    svg = layer_curves([LayerCurve("base", 0, "bad_words", [0.1, 0.2], [None, None])])
    assert "0 %" in texts(svg)


def test_missing_points_are_none_and_nothing_at_all_is_no_picture(tmp_path):
    one = series(tmp_path, "base", both([point(None), point(0.2)], []))
    (curve,) = read_curves(one, both([point(None), point(0.2)], []))
    assert curve.values == [None, 0.2]
    assert curve.bands == [None, (0.1, 0.4)]
    assert len(lens_pictures([one])) == 1
    assert lens_pictures([series(tmp_path, "sft", both([point(None)], [point(0.0)]))]) == []
    assert lens_pictures([series(tmp_path, "dpo", None)]) == []


def test_a_lens_that_was_left_out_is_a_sentence(tmp_path):
    one = series(tmp_path, "base", {"left_out": "OPTForCausalLM: no final norm"})
    assert lens_pictures([one]) == []
    assert lens_notes([one]) == ["base: OPTForCausalLM: no final norm"]
    gone = SimpleNamespace(run=one.run, index=0, arm=SimpleNamespace(name="sft", files={}), label="sft")
    assert (lens_pictures([gone]), lens_notes([gone])) == ([], [])


def test_measurements_that_asked_for_no_answer_are_no_dialogues_of_the_samples(tmp_path):
    rows = [
        {"task": "toxic_rate", "id": "p1#0", "cluster": "p1", "output": "Yes.", "extra": {"prompt": "Is it?", "set": "harmful"}},
        {"task": "toxic_rate", "id": "p2#0", "cluster": "p2", "output": None, "extra": {"prompt": "Why?", "set": "harmful"}},
        {"task": "lens/bad_words", "id": "p1", "output": None, "extra": {"by_point": [0.1]}},
        {"task": "crows_pairs", "id": "7", "output": None, "extra": {"bias_type": "age"}},
    ]  # fmt: skip
    (tmp_path / "evaluation/base").mkdir(parents=True)
    (tmp_path / "evaluation/base/toxicity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = _dialogues(SimpleNamespace(path=tmp_path), "base", "toxicity")
    assert set(found) == {"p1", "p2"}
    assert found["p1"]["1"]["output"] == "Yes."
