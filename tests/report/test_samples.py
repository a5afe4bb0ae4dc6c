"""Side-by-side answers: which are shown, which are folded, and what their texts may do."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from direct_rlhf.report.read import read_run
from direct_rlhf.report.samples import LONGEST, prompt_text, side_by_side, visible


@given(st.text())
def test_no_character_that_hides_or_reorders_text_remains(text):
    assert all(
        c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in visible(text)
    )


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=LONGEST))
def test_ordinary_text_in_any_script_is_left_alone(text):
    assert visible(text) == text


def test_controls_are_written_out():
    assert visible("a\u202eb\x00c\ud800") == "a⟨U+202E⟩b⟨U+0000⟩c⟨U+D800⟩"
    assert visible(None) == ""


def test_long_texts_are_cut_and_say_so():
    assert visible("x" * (LONGEST + 7)).endswith("x … [7 more characters in the raw file]")


def test_prompts_are_texts_or_turns():
    assert prompt_text("hello") == "hello"
    assert prompt_text([{"role": "human", "content": "hello"}]) == "hello"
    assert (
        prompt_text([{"role": "human", "text": "a"}, {"role": "assistant", "content": "b"}]) == "human: a\nassistant: b"
    )
    assert prompt_text(None) == ""


def test_each_category_and_each_set_is_shown_and_harm_is_folded(make_run):
    shown = side_by_side(read_run(make_run()))
    assert len(shown) == 8
    titles = {one.title.split(" · ")[1]: one for one in shown}
    assert set(titles) == {
        "arithmetic",
        "facts",
        "opposites",
        "stories",
        "unknowable",
        "harmful",
        "harmless",
        "provoking",
    }
    assert {name for name, one in titles.items() if one.folded} == {"harmful", "provoking"}


def test_every_arm_answers_every_turn_and_failures_have_no_text(make_run):
    shown = side_by_side(read_run(make_run()))
    facts = next(one for one in shown if "facts" in one.title)
    assert [len(exchange.answers) for exchange in facts.exchanges] == [5, 5]
    assert [exchange.prompt for exchange in facts.exchanges] == ["Question 2?", "Question 3?"]
    dpo = facts.exchanges[0].answers[3]
    assert (dpo.label, dpo.text, dpo.note) == ("DPO", None, "failed: timeout")


def test_an_arm_without_records_is_not_measured(make_run):
    run = make_run()
    (run / "evaluation" / "sft" / "conversation.jsonl").unlink()
    answers = side_by_side(read_run(run))[0].exchanges[0].answers
    assert [(answer.text is None, answer.note) for answer in answers][1] == (True, "not measured")
    assert len(answers) == 5


def test_the_choice_depends_on_ids_alone(make_run):
    chosen = [
        [one.title for one in side_by_side(read_run(make_run(name, hostile=hostile)))]
        for name, hostile in (("a", False), ("b", True))
    ]
    assert chosen[0] == chosen[1]


def test_what_was_measured_of_one_answer_stands_together(make_run):
    harmless = next(
        one
        for one in side_by_side(read_run(make_run()))
        if "harmless · t1" in one.title or "harmless · t4" in one.title
    )
    (exchange,) = harmless.exchanges
    assert exchange.prompt.startswith("How do I do the forbidden thing")
    assert exchange.answers[1].note == "ended by itself · not called toxic · comply"
