import json
from types import SimpleNamespace

import pytest

from direct_rlhf.evaluate import suite, suites
from direct_rlhf.evaluate.records import Item, read_items, write_items
from direct_rlhf.recipe.schema import Recipe


@pytest.fixture
def ctx(tmp_path, task_yaml, bars):
    """What a stage is given, on small own files."""
    (tmp_path / "questions.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": f"q{i}",
                    "category": "c",
                    "turns": [{"prompt": "What?", "rule": RULE}, {"prompt": "And?", "rule": RULE}],
                }
            )
            + "\n"
            for i in range(3)
        )
    )
    sets = ("provoking", "harmful", "harmless")
    (tmp_path / "toxicity.jsonl").write_text(
        "".join(
            json.dumps({"id": f"{name}{i}", "set": name, "prompt": "Hello?"}) + "\n" for name in sets for i in range(2)
        )
    )
    (tmp_path / "words.txt").write_text("idiot\n")
    recipe = Recipe.model_validate(
        {
            "evaluation": {
                "general": {"tasks": ["colours.yaml"]},
                "conversation": {"questions": "questions.jsonl"},
                "toxicity": {"prompts": "toxicity.jsonl", "bad_words": "words.txt", "classifier": "wordlist"},
                "max_new_tokens": 6,
                "bootstrap_draws": 200,
            }
        }
    )
    context = SimpleNamespace(
        recipe=recipe, run=SimpleNamespace(path=tmp_path / "run"), device="cpu", should_stop=lambda: False,
        check_stop=lambda: None, progress=bars, say=print,
    )  # fmt: skip
    context.arm = lambda arm, model: suite.evaluate_arm(context, arm, str(model), folder=tmp_path)
    return context


RULE = {"type": "answer", "accept": ["blue"], "reject": ["red"], "max_words": 20}


def test_an_arm_has_the_entry_that_results_json_promises_and_leaves_its_files(ctx, tiny_folder):
    entry = ctx.arm("base", tiny_folder)
    assert entry["model"] == str(tiny_folder)
    assert 0 <= entry["general"]["mean"] <= 1
    task = entry["general"]["tasks"]["colours"]
    assert (task["metric"], task["n_scored"], task["n_failed"]) == ("acc", 12, 0)
    assert task["value"] == entry["general"]["mean"]
    assert task["stderr"] > 0
    assert set(entry["conversation"]["by_turn"]) == {"1", "2"}
    assert 1 <= entry["conversation"]["score"] <= 10
    assert len(entry["conversation"]["ci"]) == 2
    for rate in ("bad_word_probability", "toxic_rate", "refusal_rate", "over_refusal_rate"):
        assert 0 <= entry["toxicity"][rate] <= 1
    assert (entry["toxicity"]["n_scored"], entry["toxicity"]["n_failed"]) == (6, 0)
    folder = ctx.run.path / "evaluation" / "base"
    assert sorted(path.name for path in folder.iterdir()) == [
        "conversation.json", "conversation.jsonl", "general.json", "general.jsonl", "toxicity.json", "toxicity.jsonl",
    ]  # fmt: skip
    assert len(read_items(folder / "general.jsonl")) == 12


def test_a_second_evaluation_measures_nothing_again(ctx, tiny_folder, monkeypatch):
    first = ctx.arm("base", tiny_folder)
    monkeypatch.setattr(suite, "SUITES", {})
    assert ctx.arm("base", tiny_folder) == first


def test_only_the_suite_whose_inputs_changed_is_measured_again(ctx, tiny_folder, monkeypatch, tmp_path):
    ctx.arm("base", tiny_folder)
    measured = []
    known = dict(suites.SUITES)
    monkeypatch.setattr(
        suite, "SUITES", {name: lambda s, name=name: measured.append(name) or known[name](s) for name in known}
    )
    (tmp_path / "words.txt").write_text("idiot\nmoron\n")
    ctx.arm("base", tiny_folder)
    assert measured == ["toxicity"]
    (tmp_path / "run/evaluation/base/conversation.jsonl").unlink()
    ctx.arm("base", tiny_folder)
    assert measured == ["toxicity", "conversation"]


