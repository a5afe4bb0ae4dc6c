import json
import sys

import pytest

from direct_rlhf.data.dialogue import DialogueFormat
from direct_rlhf.errors import ConfigError, DataError
from direct_rlhf.evaluate import toxicity
from direct_rlhf.evaluate.classifier import load_classifier
from direct_rlhf.evaluate.generate import Answer
from direct_rlhf.evaluate.toxicity import RATES, evaluate_toxicity, read_prompts
from direct_rlhf.recipe.schema import DialogueSection

WORDS = ["idiot", "moron"]
ANSWERS = {  # by prompt id
    "p1": Answer(" You idiot.", (273,), "eos"),
    "p2": Answer(" It is blue.", (274,), "eos"),
    "p3": Answer(" Idiots think so, and so on and so", (275,), "length"),
    "h1": Answer(" I cannot help with that.", (276,), "stop"),
    "h2": Answer(" First, wait until dark.", (277,), "eos"),
    "s1": Answer(" I cannot help with that.", (278,), "eos"),
    "s2": Answer("", (1,), "eos"),
    "s3": Answer(failure="non_finite"),
}
SETS = {"p": "provoking", "h": "harmful", "s": "harmless"}


@pytest.fixture
def form(tokens):
    return DialogueFormat(DialogueSection(), tokens)


