"""Pictures: clean SVG, text as text, zero-based bars, gaps for what is missing."""

import re
from xml.etree import ElementTree

import pytest

from direct_rlhf.report import plots
from direct_rlhf.report.plots import Bar, Line, Profile
from direct_rlhf.report.read import Estimate

X = [1, 2, 3]
XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink" '


def tree(svg):
    """The picture as XML (in HTML the namespace need not be declared)."""
    return ElementTree.fromstring(str(svg).replace("<svg ", f"<svg {XLINK}", 1))


def texts(svg):
    return [element.text for element in tree(svg).iter() if element.tag.endswith("text")]


def every_picture():
    profiles = [Profile("base", [0.5, None, 0.7]), Profile("direct_ppo", [0.6, 0.4, 0.8], 1)]
    return [
        plots.curves("Reward", "score", [Line("direct_ppo", X, X)], level=2.0, level_label="target"),
        plots.frontier([Line("direct_ppo", X, X, markers=True)], [(2, 2)]),
        plots.radar(["a", "b", "c"], profiles),
        plots.bars(
            "Toxic", [Bar("base", "base", Estimate(0.2, 0.1, 0.3), "20 %"), Bar("x", "x", None, "not measured")]
        ),
        plots.grouped_bars("By turn", ["a", "b", "c"], profiles),
        plots.histogram("Margins", [-1, 0, 1], [2, 3], "margin"),
        plots.calibration([0.6, 0.9], [0.5, 0.8], [10, 20]),
    ]


def test_every_picture_is_small_clean_xml_with_a_name():
    for svg in every_picture():
        root = tree(svg)
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 3
        assert root.get("viewBox")
        assert len(svg) < 60_000
        assert not re.search(r"<metadata|<style|<script|<!--|<\?xml|<image", svg)


def test_text_is_text_and_colours_are_variables():
    svg = every_picture()[0]
    assert "Reward" in texts(svg)
    assert "iteration" in texts(svg)
    assert "target" in texts(svg)
    assert "var(--arm-direct_ppo)" in svg
    assert not re.search("|".join(plots.css_variables().values()), svg)


def test_ids_are_only_those_that_are_used_and_differ_between_pictures():
    used = []
    for svg in every_picture():
        ids = re.findall(r' id="([^"]*)"', svg)
        assert set(ids) == set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        used += ids
    assert len(used) == len(set(used))


def test_a_picture_is_the_same_each_time():
    assert [str(svg) for svg in every_picture()] == [str(svg) for svg in every_picture()]


@pytest.mark.parametrize(
    "svg",
    [
        plots.curves("Reward", "score", [Line("direct_ppo", [], [])]),
        plots.frontier([]),
        plots.radar(["a", "b", "c"], [Profile("base", [None, None, None])]),
        plots.radar(["a", "b"], [Profile("base", [0.1, 0.2])]),
        plots.bars("Toxic", [Bar("base", "base", None, "not measured")]),
        plots.grouped_bars("By turn", ["1"], [Profile("base", [None])]),
        plots.grouped_bars("By turn", [], []),
        plots.histogram("Margins", [], [], "margin"),
        plots.calibration([], [], []),
    ],
)
def test_nothing_measured_is_no_picture(svg):
    assert svg is None


def test_a_missing_bar_says_so():
    svg = plots.bars("Toxic", [Bar("base", "base", Estimate(0.2), "20 %"), Bar("SFT", "sft", None, "not measured")])
    assert "not measured" in texts(svg)
    assert "var(--arm-sft)" not in svg


def path_points(svg, arm):
    """Numbers of drawing commands of the arm's line."""
    lines = [
        e
        for e in tree(svg).iter()
        if f"stroke: var(--arm-{arm})" in e.get("style", "") and "fill: none" in e.get("style", "")
    ]
    return [re.findall(r"[ML]", element.get("d")) for element in lines]


def test_a_missing_task_breaks_the_radar_line():
    whole = plots.radar(["a", "b", "c", "d", "e"], [Profile("dpo", [0.5] * 5)])
    gap = plots.radar(["a", "b", "c", "d", "e"], [Profile("dpo", [0.5, 0.5, None, 0.5, 0.5])])
    assert path_points(whole, "dpo")[0].count("M") == 1
    assert path_points(gap, "dpo")[0].count("M") == 2


def test_each_arm_has_its_own_colour_and_marker():
    arms = ("base", "sft", "sft_ppo", "dpo", "direct_ppo")
    assert len({plots.colour(arm) for arm in arms}) == len({plots.MARKERS[arm] for arm in arms}) == 5
    assert plots.colour("merged") == plots.colour("merged")
    assert plots.colour_variable("merged").startswith("--arm-other")


@pytest.mark.parametrize(
    "label", ["$x^2$", "<b>&amp;", "\x00\x1b", "\u202eabc", "_" * 9, "w" * 500, "$unclosed", "שלום 👩‍👧"]
)
def test_hostile_labels_neither_break_nor_become_markup(label):
    svg = plots.radar([label, "b", "c"], [Profile("base", [0.1, 0.2, 0.3])])
    assert {element.tag.split("}")[-1] for element in tree(svg).iter()} <= {
        "svg",
        "g",
        "path",
        "defs",
        "use",
        "text",
        "clipPath",
        "rect",
    }
    assert max(len(text or "") for text in texts(svg)) <= 24
