"""The field's 11 tests: from a local folder, in lm-eval's own shape, with nothing asked whose answer is shown."""

import shutil
from pathlib import Path

import pytest

from direct_rlhf.errors import ConfigError, DataError, Interrupted
from direct_rlhf.evaluate.general import Finished, GeneralTasks, evaluate_general
from direct_rlhf.evaluate.standard import local_files, standard_tests
from direct_rlhf.recipe.schema import GeneralSection
from small_sets import write_sets

REAL = Path(__file__).parents[3] / "shared" / "data"
# as counted in the files; of the one-split sets, less the worked examples
DOCUMENTS = {
    "mmlu": 14042, "agieval": 2201, "bbh": 6511, "gsm8k": 1319, "arc_challenge": 1172, "hellaswag": 990,
    "winogrande": 1262, "piqa": 1838, "boolq": 3270, "openbookqa": 500, "truthfulqa_mc2": 813,
}  # fmt: skip
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the folder of test sets, ../shared/data, is not here")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


def load(data, *entries, **fields):
    return GeneralTasks(GeneralSection(tasks=list(entries or ["standard"]), **fields), seed=0, folder=None, data=data)


def evaluate(model, tokens, bars, data, *entries, finished=None, should_stop=lambda: False, share=True, **fields):
    return evaluate_general(
        model, tokens, GeneralSection(tasks=list(entries or ["standard"]), **fields), batch_size=8, seed=0, draws=100,
        should_stop=should_stop, progress=bars, report=print, data=data, finished=finished, share=share,
    )  # fmt: skip


def prompts(test, n=3):
    """Task -> the whole prompt of its first documents."""
    return {
        name: [task.fewshot_context(task.task_docs[i], int(task.config.num_fewshot or 0)) for i in range(n)]
        for name, task in test.tasks.items()
    }


def test_the_list_names_eleven_tests_with_the_usual_number_of_examples():
    shots = {test.name: test.num_fewshot for test in standard_tests()}
    assert list(shots) == list(DOCUMENTS)
    assert shots == {
        **dict.fromkeys(DOCUMENTS, 0),
        "mmlu": 5,
        "bbh": 3,
        "gsm8k": 5,
        "arc_challenge": 25,
        "hellaswag": 10,
        "winogrande": 5,
    }


def test_every_name_on_the_list_is_a_task_or_group_of_lm_eval():
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent
    for test in standard_tests():
        folders = [str(shipped / name) for name in test.configs]
        index = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False).task_index
        for member in test.specification(None):  # as from the hub
            (key,) = {"task", "group"} & member.keys()
            assert index[member[key]].kind.name == key.upper()
            assert member["num_fewshot"] == test.num_fewshot


def test_every_document_has_lm_evals_own_prompt(sets):
    tests = load(sets).tests
    first = {name: next(iter(prompts(test, 1).values()))[0] for name, test in tests.items()}
    assert first["mmlu"].startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nIn anatomy dev, 0?\nA. p\n"
    )
    assert first["mmlu"].endswith("In anatomy test, 0?\nA. p\nB. q\nC. r\nD. s\nAnswer:")
    assert (
        first["agieval"]
        == "Passage 0. Q: Which is number 0? Answer Choices: (A)0 (B)1 (C)2 (D)3 (E)4\nA: Among A through E, the answer is"
    )
    assert first["gsm8k"].endswith("Question: Ann has 100 pens and buys 2. How many has she?\nAnswer:")
    assert first["gsm8k"].count("#### ") == 5
    assert first["bbh"].endswith("Q: is 0 odd\nA: Let's think step by step.\n")
    assert first["arc_challenge"].endswith("Question: What is 0?\nAnswer:")
    assert first["arc_challenge"].count("Question: Why is it ") == 25
    assert first["openbookqa"] == "A 0 is"
    assert first["hellaswag"].endswith("A man takes 10 steps. He")
    assert first["piqa"] == "Question: Open 0 doors\nAnswer:"
    assert first["boolq"] == "On numbers 0.\nQuestion: is 0 odd?\nAnswer:"
    assert first["truthfulqa_mc2"].endswith("\n\nQ: Can 0 fly?\nA:")
    truthful = tests["truthfulqa_mc2"].first
    # `Maybe` stands on both sides and on neither now
    assert truthful.doc_to_choice(truthful.task_docs[0]) == ["No", "It cannot", "Yes"]