@pytest.fixture
def prompts(tmp_path, form):
    path = tmp_path / "toxicity.jsonl"
    rows = [
        {"id": name, "set": SETS[name[0]], "prompt": [{"role": "user", "content": f"Question {name}?"}]}
        for name in ANSWERS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(path, form)


def run(model, form, prompts, bars, scorer=None, **changed):
    settings = {
        "samples_per_prompt": 1, "max_new_tokens": 8, "temperature": 1.0, "batch_size": 4, "seed": 0, "draws": 200,
        "should_stop": lambda: False, "report": print,
    }  # fmt: skip
    return evaluate_toxicity(model, form, prompts, WORDS, scorer, progress=bars, **{**settings, **changed})


@pytest.fixture
def known_answers(monkeypatch):
    monkeypatch.setattr(toxicity, "generate", lambda model, tokens, asks, **_: [ANSWERS[ask.id] for ask in asks])


def test_rates_of_known_answers_are_what_a_reader_would_count(model, form, prompts, bars, known_answers):
    scores = iter([0.9, 0.1, 0.6, 0.0, 0.2, 0.0, 0.0, 0.0])
    result, items = run(model, form, prompts, bars, scorer=lambda texts: [next(scores) for _ in texts])
    rates = {name: summary.mean for name, summary in result.rates.items()}
    assert rates["toxic_rate"] == pytest.approx(2 / 7)  # the failed answer is in no rate
    assert rates["word_rate"] == pytest.approx(1 / 7)  # "Idiots" is another word
    assert rates["refusal_rate"] == 0.5
    assert rates["over_refusal_rate"] == 0.5
    assert result.rates["over_refusal_rate"].counts.reasons == {"non_finite": 1}
    assert result.outcomes["provoking"]["unfinished"] == 1
    assert result.outcomes["harmless"] == {
        "comply": 0,
        "partial": 0,
        "refuse": 1,
        "empty": 1,
        "unfinished": 0,
        "unparsed": 0,
    }
    assert {item.task for item in items} == {*RATES, "first_word_probability"}
    assert all(item.value >= 0 for item in items if item.task == "bad_word_probability")
    assert [item.extra["score"] for item in items if item.task == "toxic_rate"][:2] == [0.9, 0.1]


def test_without_a_classifier_the_word_list_decides(model, form, prompts, bars, known_answers):
    result, _ = run(model, form, prompts, bars)
    assert result.rates["toxic_rate"] == result.rates["word_rate"]


def test_a_score_that_could_not_be_had_is_a_failed_item_and_never_a_clean_answer(
    model, form, prompts, bars, known_answers
):
    scores = {" You idiot.": None, " It is blue.": float("nan")}
    result, items = run(model, form, prompts, bars, scorer=lambda texts: [scores.get(text, 0.9) for text in texts])
    counts = result.rates["toxic_rate"].counts
    assert counts.reasons == {"no_score": 2, "non_finite": 1}
    assert result.rates["toxic_rate"].mean == 1.0
    assert result.rates["word_rate"].counts.n_failed == 1  # the word list needs no classifier
    failed = next(item for item in items if (item.task, item.id) == ("toxic_rate", "p1#0"))
    assert (failed.status, failed.output, failed.extra["score"]) == ("failed", " You idiot.", None)


def test_failed_answers_are_not_sent_to_the_classifier(model, form, prompts, bars, known_answers):
    sent = []
    run(model, form, prompts, bars, scorer=lambda texts: sent.extend(texts) or [0.1] * len(texts))
    assert len(sent) == len(ANSWERS) - 1


def test_a_scorer_of_dialogues_is_given_the_prompt_with_the_answer(model, form, prompts, bars, known_answers):
    class Guard:
        def of_dialogues(self, asked):
            self.asked = asked
            return [0.9 if "p1" in turns[-1].text else 0.1 for turns, _ in asked]

    guard = Guard()
    result, _ = run(model, form, prompts, bars, scorer=guard)
    assert (guard.asked[0][0][0].text, guard.asked[0][1]) == ("Question p1?", " You idiot.")
    assert result.rates["toxic_rate"].mean == pytest.approx(1 / 7)


def test_the_worst_of_k_is_estimated_from_all_samples_of_each_provoking_prompt(model, form, prompts, bars, monkeypatch):
    """p1 scores 0.1, 0.2, 0.9: maxima of two are 0.2, 0.9, 0.9. p2 has one score only, p3 is clean."""
    by_prompt = {"p1": [0.1, 0.2, 0.9], "p2": [0.8, None, None], "p3": [0.0, 0.0, 0.0]}
    monkeypatch.setattr(
        toxicity,
        "generate",
        lambda model, tokens, asks, **_: [Answer(f"{ask.id} {ask.index}", (273,), "eos") for ask in asks],
    )

    def scorer(texts):
        return [by_prompt.get(name, [0.5] * 3)[int(index)] for name, index in map(str.split, texts)]

    result, items = run(model, form, prompts, bars, scorer=scorer, samples_per_prompt=3, k=2)
    found = {(item.task, item.id): item for item in items if item.task in toxicity.OF_K}
    assert {prompt for _, prompt in found} == {"p1", "p2", "p3"}
    assert found["expected_max_toxicity", "p1"].value == pytest.approx(2.0 / 3)
    assert found["toxicity_probability", "p1"].value == pytest.approx(2 / 3)
    assert found["expected_max_toxicity", "p2"].reason == "too_few_scores"
    assert found["expected_max_toxicity", "p1"].extra == {"k": 2, "n": 3}
    assert result.rates["expected_max_toxicity"].mean == pytest.approx(1 / 3)
    assert result.rates["toxicity_probability"].mean == pytest.approx(1 / 3)
    assert result.rates["toxicity_probability"].counts.n_failed == 1


def test_without_k_or_without_scores_no_worst_of_k_is_claimed(model, form, prompts, bars, known_answers):
    assert not set(toxicity.OF_K) & set(run(model, form, prompts, bars, k=1)[0].rates)
    assert not set(toxicity.OF_K) & set(run(model, form, prompts, bars, scorer=lambda t: [0.1] * len(t))[0].rates)


def test_samples_of_a_prompt_are_one_unit_and_differ(model, form, prompts, bars):
    _, items = run(model, form, prompts, bars, samples_per_prompt=3)
    toxic = [item for item in items if item.task == "toxic_rate"]
    assert len(toxic) == 3 * len(prompts)
    assert {item.id for item in toxic if item.unit == "p1"} == {"p1#0", "p1#1", "p1#2"}
    assert len({item.output for item in toxic if item.unit == "p1"}) == 3
    assert len([item for item in items if item.task == "first_word_probability"]) == 3  # prompts, not samples


def test_a_model_of_nans_gives_failed_items_and_no_rate(nan_model, form, prompts, bars):
    result, items = run(nan_model, form, prompts, bars)
    assert all(summary.mean is None for summary in result.rates.values())
    assert {item.status for item in items} == {"failed"}
    assert result.missed is None


def test_auto_takes_the_classifier_and_falls_back_to_the_word_list(monkeypatch):
    pytest.importorskip("profanity_check")
    name, scorer = load_classifier("auto")
    assert name == "profanity-check"
    rude, kind = scorer(["You stupid idiot.", "The sky is blue."])
    assert rude > 0.5 > kind
    assert load_classifier("wordlist") == ("wordlist", None)
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    assert load_classifier("auto") == ("wordlist", None)
    with pytest.raises(
        ConfigError, match=r"profanity-check: it is not installed. Install direct-rlhf\[toxicity\], or set"
    ):
        load_classifier("profanity-check")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"id": "a", "set": "provoking", "prompt": []}, "the prompt has no human turn"),
        ({"id": "a", "set": "rude", "prompt": "Hello?"}, "its set must be one of provoking, harmful, harmless"),
        ({"set": "harmful", "prompt": "Hello?"}, "it needs an id"),
        ({"id": "p1", "set": "harmful", "prompt": "Hello?"}, "it needs an id, a text that no other row has"),
    ],
)
def test_a_prompt_that_is_none_is_named_with_its_line(tmp_path, form, row, text):
    path = tmp_path / "toxicity.jsonl"
    good = {"id": "p1", "set": "provoking", "prompt": "Hello?"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"toxicity.jsonl:2: not a toxicity prompt \({text}"):
        read_prompts(path, form)


def test_a_limit_takes_the_first_prompts_of_each_set(tmp_path, form):
    path = tmp_path / "toxicity.jsonl"
    rows = [
        {"id": f"{name}{i}", "set": name, "prompt": "Hello?"} for i in range(3) for name in ("provoking", "harmful")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.id for prompt in read_prompts(path, form, limit=2)] == [
        "provoking0",
        "harmful0",
        "provoking1",
        "harmful1",
    ]
