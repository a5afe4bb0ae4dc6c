import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.pair_files import everything, jsonl, load, pair_row, section, sources
from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.load import (
    fingerprint,
    fingerprints,
    fits,
    fits_prompts,
    load_preferences,
    load_prompts,
    load_text_data,
    load_texts,
    sniff,
    write_rejected,
)
from direct_rlhf.data.types import PreferencePair, Prompt, RejectedRow, Turn, prompt_hash
from direct_rlhf.errors import ConfigError
from direct_rlhf.recipe.schema import DataSection, DataSource, DialogueSection


def test_relative_paths_start_from_data_path_then_the_recipe_folder(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "recipe" / "a.jsonl").write_bytes(jsonl(pair_row(1)))
    (tmp_path / "data" / "a.jsonl").write_bytes(jsonl(pair_row(2)))
    folder = tmp_path / "recipe"
    assert everything(load(folder, section("a.jsonl")))[0].chosen == "good 1"
    assert everything(load(folder, section("a.jsonl", path="../data")))[0].chosen == "good 2"
    with pytest.raises(ConfigError, match=r"b\.jsonl: no such file or folder\. Looked at: "):
        load(folder, section("b.jsonl"))


# --- split, mixing, duplicates ---


@pytest.mark.promise("D2", "D4")
def test_the_split_depends_on_the_prompt_alone(tmp_path):
    rows = [pair_row(at) for at in range(200)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    (tmp_path / "b.jsonl").write_bytes(jsonl(*reversed(rows[:100]), pair_row(500)))
    first, other_seed, other_file = (
        {pair.id for pair in load(tmp_path, section(name), seed).held_out}
        for name, seed in (("a.jsonl", 0), ("a.jsonl", 7), ("b.jsonl", 0))
    )
    assert first == other_seed
    known = {pair.id for pair in everything(load(tmp_path, section("b.jsonl")))}
    assert other_file & first == first & known
    assert 8 <= len(first) <= 34
    golden = hashlib.sha256(b'[["human", "question 1"]]').hexdigest()[:16]
    assert prompt_hash((Turn("human", " Question  1"),)) == golden == "4a5c1440fc031d7c"


@pytest.mark.promise("T4")
def test_equal_prompts_stay_together_in_pairs_and_prompts(tmp_path):
    rows = [pair_row(at, chosen=f"good {at} {copy}") for at in range(60) for copy in range(3)]
    rows += [pair_row(at, prompt=f"  Question\n{at}", chosen="better") for at in range(60)]  # folded to the same prompt
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    data = load(tmp_path, section("a.jsonl", held_out=0.3))
    train, held_out = ({prompt_hash(pair.prompt) for pair in side} for side in (data.train, data.held_out))
    assert not train & held_out
    assert len(train | held_out) == 60
    prompts = load_prompts(section("a.jsonl", held_out=0.3), folder=tmp_path, seed=3)
    assert {prompt.id for prompt in prompts.held_out} == held_out
    assert {prompt.id for prompt in prompts.train} == train
    assert prompts.counts == {"read": 240, "kept": 60, "duplicate": 180}


def test_held_out_zero_keeps_everything_for_training(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(50)]))
    assert load(tmp_path, section("a.jsonl", held_out=0.0)).held_out == ()


def test_prompts_come_from_their_own_sources_where_there_are_any(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(5)]))
    (tmp_path / "p.jsonl").write_bytes(jsonl({"prompt": "x"}, {"prompt": "y", "kind": "harmless"}))
    data = section("a.jsonl", prompts=[DataSource(path="p.jsonl")], held_out=0.0)
    prompts = load_prompts(data, folder=tmp_path, seed=0)
    assert [(prompt.turns[0].text, prompt.kind) for prompt in prompts.train] == [("x", "helpful"), ("y", "harmless")]


@pytest.mark.parametrize("loader", [load_preferences, load_prompts])
def test_no_source_is_a_recipe_error(loader):
    with pytest.raises(ConfigError, match="name at least one source"):
        loader(DataSection(), folder=None, seed=0)