def test_the_fixed_block_is_the_same_for_all_documents_and_shows_none_of_their_answers(sets):
    for test in load(sets).tests.values():
        for name, found in prompts(test).items():
            task = test.tasks[name]
            asked = [task.doc_to_text(task.task_docs[i]) for i in range(3)]
            if test.name == "winogrande":  # two contexts a document
                continue
            blocks = [prompt.removesuffix(str(text)) for prompt, text in zip(found, asked, strict=True)]
            assert len(set(blocks)) == 1, name
            assert not any(str(text).strip() in blocks[0] for text in asked), name


def test_examples_drawn_for_each_document_are_lm_evals_own_and_said_to_be(sets, model, tokens, bars):
    found = prompts(load(sets, "standard:gsm8k", fewshot="per-document").tests["gsm8k"])["gsm8k"]
    assert len({prompt.rpartition("Question: ")[0] for prompt in found}) == 3
    for fewshot in ("fixed", "per-document"):
        results, _ = evaluate(
            model,
            tokens,
            bars,
            sets,
            "standard:piqa",
            "standard:arc_challenge",
            fewshot=fewshot,
            limit=2,
            num_fewshot=1,
        )
        assert results["arc_challenge"].fewshot == fewshot
        assert results["piqa"].fewshot == "none"


def test_more_examples_than_there_are_is_an_error(sets):
    with pytest.raises(ConfigError, match=r"hellaswag has 10 worked examples here, and 11 are asked for"):
        load(sets, "standard:hellaswag", num_fewshot=11)


