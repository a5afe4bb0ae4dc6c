"""The shipped files are what the generator makes, and what evaluation asks stays out of training."""

import gzip
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from direct_rlhf.world import speech
from direct_rlhf.world.dialogues import FAMILIES, thread
from direct_rlhf.world.evaluation import THREE_H, THREE_H_SIZES
from direct_rlhf.world.generate import contents
from direct_rlhf.world.judge import insults, score_answer
from direct_rlhf.world.knowledge import build_world
from direct_rlhf.world.preferences import LABEL_NOISE
from direct_rlhf.world.questions import people
from direct_rlhf.world.tasks import world_task_configs

FILES = Path(__file__).parents[2] / "src" / "direct_rlhf" / "world" / "files"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return contents()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FILES / name).read_text().splitlines()]


def norm(text: str) -> str:
    return " ".join(text.casefold().split())


def training_questions() -> list[str]:
    names = ("helpful.jsonl", "harmless.jsonl", "honest.jsonl", "prompts.jsonl")
    return [
        norm(turn["content"])
        for name in names
        for row in rows(name)
        for turn in row["prompt"]
        if turn["role"] == "human"
    ]


def test_regenerated_files_equal_the_shipped_ones(made):
    shipped = {str(path.relative_to(FILES)) for path in FILES.rglob("*") if path.is_file()}
    assert shipped == set(made)
    for name, text in made.items():
        data = (FILES / name).read_bytes()
        assert (gzip.decompress(data) if name.endswith(".gz") else data).decode() == text, name


def test_no_question_of_the_evaluation_is_asked_in_training():
    names = ("conversations.jsonl", "three_h_validation.jsonl", "three_h_test.jsonl")
    asked = [row["turns"][0]["prompt"] for name in names for row in rows(name)]
    asked += [row["prompt"][0]["content"] for row in rows("toxicity.jsonl")]
    training = set(training_questions())
    contained = [question for question in asked if norm(question) in training]
    assert contained == []


def test_what_the_validation_questions_of_the_three_hs_ask_the_test_questions_do_not():
    found = {name: rows(f"three_h_{name}.jsonl") for name in THREE_H_SIZES}
    for name, questions in found.items():
        assert Counter(row["category"] for row in questions) == dict.fromkeys(THREE_H, THREE_H_SIZES[name])
        assert len({row["id"] for row in questions}) == len(questions)
    rules = [{json.dumps(row["turns"][0], sort_keys=True) for row in questions} for questions in found.values()]
    assert not rules[0] & rules[1]


def test_nobody_whom_the_evaluation_asks_about_is_asked_about_in_training():
    training = "\n".join(training_questions())
    world = build_world()
    assert len(world.kept) >= 12
    assert not [person.name for person in world.kept if norm(person.name) in training]


def test_no_task_document_stands_in_the_ptx_text(made):
    texts = "\n".join(json.loads(line)["text"] for line in made["text.jsonl.gz"].splitlines())
    for config in world_task_configs():
        for path in config["dataset_kwargs"]["data_files"].values():
            for row in map(json.loads, Path(path).read_text().splitlines()):
                right = row["choices"][row["gold"]] if "choices" in row else row["answer"]
                assert f"{row['prompt']} {right}\n" not in texts + "\n"


def test_the_gold_choice_stands_at_every_place_equally_often():
    for path in (FILES / "tasks").glob("*.jsonl"):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert 150 <= len(found) <= 200
        assert len({row["prompt"] for row in found}) == len(found)
        if "gold" in found[0]:
            counts = Counter((len(row["choices"]), row["gold"]) for row in found)
            for size in {size for size, _ in counts}:
                by_place = [counts[size, place] for place in range(size)]
                assert max(by_place) - min(by_place) <= 0.2 * sum(by_place), path.name
                assert all(len(set(row["choices"])) == len(row["choices"]) for row in found)


def test_there_are_eleven_tasks_with_absolute_data_files():
    configs = world_task_configs()
    assert len({config["task"] for config in configs}) == 11
    assert all(
        Path(p).is_absolute() and Path(p).exists() for c in configs for p in c["dataset_kwargs"]["data_files"].values()
    )


def test_pairs_have_the_stated_sizes_kinds_turns_and_noise():
    sizes = {"helpful": 1500, "harmless": 1000, "honest": 600}
    every = [row for kind in sizes for row in rows(f"{kind}.jsonl")]
    assert Counter(row["kind"] for row in every) == sizes
    assert 0.25 < sum(len(row["prompt"]) > 1 for row in every) / len(every) < 0.42
    rude_chosen = sum(bool(insults(row["chosen"])) for row in every)
    rude_rejected = sum(bool(insults(row["rejected"])) for row in every)
    assert rude_chosen < 2 * LABEL_NOISE * rude_rejected
    assert all(row["prompt"][-1]["role"] == "human" and row["chosen"] != row["rejected"] for row in every)


def test_length_alone_does_not_tell_chosen_from_rejected():
    every = [row for kind in ("helpful", "harmless", "honest") for row in rows(f"{kind}.jsonl")]
    shorter = sum(len(row["rejected"]) < len(row["chosen"]) for row in every) / len(every)
    assert 0.3 < shorter < 0.6


def test_right_answers_of_every_prompt_would_be_scored_right_and_wrong_ones_wrong():
    world, rng = build_world(), Random(3)
    for family in FAMILIES:
        for i in range(60):
            for ask in thread(rng, world, kept=i % 2 == 0, family=family):
                for answer in ask.right:
                    assert score_answer(ask.rule, answer)[0] == 10, (ask.text, answer)
                    assert score_answer(ask.rule, f"{speech.POLITE[0]} {answer} {speech.POLITE_END[0]}")[0] >= 9 - (
                        "word" in ask.text
                    )
                for answer in ask.wrong:
                    assert score_answer(ask.rule, answer)[0] <= 3, (ask.text, answer)
                assert score_answer(ask.rule, ask.text)[0] <= 3, ask.text


def test_every_conversation_has_two_turns_in_six_categories():
    found = rows("conversations.jsonl")
    assert len(found) == 120
    assert set(Counter(row["category"] for row in found).values()) == {20}
    assert all(len(row["turns"]) == 2 for row in found)
    assert len({row["id"] for row in found}) == 120


def test_real_tools_and_the_word_list_find_the_insults_and_leave_politeness_alone():
    profanity = pytest.importorskip("profanity_check", reason="the toxicity extra is not installed")
    world, rng = build_world(), Random(5)
    asks = [people(rng, world, False)[0] for _ in range(200)]
    rude = [speech.rude(rng, ask) for ask in asks]
    polite = [speech.brief(rng, ask.right[0]) for ask in asks]
    assert (profanity.predict_prob(rude) >= 0.5).mean() > 0.97
    assert (profanity.predict_prob(polite) < 0.5).mean() > 0.97
    bad = (FILES / "bad_words.txt").read_text().split("\n")[:-1]
    assert all(any(word in text.lower() for word in bad) for text in rude)
    assert not any(insults(text) for text in polite)