def test_an_interrupted_suite_leaves_no_json_and_the_finished_ones_stay(ctx, tiny_folder, monkeypatch):
    def crash(subject):
        raise KeyboardInterrupt

    monkeypatch.setitem(suites.SUITES, "conversation", crash)
    with pytest.raises(KeyboardInterrupt):
        ctx.arm("base", tiny_folder)
    assert [path.name for path in sorted((ctx.run.path / "evaluation/base").glob("*.json"))] == ["general.json"]


@pytest.mark.promise("J8")
def test_a_model_compared_with_itself_differs_in_nothing(ctx, tiny_folder):
    for arm in ("base", "sft"):
        ctx.arm(arm, tiny_folder)
    rows = suite.compare(ctx, ["base", "sft"])
    assert [row["metric"] for row in rows] == [
        "general.mean", "general.colours", "conversation.score", "toxicity.toxic_rate", "toxicity.word_rate",
        "toxicity.refusal_rate", "toxicity.over_refusal_rate", "toxicity.bad_word_probability", "toxicity.first_word_probability",
    ]  # fmt: skip
    assert {row["verdict"] for row in rows} == {"no difference shown"}
    assert all(row["difference"] == 0 and row["ci"] == [0, 0] and row["arm"] == "sft" for row in rows)
    assert rows[1]["p_holm"] == 1.0
    assert json.loads((ctx.run.path / "evaluation/comparisons.json").read_text()) == rows


def write_general(ctx, arm, values):
    items = [Item(task, str(i), "scored", float(x)) for task, xs in values.items() for i, x in enumerate(xs)]
    items.append(Item("t1/loose", "0", "scored", 0.0))
    write_items(ctx.run.path / "evaluation" / arm / "general.jsonl", items)


def test_task_p_values_are_adjusted_together_and_other_filters_stay_out_of_the_mean(ctx):
    write_general(ctx, "base", {"t1": [0, 1] * 20, "t2": [0] * 40})
    write_general(ctx, "ppo", {"t1": [1, 1] * 20, "t2": [0] * 39 + [1]})
    rows = {row["metric"]: row for row in suite.compare(ctx, ["base", "ppo"])}
    assert set(rows) == {"general.mean", "general.t1", "general.t2"}
    assert rows["general.mean"]["difference"] == pytest.approx((0.5 + 1 / 40) / 2)
    assert rows["general.mean"]["n"] == 80
    assert rows["general.t1"]["p_holm"] == pytest.approx(2 * rows["general.t1"]["p"])
    assert rows["general.t1"]["verdict"] == "higher"
    assert "p_holm" not in rows["general.mean"]


def test_a_suite_below_coverage_has_no_headline_in_the_entry(ctx, tmp_path, tiny_folder):
    """Two of three questions do not fit the model."""
    path = tmp_path / "questions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:]:
        row["turns"][0]["prompt"] = "snow " * 300
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = ctx.arm("base", tiny_folder)
    assert entry["conversation"]["score"] is None
    assert (entry["conversation"]["n_scored"], entry["conversation"]["n_failed"]) == (2, 4)
    assert entry["conversation"]["reasons"] == {"prompt_too_long": 2, "turn_before_failed": 2}


def first_words(ctx):
    items = read_items(ctx.run.path / "evaluation/base/toxicity.jsonl")
    return [item for item in items if item.task == "first_word_probability"]


def changed(ctx, **fields):
    recipe = ctx.recipe.model_dump(mode="json")
    recipe["evaluation"]["toxicity"] |= fields
    ctx.recipe = Recipe.model_validate(recipe)


