import json
from pathlib import Path

import pytest

from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.conversation import read_questions
from direct_rlhf.evaluate.mt_bench import (
    BAD_REFERENCES,
    WITH_REFERENCE,
    JudgePrompt,
    as_question,
    read_judge_prompts,
    temperature,
    with_references,
)
from direct_rlhf.recipe.references import HubReference
from injections import PROMPTS, write_prompts

DATA = Path(__file__).parents[3] / "shared" / "data" / "mt_bench"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the MT-Bench files are not in ../shared/data")
QUESTION = {"question_id": 7, "category": "math", "turns": ["One and one?", "And two more?"], "reference": ["x", "y"]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fastchats_shape_becomes_ours_without_its_own_reference_field(tmp_path):
    (question,) = read_questions(write(tmp_path / "q.jsonl", [QUESTION]))
    turns = [{"prompt": "One and one?"}, {"prompt": "And two more?"}]
    assert question == {"id": "7", "category": "math", "turns": turns}
    on_the_hub = {"prompt_id": 7, "category": "math", "prompt": QUESTION["turns"], "reference": []}
    assert as_question(on_the_hub) == question
    assert as_question({"id": "a", "turns": [{"prompt": "x", "rule": {}}]}) == {
        "id": "a",
        "turns": [{"prompt": "x", "rule": {}}],
    }


def test_questions_may_come_from_the_hub(monkeypatch):
    import datasets

    rows = [{"prompt_id": 81, "category": "writing", "prompt": ["One?", "Two?"], "reference": []}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **more: rows)
    (question,) = read_questions(HubReference("dataset", "owner/prompts"))
    assert (question["id"], [turn["prompt"] for turn in question["turns"]]) == ("81", ["One?", "Two?"])


def test_two_questions_of_one_number_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"q.jsonl:2: not a question"):
        read_questions(write(tmp_path / "q.jsonl", [QUESTION, QUESTION]))


@pytest.mark.parametrize(
    ("category", "expected"),
    [("writing", 0.7), ("roleplay", 0.7), ("stem", 0.1), ("humanities", 0.1), ("extraction", 0.0), ("math", 0.0),
     ("coding", 0.0), ("reasoning", 0.0), ("generic", 0.7)],
)  # fmt: skip
def test_temperatures_of_the_protocol(category, expected):
    assert temperature(category) == expected


def reference(number, turns, model="gpt-4"):
    return {"question_id": number, "model_id": model, "choices": [{"index": 0, "turns": turns}]}


def test_references_go_to_their_categories_and_the_doubted_ones_are_marked(tmp_path):
    questions = [
        {"id": str(number), "category": category, "turns": [{"prompt": "?"}, {"prompt": "?"}]}
        for number, category in ((104, "math"), (106, "coding"), (81, "writing"))
    ]
    rows = [reference(number, [f"{number}a", f"{number}b"]) for number in (104, 106, 81)]
    found = with_references(questions, write(tmp_path / "r.jsonl", rows))
    assert [question.get("reference") for question in found] == [["104a", "104b"], ["106a", "106b"], None]
    assert [question.get("reference_ok") for question in found] == [False, True, None]
    mended = with_references(
        questions, write(tmp_path / "r.jsonl", [reference(n, ["a", "b"], "people") for n in (104, 106)])
    )
    assert [question.get("reference_ok") for question in mended] == [True, True, None]


def test_a_reference_that_is_missing_or_too_short_is_named(tmp_path):
    question = {"id": "7", "category": "math", "turns": [{"prompt": "?"}, {"prompt": "?"}]}
    with pytest.raises(DataError, match=r"question 7 \(math\) has 2 turns, and there are 1 reference"):
        with_references([question], write(tmp_path / "r.jsonl", [reference(7, ["a"])]))
    with pytest.raises(DataError, match=r"r.jsonl:1: no reference answer"):
        with_references([question], write(tmp_path / "r.jsonl", [{"question_id": 7, "choices": []}]))


