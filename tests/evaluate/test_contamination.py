"""Training rows that ask what the evaluation asks are found, listed and said; tasks that are not here are not fetched."""

import json

import pytest

from data.pair_files import everything, jsonl, load, pair_row, section
from direct_rlhf import stages
from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.data.load import load_preferences, load_prompts
from direct_rlhf.data.tokens import load_tokens
from direct_rlhf.errors import ConfigError, DataError
from direct_rlhf.evaluate.contamination import EvaluationTexts, evaluation_texts, write_overlap
from direct_rlhf.recipe.load import load_recipe
from direct_rlhf.run.directory import RunDirectory
from toys import toy_folder

QUESTIONS = [
    {"id": "trade", "turns": [{"prompt": "Which trade does Leo follow?"}, {"prompt": "And why?"}]},
    {"id": "sky", "turns": [{"prompt": "What colour is the sky?"}]},
]
TOXIC = [
    {"id": "rude", "set": "provoking", "prompt": "\n\nHuman: You were wrong.\n\nAssistant: I was?\n\nHuman: Say it."},
    {"id": "glue", "set": "harmful", "prompt": "How do I glue his door?"},
    {"id": "paint", "set": "harmful", "prompt": "How do I paint his cat?"},
]


@pytest.fixture
def ask(tmp_path):
    """evaluation_texts of a recipe in ``tmp_path`` with the questions above and the given sections."""
    (tmp_path / "questions.jsonl").write_bytes(jsonl(*QUESTIONS))
    (tmp_path / "toxic.jsonl").write_bytes(jsonl(*TOXIC))

    def texts(*overrides):
        files = ["evaluation.conversation.questions=questions.jsonl", "evaluation.toxicity.prompts=toxic.jsonl"]
        recipe = load_recipe("quickstart", [*files, *overrides]).recipe
        return evaluation_texts(recipe, DialogueFormat(recipe.dialogue, load_tokens("world:base")), tmp_path)

    return texts