def test_toxicity_holds_the_lens_and_its_items_are_in_the_file_but_in_no_comparison(ctx, tiny_folder, tmp_path):
    (tmp_path / "words.txt").write_text("a\ni\n")  # short, so that a random model gives them mass
    entry = ctx.arm("base", tiny_folder)["toxicity"]
    for words in ("bad_words", "neutral_words"):
        points = entry["lens"][words]["by_point"]
        assert len(points) == 3
        assert all(point["ci"][0] <= point["value"] <= point["ci"][1] and point["n_scored"] == 2 for point in points)
    first, last = entry["first_word_probability"], entry["lens"]["bad_words"]["by_point"][-1]["value"]
    assert 0 < first <= last + 1e-7  # the lens follows rarer branches, and more of them
    assert last <= first + max(item.extra["missed"] for item in first_words(ctx)) + 1e-7
    assert entry["expected_max_toxicity"] is None
    assert entry["crows_pairs"] is None
    tasks = {item.task for item in read_items(ctx.run.path / "evaluation/base/toxicity.jsonl")}
    assert {"lens/bad_words", "lens/neutral_words"} <= tasks
    ctx.arm("sft", tiny_folder)
    assert not any("lens" in row["metric"] for row in suite.compare(ctx, ["base", "sft"]))


def test_a_lens_that_cannot_be_is_left_out_in_words_and_the_rest_is_measured(ctx, tiny_folder, monkeypatch):
    from direct_rlhf.errors import ConfigError
    from direct_rlhf.evaluate import lens

    def refuse(model):
        raise ConfigError("TinyModel: no final norm")

    monkeypatch.setattr(lens, "find_lens", refuse)
    entry = ctx.arm("base", tiny_folder)["toxicity"]
    assert entry["lens"] == {"left_out": "TinyModel: no final norm"}
    assert entry["n_scored"] == 6


def test_test_sets_sentence_pairs_and_k_are_measured_as_the_recipe_names_them(ctx, tiny_folder, tmp_path, monkeypatch):
    from direct_rlhf.evaluate import classifier

    monkeypatch.setattr(
        classifier, "_detoxify", lambda path, device: lambda texts: [0.4 + 0.2 * bool(t) for t in texts]
    )
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/harmful.csv").write_text("goal,target\nDo it,Sure\n")
    (tmp_path / "sets/xs.csv").write_text("id,prompt,type,label\n1,Why?,a,safe\n")
    (tmp_path / "sets/pairs.csv").write_text(
        ",sent_more,sent_less,bias_type\n0,The sky is blue.,Ann,age\n1,Ben,Who,age\n"
    )
    changed(
        ctx, prompts=["toxicity.jsonl", "sets/harmful.csv", "sets/xs.csv"], crows_pairs="sets/pairs.csv",
        classifier="detoxify", samples_per_prompt=2, k=2, lens=False,
    )  # fmt: skip
    entry = ctx.arm("base", tiny_folder)["toxicity"]
    assert entry["n_scored"] == 2 * 8
    assert (entry["counts"]["refusal_rate"]["n_total"], entry["counts"]["over_refusal_rate"]["n_total"]) == (6, 6)
    assert (entry["expected_max_toxicity"]["k"], entry["expected_max_toxicity"]["n_scored"]) == (2, 2)
    assert 0.4 <= entry["expected_max_toxicity"]["value"] <= 0.6 + 1e-9
    assert entry["classifier"] == "detoxify"
    assert entry["crows_pairs"]["by_type"]["age"]["n_scored"] == entry["crows_pairs"]["n_scored"] == 2
    assert entry["lens"] is None
    ctx.arm("sft", tiny_folder)
    metrics = [row["metric"] for row in suite.compare(ctx, ["base", "sft"])]
    assert {"toxicity.expected_max_toxicity", "toxicity.toxicity_probability", "toxicity.crows_pairs"} <= set(metrics)

    measured = []
    monkeypatch.setitem(suites.SUITES, "toxicity", lambda s: measured.append(1) or ({}, []))
    ctx.arm("base", tiny_folder)
    assert not measured
    for name in ("sets/xs.csv", "sets/pairs.csv"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "2,Why not,Who,safe\n")
        ctx.arm("base", tiny_folder)
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 3}, r"k \(3\) may not pass samples_per_prompt \(1\)"),
        ({"k": 1, "classifier": "wordlist"}, "k needs a classifier that gives scores"),
        ({"classifier": "guard"}, "classifier = guard needs classifier_path"),
        ({"prompts": []}, "name at least one file"),
    ],
)
def test_a_toxicity_section_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({"evaluation": {"toxicity": fields}})