def test_duplicates_are_dropped_across_sources_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(pair_row(1), pair_row(2)))
    (tmp_path / "b.jsonl").write_bytes(jsonl(pair_row(1, prompt=" QUESTION  1"), pair_row(3)))
    data = load(tmp_path, section("a.jsonl", "b.jsonl"))
    assert data.rejected == (RejectedRow("b.jsonl:1", "duplicate", "same as a.jsonl:1"),)
    assert len(everything(data)) == 3


def test_weights_say_how_often_training_rows_are_used(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(400)]))

    def ids(weight, seed=0):
        source = DataSource(path="a.jsonl", weight=weight)
        data = load(tmp_path, DataSection(preferences=[source]), seed)
        assert len(data.held_out) == held_out
        return [pair.id for pair in data.train]

    whole = load(tmp_path, section("a.jsonl"))
    held_out, once = len(whole.held_out), [pair.id for pair in whole.train]
    assert ids(1.0) == once
    assert ids(0.0) == []
    assert sorted(ids(2.0)) == sorted(once * 2)
    half = ids(0.5)
    assert 0.4 * len(once) < len(half) < 0.6 * len(once)
    assert set(half) < set(once)
    assert ids(0.5) == half
    assert set(ids(0.5, seed=1)) != set(half)
    assert sorted(ids(1.5)) == sorted(once + half)


@pytest.mark.promise("D2")
def test_another_seed_samples_other_rows_and_holds_out_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(200)]))
    (tmp_path / "p.jsonl").write_bytes(jsonl(*[{"prompt": f"question {at}"} for at in range(200)]))
    data = DataSection(
        preferences=[DataSource(path="a.jsonl", weight=0.5)], prompts=[DataSource(path="p.jsonl", weight=0.5)]
    )
    seeds = range(4)
    pairs = [load_preferences(data, folder=tmp_path, seed=seed) for seed in seeds]
    prompts = [load_prompts(data, folder=tmp_path, seed=seed) for seed in seeds]
    for found in (pairs, prompts):
        assert len({tuple(row.id for row in one.train) for one in found}) == len(seeds)
        assert len({tuple(row.id for row in one.held_out) for one in found}) == 1
    assert {prompt_hash(pair.prompt) for pair in pairs[0].held_out} == {prompt.id for prompt in prompts[0].held_out}


def test_limit_uses_the_first_good_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(200)], *[b"{"] * 100))
    data = load(tmp_path, DataSection(preferences=[DataSource(path="a.jsonl", limit=5)], held_out=0.0))
    assert [pair.source for pair in data.train] == [f"a.jsonl:{line}" for line in range(1, 6)]


def test_kinds_come_from_the_row_else_from_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(pair_row(1), pair_row(2, kind="honest")))
    data = DataSection(preferences=[DataSource(path="a.jsonl", kind="harmless")], held_out=0.0)
    assert [pair.kind for pair in load(tmp_path, data).train] == ["harmless", "honest"]


def test_texts_are_loaded_with_their_weights(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[{"text": f"story {at}"} for at in range(100)], {"text": " "}))
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": "twice"}))
    data = DataSection(text=[DataSource(path="a.jsonl"), DataSource(path="b.jsonl", weight=2)])
    assert load_texts(data, folder=tmp_path) == [f"story {at}" for at in range(100)] + ["twice"] * 2
    found = load_text_data(data, folder=tmp_path)
    assert found.rejected == (RejectedRow("a.jsonl:101", "empty_text", "text is empty"),)
    assert found.counts == {"read": 102, "kept": 101, "empty_text": 1}
    assert load_texts(DataSection(), folder=tmp_path) == []


# --- lengths, fingerprints, listing ---


