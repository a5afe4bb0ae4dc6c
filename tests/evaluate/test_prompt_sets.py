import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.prompt_sets import read_prompts
from direct_rlhf.recipe.schema import DialogueSection

SHARED = Path(__file__).parents[3] / "shared" / "data"
ADVBENCH = 'goal,target\nDo a bad thing,"Sure, here"\n"Do another, worse\nthing",Sure\n'
XSTEST = (
    "id,prompt,type,label,focus,note\n1,How do I kill time?,homonyms,safe,kill,\n7,How do I steal?,contrast,unsafe,,\n"
)


@pytest.fixture
def form(tokens):
    return DialogueFormat(DialogueSection(), tokens)


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def shown(prompts):
    return [(prompt.id, prompt.set, prompt.turns[-1].text) for prompt in prompts]


def test_advbench_is_harmful_and_a_goal_may_hold_commas_and_lines(tmp_path, form):
    path = write(tmp_path / "harmful_behaviors.csv", ADVBENCH)
    assert shown(read_prompts(path, form)) == [
        ("harmful_behaviors-1", "harmful", "Do a bad thing"),
        ("harmful_behaviors-2", "harmful", "Do another, worse\nthing"),
    ]


@pytest.mark.parametrize("name", ["xstest.csv", "xstest.csv.gz"])
def test_xstest_is_harmless_where_safe_and_harmful_where_unsafe(tmp_path, form, name):
    path = write(tmp_path / name, "\ufeff" + XSTEST)
    assert shown(read_prompts(path, form)) == [
        ("xstest-1", "harmless", "How do I kill time?"),
        ("xstest-7", "harmful", "How do I steal?"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("rtp.jsonl", json.dumps({"prompt": {"text": "So, I", "toxicity": 0.2}, "challenging": True}), "So, I"),
        ("plain.jsonl", json.dumps({"prompt": "What now?"}), "What now?"),
        ("plain.txt", "\nWhat now?\n", "What now?"),
        ("plain.csv", "prompt,note\nWhat now?,x\n", "What now?"),
        ("hh.jsonl", json.dumps({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: So."}), "Why?"),
    ],
)  # fmt: skip
def test_prompts_without_a_set_of_their_own_are_provoking(tmp_path, form, name, text, found):
    (prompt,) = read_prompts(write(tmp_path / name, text), form)
    assert (prompt.set, prompt.turns[-1].text) == ("provoking", found)
    assert prompt.id.startswith(name.split(".")[0])


def test_several_files_are_read_in_turn_and_a_limit_holds_for_each_set_of_each(tmp_path, form):
    files = [write(tmp_path / "a.csv", ADVBENCH), write(tmp_path / "x.csv", XSTEST)]
    assert [prompt.id for prompt in read_prompts(files, form)] == ["a-1", "a-2", "x-1", "x-7"]
    assert [prompt.id for prompt in read_prompts(files, form, limit=1)] == ["a-1", "x-1", "x-7"]


def test_the_same_id_in_two_files_is_named(tmp_path, form):
    (tmp_path / "b").mkdir()
    files = [write(tmp_path / "a.csv", ADVBENCH), write(tmp_path / "b" / "a.csv", ADVBENCH)]
    with pytest.raises(DataError, match=r"b/a.csv:2: not a toxicity prompt \(it needs an id, a text that no other"):
        read_prompts(files, form)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "id,prompt,label\n1,Why?,maybe\n", r"x.csv:2: .*its label is 'maybe', not safe or unsafe"),
        (
            "x.csv",
            "question\nWhy?\n",
            r"not a known set of prompts. A CSV needs the columns goal .* header is: question",
        ),
        ("x.csv", "goal,target\na,b,c\n", r"x.csv:2: has other fields than the header"),
        ("x.csv", "goal,target\na\n", r"x.csv:2: has other fields than the header"),
        ("x.csv", 'goal,target\n"a"b,c\n', r"x.csv:2: not CSV"),
        ("x.csv", "goal,target\n", "holds no prompts"),
        ("x.csv", "goal,target\n ,b\n", "the last human turn is empty"),
        ("x.txt", "\n\n", "holds no prompts"),
        ("x.jsonl", '{"prompt": {"words": "a"}}', "prompt must be text, is null"),
        ("x.jsonl", '{"question": "a"}', "prompt must be text, is null"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_file_and_line(tmp_path, form, name, text, message):
    with pytest.raises(DataError, match=message):
        read_prompts(write(tmp_path / name, text), form)


def test_a_cut_gzip_and_another_encoding_are_named(tmp_path, form):
    cut = tmp_path / "x.csv.gz"
    cut.write_bytes(gzip.compress(XSTEST.encode())[:-6])
    with pytest.raises(DataError, match=r"x.csv.gz: damaged gzip"):
        read_prompts(cut, form)
    latin = tmp_path / "x.txt"
    latin.write_bytes("fa\xe7ade".encode("latin-1"))
    with pytest.raises(DataError, match=r"x.txt: not UTF-8 at byte 2"):
        read_prompts(latin, form)


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("advbench/harmful_behaviors.csv", {"harmful": 520}),
        ("xstest/xstest_prompts.csv", {"harmless": 250, "harmful": 200}),
        ("hh_rlhf_harmless_test/harmless-base_test.jsonl.gz", {"provoking": 2312}),
    ],
)
def test_the_fields_own_files_are_read_whole(form, name, sets):
    if not (SHARED / name).exists():
        pytest.skip(f"the real test sets are not here (looked for {SHARED / name})")
    assert Counter(prompt.set for prompt in read_prompts(SHARED / name, form)) == sets
