"""The conversation suite with a judge that is asked: MT-Bench's protocol on a tiny random model."""

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from direct_rlhf.errors import DirectRLHFError, JudgeError
from direct_rlhf.evaluate import conversation, endpoint, suite
from direct_rlhf.evaluate.judging import Judging
from direct_rlhf.evaluate.judgments import Kept
from direct_rlhf.evaluate.records import read_items
from direct_rlhf.recipe.schema import Recipe
from injections import write_prompts
from judge_server import JudgeServer

DATA = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "mt_bench").is_dir(), reason="the MT-Bench files are not in ../shared/data")
FAULTS = ("429", "500", "timeout", "reset", "json", "empty")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def verdict(messages):
    """The judge quotes the prompt, then decides by a hash of it; the second half of pairs it takes for ties."""
    text = "".join(message["content"] for message in messages)
    number = int(hashlib.sha256(messages[-1]["content"].encode()).hexdigest(), 16)
    return f"I read:\n{text}\n\n[[{'ABC'[number % 3] if '[[A]]' in text else 1 + number % 10}]]"


def tenth(messages, nth):
    """A fault at the first try of one request in ten."""
    number = int(hashlib.sha256(messages[-1]["content"].encode()).hexdigest(), 16)
    return FAULTS[number // 10 % 6] if nth == 1 and number % 10 == 0 else None


@pytest.fixture
def longer(tiny_folder, tmp_path):
    """The tiny model with room for MT-Bench's longest questions in bytes."""
    folder = tmp_path / "longer"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    return folder


@pytest.fixture
def context(tmp_path, bars):
    """A stage's context on own small files: three categories, one with references."""
    rows = [
        {"question_id": number, "category": category, "turns": [f"What is {number}?", "And now?"]}
        for number, category in enumerate(["writing", "math", "stem", "writing", "math", "stem"], 101)
    ]
    write = lambda name, rows: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("questions.jsonl", rows)
    write(
        "references.jsonl",
        [
            {"question_id": number, "model_id": "gpt-4", "choices": [{"turns": ["first", "second"]}]}
            for number in (102, 105)
        ],
    )
    write("people.jsonl", [{"input": f"{i}?", "output_1": "a", "output_2": "b", "label": 1 + i % 2} for i in range(6)])
    write_prompts(tmp_path / "prompts.jsonl")

    def make(judging, *, run="run", **changed):
        section = {
            "questions": "questions.jsonl",
            "references": "references.jsonl",
            "judge_prompts": "prompts.jsonl",
            "judge": "endpoint",
            "judging": {"model": "m", "timeout": 0.3, "concurrency": 4, **judging},
            "temperatures": "by-category",
            "max_new_tokens": 6,
            **changed,
        }
        recipe = Recipe.model_validate(
            {
                "evaluation": {
                    "suites": ["conversation"],
                    "conversation": section,
                    "bootstrap_draws": 200,
                    "data": str(DATA),
                }
            }
            if DATA.is_dir()
            else {"evaluation": {"suites": ["conversation"], "conversation": section, "bootstrap_draws": 200}}
        )
        found = SimpleNamespace(
            recipe=recipe, run=SimpleNamespace(path=tmp_path / run), device="cpu", should_stop=lambda: False,
            check_stop=lambda: None, progress=bars, said=[],
        )  # fmt: skip
        found.say = found.said.append
        found.arm = lambda arm, model: suite.evaluate_arm(found, arm, str(model), folder=tmp_path)["conversation"]
        return found

    return make


def rows_of(ctx, arm="base"):
    return read_items(ctx.run.path / "evaluation" / arm / "conversation.jsonl")


def test_scores_by_category_and_turn_with_and_without_references(context, tiny_folder):
    with JudgeServer(verdict) as server:
        ctx = context({"base_url": server.url}, without_references=True)
        found = ctx.arm("base", tiny_folder)
    items = rows_of(ctx)
    assert len(items) == 12
    assert len(server.asked) == 12 + 4  # the four with references twice
    assert found["score"] == pytest.approx(sum(item.value for item in items) / 12)
    by = found["by_category_and_turn"]
    assert set(by) == {"math", "stem", "writing"}
    for category, turns in by.items():
        for turn, cell in turns.items():
            values = [x.value for x in items if (x.extra["category"], str(x.extra["turn"])) == (category, turn)]
            assert (cell["value"], cell["n_scored"]) == (sum(values) / 2, 2)
    assert {name: part["n_scored"] for name, part in found["by_reference"].items()} == {
        "none": 8, "given": 4, "sound": 2, "given_but_not_shown": 4,
    }  # fmt: skip
    assert found["doubted_references"] == ["105"]
    assert (found["coverage"], found["judge"], found["self_check"]) == (1.0, "endpoint (m)", None)
    assert {item.extra["category"]: item.extra["temperature"] for item in items} == {
        "writing": 0.7, "math": 0.0, "stem": 0.1,
    }  # fmt: skip
    assert {item.finish for item in items} <= {"eos", "stop", "length"}


@pytest.mark.promise("J3")
def test_a_run_that_broke_off_generates_and_pays_nothing_again(context, tiny_folder, monkeypatch):
    """Seven calls are allowed, then more."""
    with JudgeServer(verdict) as server:
        with pytest.raises(JudgeError, match="cap of 7 calls"):
            context({"base_url": server.url, "max_calls": 7}).arm("base", tiny_folder)
        assert len(server.asked) == 7
        asked = []
        generate = conversation.generate
        monkeypatch.setattr(
            conversation,
            "generate",
            lambda model, tokens, asks, **more: asked.extend(asks) or generate(model, tokens, asks, **more),
        )
        ctx = context({"base_url": server.url, "max_calls": 12})
        found = ctx.arm("base", tiny_folder)
        assert (len(server.asked), asked) == (12, [])
        assert Counter(json.dumps(messages) for messages in server.answered).most_common(1)[0][1] == 1
        other = context({"base_url": server.url}, run="other")
        assert other.arm("base", tiny_folder) == found
        assert context({"base_url": server.url, "max_calls": 12}).arm("base", tiny_folder) == found
    assert len(server.asked) == 24
    assert [item.value for item in rows_of(other)] == [item.value for item in rows_of(ctx)]


@pytest.mark.promise("J7")
def test_the_cap_is_of_the_whole_run(context, tiny_folder):
    with JudgeServer(verdict) as server:
        ctx = context({"base_url": server.url, "max_calls": 13})
        ctx.arm("base", tiny_folder)
        with pytest.raises(JudgeError, match="cap of 13 calls"):
            ctx.arm("direct_ppo", tiny_folder)
    assert len(server.asked) == 13


@pytest.mark.promise("J2")
def test_below_coverage_there_is_no_headline_and_each_item_is_accounted_for(context, tiny_folder):
    bad = lambda messages, nth: "400" if "What is 103?" in messages[-1]["content"] else None
    with JudgeServer(verdict, bad) as server:
        ctx = context({"base_url": server.url})
        found = ctx.arm("base", tiny_folder)
    assert (found["score"], found["n_total"], found["n_scored"], found["n_failed"]) == (None, 12, 10, 2)
    assert found["reasons"] == {"judge_failed": 2}
    assert found["coverage"] == pytest.approx(10 / 12)
    assert found["by_category_and_turn"]["stem"]["1"]["value"] is None
    assert found["by_category_and_turn"]["math"]["1"]["value"] is not None
    assert [item.extra["verdict"][:8] for item in rows_of(ctx) if item.status == "failed"] == ["http_400"] * 2


def test_the_judge_is_checked_against_people_first_and_once(context, tiny_folder):
    with JudgeServer(verdict) as server:
        ctx = context({"base_url": server.url}, self_check="people.jsonl")
        found = [ctx.arm(arm, tiny_folder) for arm in ("base", "sft")]
    check = found[0]["self_check"]
    assert check["n_total"] == 6
    assert check["better_than_chance"] is False
    assert found[1]["self_check"] == check
    assert "not shown to agree with people more than chance" in ctx.said[0]
    first = [body["messages"][-1]["content"] for body in server.asked[:12]]
    assert all("[The Start of Answer A]" in text for text in first)
    assert len(server.asked) == 12 + 12 + 12


@pytest.mark.promise("J6", "J8")
def test_arms_are_judged_side_by_side_in_both_orders(context, tiny_folder, tmp_path):
    with JudgeServer(lambda messages: "[[A]]" if "[[A]]" in messages[0]["content"] else "[[5]]") as server:
        ctx = context({"base_url": server.url}, pairwise=True)
        for arm in ("base", "sft"):
            ctx.arm(arm, tiny_folder)
        rows = suite.compare(ctx, ["base", "sft"], folder=tmp_path)
        (row,) = json.loads((ctx.run.path / "evaluation" / "pairwise.json").read_text())
        asked = len(server.asked)
        suite.compare(ctx, ["base", "sft"], folder=tmp_path)
    assert (asked, len(server.asked)) == (12 + 12 + 24, 12 + 12 + 24)
    assert {each["verdict"] for each in rows} == {"no difference shown"}
    assert (row["arm"], row["against"], row["win_rate"], row["ci"]) == ("sft", "base", 0.5, [0.5, 0.5])
    assert (row["inconsistency_rate"], row["favoured"], row["verdict"]) == (
        1.0,
        {"first": 12, "second": 0},
        "no difference shown",
    )
    assert (row["wins"], row["ties"], row["losses"], row["n_failed"]) == (0, 12, 0, 0)


def test_a_recorded_judge_gives_the_same_scores_without_a_server(context, tiny_folder, tmp_path):
    with JudgeServer(verdict) as server:
        first = context({"base_url": server.url}).arm("base", tiny_folder)
    again = context({"recorded": "run/evaluation/base/judgments.jsonl"}, run="again", judge="recorded").arm(
        "base", tiny_folder
    )
    assert (again["score"], again["by_turn"], again["judge"]) == (
        first["score"],
        first["by_turn"],
        "recorded (judgments.jsonl)",
    )


def test_a_model_of_this_machine_can_judge(context, longer, tiny_folder):
    """A random one says nothing that can be read: every item has failed, and none has a score."""
    judging = {"model": str(longer), "max_tokens": 4, "batch_size": 3}
    found = context(judging, judge="local").arm("base", tiny_folder)
    assert (found["score"], found["n_scored"], found["reasons"]) == (None, 0, {"judge_unparsed": 12})


def test_what_only_says_how_requests_are_sent_measures_nothing_again(context, tiny_folder, monkeypatch):
    with JudgeServer(verdict) as server:
        first = context({"base_url": server.url}).arm("base", tiny_folder)
        monkeypatch.setattr(suite, "SUITES", {})
        changed = {"concurrency": 1, "timeout": 9.0, "retries": 2, "max_calls": 99}
        assert context({"base_url": server.url, **changed}, pairwise=True).arm("base", tiny_folder) == first
        with pytest.raises(KeyError):
            context({"base_url": server.url, "temperature": 1.0}).arm("base", tiny_folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"questions": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"references": "people.jsonl"}, "no reference answer"),
        ({"judge_prompts": "people.jsonl"}, "no judge prompt"),
        ({"self_check": "questions.jsonl"}, "no human-labelled pair"),
        ({"judging": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}}, "NO_SUCH_KEY"),
    ],
)
def test_what_is_wrong_is_said_without_a_model_and_without_a_call(context, tmp_path, changed, said):
    Judging(context({"base_url": "http://127.0.0.1:9/v1"}), tmp_path).check()
    with pytest.raises(DirectRLHFError, match=said):
        Judging(context(**{"judging": {"base_url": "http://127.0.0.1:9/v1"}, **changed}), tmp_path).check()