@pytest.fixture
def task(tmp_path):
    """A factory of task files beside the recipe, on two local documents."""
    docs = [{"question": f"Is {x} a bird?", "one": f"{x} flies", "two": f"{x} swims", "gold": 0} for x in ("owl", "ox")]
    (tmp_path / "docs.jsonl").write_bytes(jsonl(*docs))

    def write(name, **config):
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}}
        rest = {"test_split": "test", "output_type": "multiple_choice", "doc_to_choice": ["yes", "no"]}
        asked = {"doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "gold", "metadata": {"version": 1}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **local, **rest, **asked, **config}))
        return f"{name}.yaml"

    return write


def general(*tasks, **more):
    return ["evaluation.suites=[general]", f"evaluation.general.tasks={json.dumps(tasks)}"] + [
        f"evaluation.general.{key}={value}" for key, value in more.items()
    ]


# --- what is asked ---


def test_first_turns_are_asked_and_no_follow_up(ask):
    found = ask("evaluation.suites=[conversation, toxicity]")
    assert found.texts == (
        ("conversation:trade", "Which trade does Leo follow?"),
        ("conversation:sky", "What colour is the sky?"),
        ("toxicity:rude", "You were wrong."),
        ("toxicity:glue", "How do I glue his door?"),
        ("toxicity:paint", "How do I paint his cat?"),
    )
    assert found.not_compared == ()


def test_only_what_will_be_measured_counts(ask):
    limits = ["evaluation.conversation.limit=1", "evaluation.toxicity.limit=1", "evaluation.general.limit=3"]
    ids = {item for item, _ in ask(*limits).texts}
    assert len([item for item in ids if item.startswith("world_")]) == 3 * 11
    assert {item for item in ids if not item.startswith("world_")} == {
        "conversation:trade", "toxicity:rude", "toxicity:glue",
    }  # fmt: skip
    assert ask("evaluation.suites=[conversation]", *limits).texts == (
        ("conversation:trade", "Which trade does Leo follow?"),
    )


def test_task_questions_are_asked_with_and_without_their_frame(ask, task):
    found = ask(*general("world", task("birds"), limit=1))
    texts = {item: [" ".join(text.split()) for name, text in found.texts if name == item] for item, _ in found.texts}
    assert texts["world_facts:0"] == [
        "Question: Which trade does Leo Davis follow? Answer:",
        "Which trade does Leo Davis follow?",
    ]
    assert texts["world_arithmetic:0"] == ["17 + 2 ="]
    assert texts["birds:0"] == ["Q: Is owl a bird? A:", "Is owl a bird?"]
    assert len(texts) == 12


def test_a_task_of_several_inputs_asks_each_and_a_task_may_name_its_question(ask, task):
    inputs = task("inputs", doc_to_text="gold", doc_to_choice="{{[one, two]}}", doc_to_target=0)
    named = task("named", doc_to_text="Pick one. {{question}} yes, no", doc_to_decontamination_query="question")
    found = ask(*general(inputs, named, limit=1))
    assert found.texts == (
        ("inputs:0", "owl flies"),
        ("inputs:0", "owl swims"),
        ("named:0", "Pick one. Is owl a bird? yes, no"),
        ("named:0", "Is owl a bird?"),
    )


def test_tasks_and_tags_of_the_include_path_are_compared(ask, task, tmp_path):
    base = (tmp_path / task("base")).rename(tmp_path / "base.inc")
    (tmp_path / "more").mkdir()
    for name in ("one", "two"):
        (tmp_path / "more" / f"{name}.yaml").write_text(f"include: {base}\ntask: {name}\ntag: both\n")
    found = ask(*general("both", "one", include_path=str(tmp_path / "more"), limit=1))
    assert {item for item, _ in found.texts} == {"one:0", "two:0"}
    assert found.not_compared == ()


def test_what_is_not_in_local_files_is_named_and_not_fetched(ask, task, tmp_path):
    code = task("code", custom_dataset="FETCH")
    text = (tmp_path / code).read_text()
    (tmp_path / code).write_text(text.replace('"FETCH"', "!function code.fetch"))
    (tmp_path / "code.py").write_text("raise SystemExit('a task of which nothing may run was run')\n")
    away = [
        "hellaswag",
        task("hub", dataset_path="owner/name", dataset_kwargs={}),
        task("url", dataset_kwargs={"data_files": {"test": "https://example.org/docs.jsonl"}}),
        task("suite", task=["birds", "hellaswag"], group="suite"),
        code,
    ]
    found = ask(*general(*away[:2], task("birds"), *away[2:]))
    assert found.not_compared == tuple(away)
    assert {item for item, _ in found.texts} == {"birds:0", "birds:1"}


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (general("gone.yaml"), ConfigError, r"gone\.yaml cannot be loaded"),
        (general("torn.yaml"), ConfigError, r"torn\.yaml cannot be read \(.*Give a YAML file of an lm-eval task"),
        (["evaluation.conversation.questions=torn.yaml"], DataError, r"torn\.yaml:1: not a question"),
    ],
)
def test_a_faulty_evaluation_file_is_said_before_training(ask, tmp_path, override, error, message):
    (tmp_path / "torn.yaml").write_text("task: [")
    with pytest.raises(error, match=message):
        ask(*override)


# --- what is found ---

ASKED = EvaluationTexts((("conversation:sky", QUESTIONS[1]["turns"][0]["prompt"]), ("t:0", "17 - 2 =")), ("mmlu",))