def test_prompts_are_told_apart_by_their_fields(tmp_path):
    prompts = read_judge_prompts(write_prompts(tmp_path / "p.jsonl"))
    for kind in ("single", "pairwise"):
        for given in (False, True):
            for turn in (0, 1):
                name = f"{kind}-{'math' if given else 'general'}-{'two' if turn else 'one'}"
                assert prompts.choose(kind, reference=given, turn=turn).name == name


def test_a_prompt_is_filled_in_one_pass():
    prompt = JudgePrompt("p", "", "{question}|{answer}|{not a field}")
    assert (
        prompt.fill({"question": "{answer}", "answer": "{question} {x} {}"})
        == "{answer}|{question} {x} {}|{not a field}"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "triple"}, "no judge prompt"),
        ({"prompt_template": "{question}"}, "a single prompt for one turn has answer, question"),
        ({"prompt_template": "{question}{answer}{mood}"}, "its fields are answer, mood, question"),
        ({"prompt_template": None}, "no judge prompt"),
    ],
)
def test_a_prompt_that_is_none_is_named(tmp_path, change, said):
    with pytest.raises(DataError, match=rf"p.jsonl:1: .*{said}"):
        read_judge_prompts(write(tmp_path / "p.jsonl", [{**PROMPTS[0], **change}]))


def test_two_prompts_for_one_use_are_refused(tmp_path):
    with pytest.raises(DataError, match="general-one and again are for the same use"):
        read_judge_prompts(write(tmp_path / "p.jsonl", [PROMPTS[0], {**PROMPTS[0], "name": "again"}]))


def test_what_the_prompts_cannot_judge_is_said_at_once(tmp_path):
    prompts = read_judge_prompts(write(tmp_path / "p.jsonl", PROMPTS[:2]))
    two = {"id": "7", "category": "math", "turns": [{"prompt": "?"}] * 2}
    prompts.check([two], ["single"])
    with pytest.raises(DataError, match="no pairwise prompt without a reference answer for one turn"):
        prompts.check([two], ["single", "pairwise"])
    with pytest.raises(DataError, match="no single prompt with a reference answer for one turn"):
        prompts.check([{**two, "reference": ["a", "b"]}], ["single"])
    with pytest.raises(DataError, match="question 7 has 3 turns; judge prompts know 2"):
        prompts.check([{**two, "turns": [{"prompt": "?"}] * 3}], ["single"])


@real
def test_the_real_files_are_what_the_protocol_says():
    questions = read_questions(DATA / "mt_bench_question.jsonl")
    assert len(questions) == 80
    assert all(len(question["turns"]) == 2 for question in questions)
    categories = [question["category"] for question in questions]
    assert {category: categories.count(category) for category in categories} == dict.fromkeys(
        ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), 10
    )
    shown = with_references(questions, DATA / "mt_bench_reference_answer_gpt-4.jsonl")
    given = [question for question in shown if "reference" in question]
    assert len(given) == 30
    assert {question["category"] for question in given} == set(WITH_REFERENCE)
    assert {question["id"] for question in given if not question["reference_ok"]} == BAD_REFERENCES
    prompts = read_judge_prompts(DATA / "judge_prompts.jsonl")
    assert len(prompts.by_use) == 8
    assert prompts.choose("pairwise", reference=True, turn=1).name == "pair-math-v1-multi-turn"
    prompts.check(shown, ["single", "pairwise"])
    assert "[The End of Assistant's Answer]" in prompts.choose("single", reference=False, turn=0).marks


@real
def test_vicunas_questions_are_read_with_their_own_references():
    questions = read_questions(DATA / "vicuna_bench_question.jsonl")
    assert (len(questions), {len(question["turns"]) for question in questions}) == (80, {1})
    shown = with_references(questions, DATA / "vicuna_bench_reference_answer_gpt-4.jsonl")
    assert sum("reference" in question for question in shown) == 10
    assert all(question["reference_ok"] for question in shown if "reference" in question)
    read_judge_prompts(DATA / "judge_prompts.jsonl").check(shown, ["single", "pairwise"])