@real
@pytest.mark.promise("J1", "J2", "J9")
def test_mt_bench_whole_with_faults_on_the_way(context, longer, tmp_path):
    """80 questions, 160 judgments, a self-check; one request in ten meets a fault, and nothing is lost or doubled."""
    settings = {
        "questions": "data:mt_bench/mt_bench_question.jsonl",
        "references": "data:mt_bench/mt_bench_reference_answer_gpt-4.jsonl",
        "judge_prompts": "data:mt_bench/judge_prompts.jsonl",
        "self_check": "data:llmbar/processed_human_agreement.jsonl.gz",
        "self_check_limit": 10,
        "self_check_subset": "MT-Bench",
    }
    with JudgeServer(verdict, tenth) as server:
        ctx = context({"base_url": server.url, "concurrency": 8}, **settings)
        found = ctx.arm("base", longer)
    items = rows_of(ctx)
    assert (found["n_total"], found["n_scored"], found["n_failed"]) == (160, 160, 0)
    assert {turn: summary["n_scored"] for turn, summary in found["by_category_and_turn"]["math"].items()} == {
        "1": 10,
        "2": 10,
    }
    assert {name: part["n_scored"] for name, part in found["by_reference"].items()} == {
        "none": 100,
        "given": 60,
        "sound": 34,
    }
    assert len(found["doubted_references"]) == 13
    assert found["self_check"]["n_total"] == 10
    judged = list(Kept(ctx.run.path / "evaluation/base/judgments.jsonl")._rows.values())
    score = {(row["question"], row["turn"]): float(re.findall(r"\[\[(\d+)\]\]$", row["reply"])[0]) for row in judged}
    assert {(item.unit, item.extra["turn"]): item.value for item in items} == score
    assert {item.finish for item in items} <= {"eos", "stop", "length"}
    assert max(Counter(json.dumps(messages) for messages in server.answered).values()) == 1
    assert len(server.asked) > len(server.answered)