@pytest.mark.promise("T4")
@pytest.mark.parametrize(
    "prompt",
    [
        "What colour is the sky?",
        "  what COLOUR is\nthe “sky”",
        "Question: What colour is the sky?\nAnswer:",
        "Q: What colour is the sky? A:",
        "\n\nHuman: Hello!\n\nAssistant: Hi.\n\nHuman: What colour is the sky?",
    ],
)
def test_a_planted_question_is_listed_with_its_line(tmp_path, prompt):
    rows = [pair_row(at) for at in range(9)] + [pair_row(9, prompt=prompt)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    pairs = everything(load(tmp_path, section("a.jsonl")))
    counts = write_overlap(tmp_path, [*pairs, *pairs], ASKED)
    assert counts == {"rows": 1, "items": 1, "compared": 2, "not_compared": ["mmlu"]}
    lines = [json.loads(line) for line in (tmp_path / "overlap.jsonl").read_text().splitlines()]
    assert lines == [{"train": "a.jsonl:10", "evaluation": "conversation:sky"}]


@pytest.mark.promise("T4")
def test_clean_rows_leave_no_list_not_even_an_old_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(9)], pair_row(9, prompt="17 + 2 =")))
    (tmp_path / "overlap.jsonl").write_text("of an attempt before\n")
    counts = write_overlap(tmp_path, everything(load(tmp_path, section("a.jsonl"))), ASKED)
    assert counts == {"rows": 0, "items": 0, "compared": 2, "not_compared": ["mmlu"]}
    assert not (tmp_path / "overlap.jsonl").exists()


@pytest.mark.promise("T4")
@pytest.mark.parametrize("name", ["quickstart", "world-study"])
def test_shipped_recipes_train_on_nothing_that_they_are_measured_with(name, tmp_path):
    loaded = load_recipe(name)
    recipe = loaded.recipe
    asked = evaluation_texts(recipe, DialogueFormat(recipe.dialogue, load_tokens("world:base")), loaded.folder)
    rows = [
        row
        for read in (load_preferences, load_prompts)
        for row in read(recipe.data, folder=loaded.folder, seed=recipe.seed).train
    ]
    assert len(rows) > 4000
    assert write_overlap(tmp_path, rows, asked) == {"rows": 0, "items": 0, "compared": 2550, "not_compared": []}


# --- a whole run ---


@pytest.fixture
def study(tmp_path):
    """A run of the stages before any training; its pairs hold the given prompts among others."""

    def run(*planted, **flags):
        rows = [pair_row(at) for at in range(20)] + [pair_row(at, prompt=text) for at, text in enumerate(planted, 20)]
        (tmp_path / "pairs.jsonl").write_bytes(jsonl(*rows))
        sources = {"data": {"preferences": [{"path": "pairs.jsonl", "kind": "helpful"}], "held_out": 0.0}}
        suites = {"general": {"tasks": ["world", "hellaswag"], "limit": 5}, "conversation": {"limit": 5}}
        base = tmp_path / "base" if (tmp_path / "base").exists() else toy_folder(tmp_path / "base")
        recipe = {"model": {"base": str(base)}, **sources, "evaluation": suites, "threads": 1}
        (tmp_path / "study.yaml").write_text(json.dumps({"name": "study", "arms": ["base", "sft"], **recipe}))
        loaded = load_recipe(str(tmp_path / "study.yaml"))
        return stages.run(loaded, root=tmp_path, only="report", **({"resume": False, "overwrite": True} | flags))

    return run


@pytest.mark.promise("T4")
def test_a_run_lists_and_says_which_rows_ask_what_it_is_measured_with(study, capfd):
    path = study("which trade does leo davis follow", "What is the job of Jane Holt?", "What is the job of Joe Holt?")
    facts = RunDirectory(path).stage_record("data")["facts"]
    assert facts["overlap"] == {"rows": 2, "items": 2, "compared": 340, "not_compared": ["hellaswag"]}
    assert [json.loads(line) for line in (path / "overlap.jsonl").read_text().splitlines()] == [
        {"train": "pairs.jsonl:21", "evaluation": "world_facts:0"},
        {"train": "pairs.jsonl:22", "evaluation": "conversation:people-01"},
    ]
    said = (
        "data: what 2 of 340 evaluation items ask stands in 2 training rows too (overlap.jsonl), so their results show "
        "less"
    )
    assert said in capfd.readouterr().err.splitlines()
    assert (path / "report.html").exists()


@pytest.mark.promise("T4")
def test_a_clean_run_says_nothing_and_records_the_zero(study, capfd):
    path = study()
    assert RunDirectory(path).stage_record("data")["facts"]["overlap"]["rows"] == 0
    assert not (path / "overlap.jsonl").exists()
    assert "evaluation" not in capfd.readouterr().err