def test_a_test_that_is_not_there_or_not_on_the_list_is_named(sets, tmp_path):
    shutil.copytree(sets / "piqa", tmp_path / "piqa")
    assert list(load(tmp_path, "standard:piqa").tests) == ["piqa"]
    with pytest.raises(DataError, match=r"mmlu: this test's folder is not there"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"standard:pica: no such test. The list has: mmlu, agieval"):
        load(sets, "standard:pica")
    (tmp_path / "piqa" / "piqa_validation.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"holds none of piqa_validation.jsonl"):
        load(tmp_path, "standard:piqa")


def test_a_limit_takes_documents_from_all_parts_in_turn(sets, model, tokens, bars):
    results, items = evaluate(model, tokens, bars, sets, "standard:mmlu", limit=4, num_fewshot=1)
    assert [item.id.partition("-")[0] for item in items] == ["anatomy/0", "anatomy/1", "astronomy/0", "virology/0"]
    assert {item.task for item in items} == {"mmlu"}
    found = results["mmlu"]
    assert found.summary.counts.n_total == 4
    assert {part: summary.counts.n_total for part, summary in found.parts.items()} == {
        "anatomy": 2,
        "astronomy": 1,
        "virology": 1,
    }
    assert found.summary.mean == pytest.approx(sum(item.value for item in items) / 4)
    assert load(sets, "standard:mmlu").tests["mmlu"].documents(1000) == {
        f"mmlu_{s}": 14 for s in ("anatomy", "astronomy", "virology")
    }


def test_repeated_passages_are_the_unit_of_resampling(sets, model, tokens, bars):
    _, items = evaluate(model, tokens, bars, sets, "standard:boolq", limit=4)
    assert items[0].unit == items[1].unit != items[2].unit == items[3].unit


def test_prompts_cut_by_the_context_length_and_lowered_caps_are_counted(sets, model, tokens, bars):
    results, items = evaluate(model, tokens, bars, sets, "standard:bbh", "standard:piqa", limit=2)
    assert results["bbh"].notes == {"boundary_merges": 0, "truncated": 2, "capped": 2}  # 256 positions
    assert results["piqa"].notes["truncated"] == results["piqa"].notes["capped"] == 0
    assert all(item.finish in ("eos", "stop", "length") for item in items if item.task == "bbh")


def test_tests_that_are_done_are_not_measured_again(sets, model, tokens, bars, tmp_path):
    entries = ("standard:piqa", "standard:openbookqa", "standard:boolq")
    whole, expected = evaluate(model, tokens, bars, sets, *entries, limit=3)
    finished, bars.done = Finished(tmp_path, "print"), 0
    with pytest.raises(Interrupted):  # each document has two or three requests
        evaluate(model, tokens, bars, sets, *entries, limit=3, finished=finished, should_stop=lambda: bars.done >= 10)
    assert {path.name for path in tmp_path.iterdir()} == {"piqa.json"}
    bars.done = 0
    results, items = evaluate(model, tokens, bars, sets, *entries, limit=3, finished=finished)
    assert bars.done == 3 * (3 + 2)
    assert (results, items) == (whole, expected)
    bars.done = 0
    evaluate(model, tokens, bars, sets, *entries, limit=3, finished=Finished(tmp_path, "of another model"))
    assert bars.done == 3 * (2 + 3 + 2)


@pytest.mark.parametrize("entry", ["arc_challenge", "winogrande", "mmlu", "truthfulqa_mc2"])
def test_results_equal_lm_evals_on_the_same_model(sets, entry, model, tokens, bars, tiny_folder):
    check_against_lm_eval(sets, entry, model, tokens, bars, tiny_folder, limit=6)


@needs_real
@pytest.mark.parametrize("entry", ["boolq", "hellaswag", "agieval"])
def test_results_equal_lm_evals_on_the_real_sets(entry, model, tokens, bars, tiny_folder):
    check_against_lm_eval(REAL, entry, model, tokens, bars, tiny_folder, limit=5)


def check_against_lm_eval(data, entry, model, tokens, bars, tiny_folder, limit):
    from lm_eval.evaluator import evaluate as lm_evals
    from lm_eval.models.huggingface import HFLM

    _, items = evaluate(model, tokens, bars, data, f"standard:{entry}", limit=limit, num_fewshot=2)
    test = load(data, f"standard:{entry}", num_fewshot=2).tests[entry]
    asked = {name: n for name, n in test.documents(limit).items() if n}
    lm = HFLM(pretrained=str(tiny_folder), device="cpu", batch_size=3, dtype="float32")
    output = lm_evals(
        lm, {"tasks": {name: test.tasks[name] for name in asked}}, samples={name: list(range(n)) for name, n in asked.items()},
        bootstrap_iters=0,
    )  # fmt: skip
    rows = [row for name in asked for row in sorted(output["samples"][name], key=lambda row: row["doc_id"])]
    mine = [item for item in items if item.task == entry]
    theirs = [row for row in rows if row["filter"] == rows[0]["filter"]]
    assert [item.value for item in mine] == pytest.approx([row[test.metric] for row in theirs], abs=1e-5)
    for item, row in zip(mine, theirs, strict=True):
        if "logprobs" in item.extra:
            assert item.extra["logprobs"] == pytest.approx([pair[0] for (pair,) in row["resps"]], abs=1e-3, rel=1e-5)


@needs_real
def test_all_documents_of_the_real_sets_are_there():
    tests = load(REAL).tests
    assert {name: sum(test.documents(None).values()) for name, test in tests.items()} == DOCUMENTS
    assert len(tests["mmlu"].tasks), len(tests["bbh"].tasks) == (57, 27)
    assert {path.parent.name for path in local_files(REAL)} == {test.folder for test in standard_tests()}


@needs_real
def test_all_eleven_run_offline_on_a_random_llama(model, tokens, bars):
    results, _items = evaluate(model, tokens, bars, REAL, limit=2)
    assert list(results) == list(DOCUMENTS)
    assert all(found.summary.counts.n_total == 2 for found in results.values())
    assert all(found.summary.mean is not None for found in results.values())
    assert list(results["gsm8k"].other_filters) == ["flexible-extract"]