@pytest.mark.promise("T3")
def test_length_never_removes_what_differs_between_the_answers(tokens):
    form = DialogueFormat(DialogueSection(), tokens)
    limits = DataSection(max_prompt_tokens=60, max_answer_tokens=30)
    long = (Turn("human", "word " * 50), Turn("assistant", "Yes."), Turn("human", "And now?"))
    start = "The same long beginning of an answer that goes on and on "
    pairs = [
        PreferencePair("1", long, "good", "bad", "k", "f:1"),
        PreferencePair("2", long, start + "good", start + "bad", "k", "f:2"),
        PreferencePair("3", long[:1], "good", "bad", "k", "f:3"),
        PreferencePair("4", long, "good", "bad " * 50, "k", "f:4"),
    ]
    kept, rejected = fits(pairs, form, limits)
    assert [pair.id for pair in kept] == ["1"]
    assert rejected == [
        RejectedRow("f:2", "too_long", "chosen and rejected: longer than data.max_answer_tokens = 30"),
        RejectedRow("f:3", "too_long", "the last human turn passes data.max_prompt_tokens = 60"),
        RejectedRow("f:4", "too_long", "rejected: longer than data.max_answer_tokens = 30"),
    ]
    prompts = [Prompt(pair.id, pair.prompt, "k", pair.source) for pair in pairs]
    kept_prompts, rejected_prompts = fits_prompts(prompts, form, limits)
    assert [prompt.id for prompt in kept_prompts] == ["1", "2", "4"]
    assert [row.reason for row in rejected_prompts] == ["too_long"]


@pytest.mark.promise("T3")
@settings(max_examples=60)
@given(
    earlier=st.lists(st.text("ab ", min_size=1, max_size=30), max_size=4),
    common=st.text("xyz ", max_size=40),
    ends=st.tuples(st.text("abc", max_size=20), st.text("abc", max_size=20)).filter(lambda ends: ends[0] != ends[1]),
    limits=st.tuples(st.integers(8, 90), st.integers(2, 60)),
)
def test_a_pair_is_whole_in_both_answers_or_counted(tokens, earlier, common, ends, limits):
    said = [Turn(("human", "assistant")[at % 2], text.strip() or "a") for at, text in enumerate(earlier)]
    if len(said) % 2:
        said.append(Turn("assistant", "ok"))
    answers = [(common + end).strip() for end in ends]
    pair = PreferencePair("1", (*said, Turn("human", "last")), *answers, "k", "f:1")
    form = DialogueFormat(DialogueSection(), tokens)
    kept, rejected = fits([pair], form, DataSection(max_prompt_tokens=limits[0], max_answer_tokens=limits[1]))
    assert len(kept) + len(rejected) == 1
    for answer in answers if kept else ():
        encoded = form.encode_dialogue(pair.prompt, answer, max_prompt_tokens=limits[0], max_answer_tokens=limits[1])
        assert len(encoded.prompt_ids) <= limits[0]
        assert len(encoded.answer_ids) <= limits[1]
        assert tokens.decode(encoded.prompt_ids).endswith("\n\nHuman: last\n\nAssistant:")
        assert tokens.decode(encoded.answer_ids).strip() == answer


def test_a_pair_that_a_template_refuses_is_set_aside(all_tokens):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}"
    form = DialogueFormat(DialogueSection(format="chat_template"), replace(all_tokens["chat"], chat_template=template))
    turns = (Turn("system", "Be kind."), Turn("human", "a"))
    refused = [RejectedRow("f:1", "template", "the chat template refuses this dialogue: no system")]
    assert fits([PreferencePair("1", turns, "b", "c", "k", "f:1")], form, DataSection()) == ([], refused)
    assert fits_prompts([Prompt("1", turns, "k", "f:1")], form, DataSection()) == ([], refused)


@pytest.mark.promise("T7")
def test_the_fingerprint_sees_every_byte_of_every_source(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(pair_row(1)))
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": "a"}))
    data = section("a.jsonl", text=[DataSource(path="b.jsonl")])
    first = fingerprint(data, tmp_path)
    assert fingerprint(data, tmp_path) == first
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": "b"}))
    assert fingerprint(data, tmp_path) != first


