"""The report of a mixture: counts by kind, the models that chose, conflicts, and nothing where there was none."""

import json
import re
from html import unescape

import pytest

from direct_rlhf.report.card import model_card
from direct_rlhf.report.html import write_report

FACTS = {
    "type": "reward_selected",
    "pairs": {"before": 1500, "selected": 700, "after": 600},
    "kinds": {
        "harmless": {"pairs": 500, "selected": 300, "used": 200, "total": 200, "share": 1 / 3, "most": 1, "effective": 200.0},
        "helpful": {"pairs": 1000, "selected": 400, "used": 400, "total": 400, "share": 2 / 3, "most": 4, "effective": 222.2},
    },
    "reasons": {"not_best": 800, "not_drawn": 100},
    "lengths": {"kept": {"pairs": 600, "chosen": 21.25, "rejected": 19.0}, "dropped": {"pairs": 900, "chosen": 15.5, "rejected": 20.0}},
    "conflicts": {"delta": 0.25, "kinds": ["harmless", "helpful"], "before": [[0, 0.125], [0.125, 0]], "after": [[0, 0.01], [0.01, 0]]},
    "right": {"harmless": {"harmless": 0.9, "helpful": 0.4}, "helpful": {"harmless": 0.45, "helpful": 0.8}},
    "gates": {"harmless": {"harmless": 0.5, "helpful": 0.5}, "helpful": {"harmless": 0.5, "helpful": 0.5}},
    "agreement": {"decision": 0.93, "side": {"harmless": 0.97, "helpful": 0.95}},
    "objectives": {
        "harmless": {"verdict": "pass", "accuracy": 0.8, "ci": [0.7, 0.88], "n": 90, "given": True, "model": "x"},
        "helpful": {"verdict": "warn", "accuracy": 0.7, "ci": [0.6, 0.78], "n": 120, "given": False, "model": "y"},
    },
}  # fmt: skip


@pytest.fixture
def mixed_run(make_run):
    def build(facts=FACTS, **options):
        run = make_run(**options)
        record = {"seconds": 3.0, "finished": "2031-02-02", "facts": facts}
        (run / "stages" / "mixture.json").write_text(json.dumps(record))
        (run / "mixture.jsonl").write_text("{}\n")
        return run

    return build


def text_of(*runs, out=None):
    page = write_report(runs, out).read_text(encoding="utf-8")
    section = page[page.index('<section id="data">') :]
    section = section[: section.index("</section>")]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", unescape(section)))


def test_the_mixture_is_shown_by_kind_with_its_models_and_conflicts(mixed_run):
    text = text_of(mixed_run())
    assert "Mixture selected by reward models" in text
    assert "Trained on 600 pairs, from 1,500 different ones. Left out: 800 not among the best, 100 not drawn." in text
    assert "in the mixture 21.2 / 19.0, left out 15.5 / 20.0" in text
    assert "Reward models of another seed decide alike on 93.0 % of the pairs." in text
    assert "helpful 1,000 400 400 400 66.7 % 4 222" in text
    assert "harmless given pass 80.0 % [70.0, 88.0] n = 90 90.0 % 40.0 % 97.0 %" in text
    assert "12.5 % → 1.0 %" in text
    assert "each by more than delta = 0.25" in text


def test_a_heuristic_mixture_has_counts_alone(mixed_run):
    kept = ("pairs", "kinds", "lengths")
    text = text_of(mixed_run({"type": "heuristic", "reasons": {}} | {key: FACTS[key] for key in kept}))
    assert "Mixture by shares" in text
    assert "Left out:" not in text
    assert "Conflict" not in text
    assert "Gate" not in text


@pytest.mark.promise("U5")
def test_numbers_that_are_missing_or_of_another_type_are_said_to_be_missing_and_never_0(mixed_run):
    broken = {
        "type": "reward_selected",
        "pairs": {"before": None},
        "kinds": {"helpful": {"pairs": "many"}, "harmless": None},
        "conflicts": {"delta": None, "kinds": ["a", "b"], "before": [[0]], "after": "none"},
        "objectives": {"helpful": {"accuracy": None}},
        "gates": ["x"],
        "lengths": {"kept": {"chosen": "long"}},
        "reasons": {"not_best": "some"},
    }
    text = text_of(mixed_run(broken))
    assert "What the mixture holds is not recorded." in text
    assert "helpful not measured not measured" in text
    assert " 0 " not in text[text.index("Mixture") :]
    assert "Mixture" in text_of(mixed_run({"type": 3, "conflicts": {"kinds": 7}}))


@pytest.mark.promise("X5")
def test_the_name_of_a_kind_is_text(mixed_run):
    evil = "<script>alert(1)</script>"
    kinds = {evil: FACTS["kinds"]["helpful"]}
    run = mixed_run(FACTS | {"kinds": kinds, "objectives": {evil: FACTS["objectives"]["helpful"]}})
    assert "<script>" not in write_report([run]).read_text(encoding="utf-8")


def test_a_run_without_a_mixture_has_no_such_section_and_several_runs_are_told_apart(make_run, mixed_run, tmp_path):
    plain = make_run()
    assert "Mixture" not in text_of(plain)
    text = text_of(mixed_run(name="one"), mixed_run(name="two"), out=tmp_path / "both.html")
    assert "one · Mixture selected by reward models" in text
    assert "two · Mixture selected by reward models" in text


def test_the_model_card_says_what_was_mixed(make_run, mixed_run):
    assert "- mixture: selected by reward models; pairs: harmless 200, helpful 400" in model_card(mixed_run(), "dpo")
    assert "mixture" not in model_card(make_run(name="plain"), "dpo")
