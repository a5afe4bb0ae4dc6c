import json
import math
import sys

import pytest
import torch

from direct_rlhf.errors import ConfigError, Interrupted
from direct_rlhf.evaluate.backend import LanguageModelBackend, generation_settings
from direct_rlhf.evaluate.general import evaluate_general
from direct_rlhf.models.memory import ChunkSize
from direct_rlhf.recipe.schema import GeneralSection


def run(model, tokens, bars, *tasks, should_stop=lambda: False, batch_size=4, report=print, share=True, **fields):
    section = GeneralSection(tasks=[str(task) for task in tasks], **fields)
    return evaluate_general(
        model, tokens, section, batch_size=batch_size, seed=0, draws=200, should_stop=should_stop, progress=bars,
        report=report, share=share,
    )  # fmt: skip


@pytest.fixture
def reference(tiny_folder, task_yaml):
    """lm-eval's own Hugging Face backend on the same model and task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    lm = HFLM(pretrained=str(tiny_folder), device="cpu", batch_size=3, dtype="float32")
    return simple_evaluate(model=lm, tasks=[str(task_yaml)], task_manager=manager, bootstrap_iters=0)


def test_numbers_equal_those_of_lm_evals_own_backend(model, tokens, task_yaml, bars, reference):
    results, items = run(model, tokens, bars, task_yaml)
    assert results["colours"].metric == "acc"
    assert results["colours"].summary.mean == pytest.approx(reference["results"]["colours"]["acc,none"], abs=1e-9)
    samples = sorted(reference["samples"]["colours"], key=lambda row: row["doc_id"])
    assert len(items) == len(samples) == 12
    assert results["colours"].notes == {"boundary_merges": 0, "truncated": 0, "capped": 0}
    for item, sample in zip(items, samples, strict=True):
        assert item.id.startswith(f"{sample['doc_id']}-")
        assert item.value == sample["acc"]
        assert item.extra["logprobs"] == pytest.approx([pair[0] for pair in sample["filtered_resps"]], abs=1e-4)


@pytest.mark.promise("J10")
def test_sharing_and_batch_size_change_no_result(model, tokens, task_yaml, bars):
    plain, slow = run(model, tokens, bars, task_yaml, batch_size=1, share=False)
    shared, fast = run(model, tokens, bars, task_yaml, batch_size=64, share=True)
    assert [item.value for item in slow] == [item.value for item in fast]
    assert shared["colours"].summary == plain["colours"].summary


def test_every_document_has_its_passage_as_the_unit_of_resampling(model, tokens, task_yaml, bars):
    _, items = run(model, tokens, bars, task_yaml)
    assert len({item.unit for item in items}) == 6
    assert items[0].unit == items[1].unit != items[2].unit


def test_a_model_of_nans_gives_failed_items_and_no_number(nan_model, tokens, task_yaml, bars):
    results, items = run(nan_model, tokens, bars, task_yaml)
    summary = results["colours"].summary
    assert (summary.mean, summary.low, summary.stderr) == (None, None, None)
    assert summary.counts.reasons == {"non_finite": 12}
    assert all(item.value is None and item.extra["logprobs"] == [None] * len(item.extra["logprobs"]) for item in items)


def test_a_gold_answer_that_is_no_choice_fails_instead_of_counting_as_wrong(model, tokens, task_yaml, bars):
    docs = task_yaml.with_name("docs.jsonl")
    rows = [json.loads(line) for line in docs.read_text().splitlines()]
    rows[3]["label"] = 7
    docs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, items = run(model, tokens, bars, task_yaml)
    assert (items[3].status, items[3].reason) == ("failed", "gold_is_no_choice")
    assert results["colours"].summary.counts.n_scored == 11


def test_limit_and_progress_cover_every_request(model, tokens, task_yaml, bars, capfd):
    _, items = run(model, tokens, bars, task_yaml, limit=5)
    assert len(items) == 5
    assert bars.done == sum(2 + i % 3 for i in range(5))
    assert capfd.readouterr() == ("", "")  # neither lm-eval nor datasets wrote to the terminal
    assert sys.stderr is not None


def test_a_request_to_stop_is_heard(model, tokens, task_yaml, bars):
    with pytest.raises(Interrupted, match="general tasks were stopped on request"):
        run(model, tokens, bars, task_yaml, should_stop=lambda: True)


def test_an_unknown_task_is_named(model, tokens, bars, tmp_path):
    with pytest.raises(
        ConfigError, match=r"evaluation.general.tasks: .*absent.yaml cannot be loaded .* `lm-eval ls tasks`"
    ):
        run(model, tokens, bars, tmp_path / "absent.yaml")


def test_a_metric_without_values_per_document_is_refused(model, tokens, task_yaml, bars):
    task_yaml.write_text(
        task_yaml.read_text().replace("metric: acc, aggregation: mean", "metric: mcc, aggregation: matthews_corrcoef")
    )
    with pytest.raises(ConfigError, match=r"colours: its metric mcc has no value per document"):
        run(model, tokens, bars, task_yaml)


def test_shots_are_drawn_by_the_seed_and_recorded(model, tokens, task_yaml, bars):
    first, again = (run(model, tokens, bars, task_yaml, num_fewshot=2) for _ in range(2))
    none = run(model, tokens, bars, task_yaml)
    assert first[0]["colours"].num_fewshot == 2
    assert none[0]["colours"].num_fewshot == 0
    logprobs = [[item.extra["logprobs"] for item in found[1]] for found in (first, again, none)]
    assert logprobs[0] == logprobs[1] != logprobs[2]


def test_generated_answers_equal_those_of_lm_evals_own_backend(model, tokens, generation_yaml, bars, tiny_folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    _, items = run(model, tokens, bars, generation_yaml)
    lm = HFLM(pretrained=str(tiny_folder), device="cpu", batch_size=3, dtype="float32")
    reference = simple_evaluate(
        model=lm, tasks=[str(generation_yaml)], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    expected = {row["doc_id"]: row["resps"][0][0] for row in reference["samples"]["free"]}
    mine = {int(item.id.split("-")[0]): item.output for item in items if item.task == "free"}
    cut = lambda text: text.rstrip("\ufffd")  # our sampler drops the bytes of a character that the cap cut in two
    assert {i: cut(text) for i, text in mine.items()} == {i: cut(text) for i, text in expected.items()}
    assert all(item.finish in ("eos", "stop", "length") for item in items)


def test_answers_that_match_no_pattern_are_unparsed_and_wrong_by_convention(model, tokens, generation_yaml, bars):
    results, items = run(model, tokens, bars, generation_yaml)
    strict = [item for item in items if item.task == "free"]
    assert {(item.status, item.value, item.reason) for item in strict} == {("unparsed", 0.0, "no_answer")}
    assert results["free"].summary.counts.n_unparsed == 12
    assert results["free"].summary.mean == 0.0
    assert list(results["free"].other_filters) == ["loose"]
    assert {item.task for item in items} == {"free", "free/loose"}


def test_a_model_of_nans_generates_failed_items(nan_model, tokens, generation_yaml, bars):
    results, _ = run(nan_model, tokens, bars, generation_yaml)
    assert results["free"].summary.mean is None
    assert results["free"].summary.counts.reasons == {"non_finite": 12}


def test_generation_settings_that_would_be_ignored_are_refused():
    ok = generation_settings(
        {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7, "top_p": 1.0}, "t"
    )
    assert (ok.until, ok.max_new_tokens, ok.temperature) == (("\n",), 8, 0.0)
    assert generation_settings({"until": "x", "do_sample": True}, "t").temperature == 1.0
    assert generation_settings({"temperature": 0.5}, "t").temperature == 0.5
    with pytest.raises(ConfigError, match=r"task t: generation_kwargs top_k, top_p are not known here"):
        generation_settings({"top_p": 0.9, "top_k": 40}, "t")


def test_rolling_log_likelihood_scores_every_token_once(model, tokens, bars):
    from lm_eval.api.instance import Instance

    text = "The grass is green, and the snow is white. " * 20  # longer than the model's positions
    backend = LanguageModelBackend(model, tokens, batch=ChunkSize("test", 4), seed=0)
    (found,) = backend.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))])
    ids, limit = tokens.encode(text), 256
    assert len(ids) > limit
    with torch.no_grad():

        def logprobs(context):
            return model(input_ids=torch.tensor([context])).logits[0].log_softmax(-1)

        first = logprobs([tokens.eos_id, *ids[: limit - 1]])
        total = sum(first[i, ids[i]].item() for i in range(limit))
        rest = ids[limit:]
        last = logprobs(ids[len(ids) - limit - 1 : -1])
        total += sum(last[limit - len(rest) + i, token].item() for i, token in enumerate(rest))
    assert found == pytest.approx(total, rel=1e-4)


def test_contexts_that_are_too_long_lose_their_left_end(model, tokens):
    backend = LanguageModelBackend(model, tokens, batch=ChunkSize("test", 4), seed=0)
    long, short = list(range(2, 300)), list(range(300 - 254, 300))
    scores = backend._loglikelihood_tokens([(("", ""), long, [5, 6, 7]), (("", ""), short, [5, 6, 7])])
    assert scores[0] == pytest.approx(scores[1])
    assert math.isfinite(scores[0][0])