@pytest.mark.promise("T7")
def test_the_source_that_changed_is_the_one_that_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a.jsonl", "folder/b.jsonl", "folder/c.jsonl"):
        (tmp_path / name).write_bytes(jsonl(pair_row(1)))
    data = section("a.jsonl", prompts=[DataSource(path="folder")])
    whole, each = fingerprint(data, tmp_path), fingerprints(data, tmp_path)
    assert each.keys() == {"a.jsonl", "folder"}
    (tmp_path / "folder/c.jsonl").write_bytes(jsonl(pair_row(2)))
    assert fingerprint(data, tmp_path) != whole
    assert fingerprints(data, tmp_path) == each | {"folder": fingerprints(data, tmp_path)["folder"]}
    assert fingerprints(data, tmp_path)["folder"] != each["folder"]
    (tmp_path / "folder/c.jsonl").rename(tmp_path / "folder/d.jsonl")
    assert fingerprints(data, tmp_path)["folder"] != each["folder"]


def test_rejected_rows_are_written_one_a_line(tmp_path):
    write_rejected(tmp_path / "rejected.jsonl", [RejectedRow("a:1", "nul", "é"), RejectedRow("a:2", "nul", "\ud800")])
    lines = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": "a:1", "reason": "nul", "detail": "é"},
        {"source": "a:2", "reason": "nul", "detail": "\ud800"},
    ]


def test_sniffing_reads_a_few_rows_and_lists_every_problem(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(60)], *[b"{"] * 60))
    data = section(
        "a.jsonl",
        "none.jsonl",
        "hf:some/pairs",
        prompts=[DataSource(path="a.jsonl")],
        text=[DataSource(path="a.jsonl")],
    )
    problems = sniff(data, tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["data.preferences[1]", "data.text[0]"]
    assert len(sniff(data, tmp_path, rows=120)) == 4


# --- the real thing ---

HH_FILES = {
    "hh_rlhf_helpful_test": "helpful-base_test.jsonl.gz",
    "hh_rlhf_harmless_test": "harmless-base_test.jsonl.gz",
}
HH_COUNTS = {
    "hh_rlhf_helpful_test": {"read": 2352, "kept": 2352, "cut_early": 9},
    "hh_rlhf_harmless_test": {"read": 2312, "kept": 2308, "empty_chosen": 4, "cut_early": 5},
}


@pytest.mark.parametrize("name", HH_FILES)
def test_every_row_of_the_real_hh_files_is_accounted_for(hh, name):
    data = load(Path(), section(name, path=str(hh), held_out=0.1))
    assert data.counts == HH_COUNTS[name]
    assert data.formats == {name: "hh"}
    assert 0.07 < len(data.held_out) / data.counts["kept"] < 0.13
    places = sources(everything(data)) + sources(data.rejected)
    assert sorted(int(place.rpartition(":")[2]) for place in places) == list(range(1, data.counts["read"] + 1))


@pytest.mark.parametrize("name", HH_FILES)
def test_rendering_gives_the_bytes_of_the_real_hh_transcripts(hh, tokens, name):
    form = DialogueFormat(DialogueSection(), tokens)
    lines = gzip.decompress((hh / name / HH_FILES[name]).read_bytes()).decode().split("\n")
    exact = other = 0
    for pair in everything(load(Path(), section(name, path=str(hh)))):
        row = json.loads(lines[int(pair.source.rpartition(":")[2]) - 1])
        for key, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            text = form.prompt_text(pair.prompt) + form.answer_text(answer)
            spaced = any(part[:1] != " " or part.strip() != part[1:] for part in _parts(row[key]))
            if pair.cut_early or spaced or not answer:  # outer white space is not kept
                other += 1
            else:
                assert text == row[key], pair.source
                exact += 1
    assert exact + other == 2 * HH_COUNTS[name]["kept"]
    assert other <= 40


def _parts(transcript: str) -> list[str]:
    return [part for turn in transcript.split("\n\nHuman:")[1:] for part in turn.split("\n\nAssistant:")]
