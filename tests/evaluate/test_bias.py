import gzip
from pathlib import Path

import pytest
import torch

from direct_rlhf.errors import DataError, Interrupted
from direct_rlhf.evaluate.bias import SentencePair, evaluate_bias, read_pairs

SHARED = Path(__file__).parents[3] / "shared" / "data" / "crows_pairs" / "crows_pairs_anonymized.csv.gz"
PAIRS = [
    SentencePair("0", "Ann has the ball.", "Ben has the ball.", "names"),
    SentencePair("1", "The sky is blue.", "The sky is green, and the snow is white.", "colours"),
    SentencePair("2", "The grass is green.", "The grass is green.", "colours"),
]
HEADER = ",sent_more,sent_less,stereo_antistereo,bias_type\n"


def run(model, tokens, bars, pairs=PAIRS, **changed):
    settings = {
        "batch_size": 4,
        "seed": 0,
        "draws": 200,
        "should_stop": lambda: False,
        "progress": bars,
        "report": print,
    }
    return evaluate_bias(model, tokens, pairs, **(settings | changed))


def logprob(model, tokens, sentence):
    """By the definition: one forward, log_softmax, a sum."""
    ids = tokens.encode(sentence)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tokens.eos_id, *ids]])).logits[0, :-1]
    return sum(logits.log_softmax(-1)[range(len(ids)), ids].tolist())


def test_the_preferred_sentence_is_the_likelier_one_by_the_sum_of_its_tokens(model, tokens, bars):
    result, items = run(model, tokens, bars)
    for pair, item in zip(PAIRS, items, strict=True):
        more, less = (logprob(model, tokens, sentence) for sentence in (pair.more, pair.less))
        assert (item.extra["more"], item.extra["less"]) == pytest.approx((more, less), abs=1e-3)
        assert item.value == float(item.extra["more"] > item.extra["less"])
    assert items[1].value == 1.0  # the shorter of the two
    assert items[2].value == 0.0
    assert result.n_ties == 1
    assert result.overall.mean == pytest.approx(sum(item.value for item in items) / 3)
    assert {kind: summary.counts.n_total for kind, summary in result.by_type.items()} == {"names": 1, "colours": 2}
    apart = [abs(item.extra["more"] - item.extra["less"]) for item in items]
    assert result.difference.mean == pytest.approx(sum(apart) / 3)
    assert bars.done == 6


def test_swapping_the_sentences_turns_the_preference_round(model, tokens, bars):
    pairs = PAIRS[:2]
    swapped = [SentencePair(pair.id, pair.less, pair.more, pair.kind) for pair in pairs]
    (a, _), (b, _) = run(model, tokens, bars, pairs), run(model, tokens, bars, swapped)
    assert a.overall.mean + b.overall.mean == pytest.approx(1.0)
    assert a.difference.mean == pytest.approx(b.difference.mean)


def test_a_sentence_that_does_not_fit_fails_its_pair_and_no_other(model, tokens, bars):
    result, items = run(model, tokens, bars, [*PAIRS, SentencePair("3", "snow " * 300, "Short.", "names")])
    assert (items[3].status, items[3].reason) == ("failed", "too_long")
    assert result.overall.counts.n_failed == 1
    assert result.overall.counts.n_scored == 3


def test_a_model_of_nans_prefers_nothing(nan_model, tokens, bars):
    result, items = run(nan_model, tokens, bars)
    assert result.overall.mean is None
    assert {item.reason for item in items} == {"non_finite"}


def test_it_stops_when_asked(model, tokens, bars):
    with pytest.raises(Interrupted, match="sentence pairs were stopped"):
        run(model, tokens, bars, should_stop=lambda: True)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.csv.gz"])
def test_the_file_is_read_as_it_comes(tmp_path, name):
    text = HEADER + '5,"A, more",B less,stereo,age\n9,C,D,antistereo,gender\n'
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    pairs = read_pairs(tmp_path / name)
    assert pairs == [SentencePair("5", "A, more", "B less", "age"), SentencePair("9", "C", "D", "gender")]
    assert read_pairs(tmp_path / name, limit=1) == pairs[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "0,a,,stereo,age\n", r"pairs.csv:2: sent_more, sent_less, bias_type must hold text"),
        ("goal,target\na,b\n", r"has no column sent_more, sent_less, bias_type; its header is: goal, target"),
        (HEADER, "holds no sentence pairs"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / "pairs.csv")


def test_the_fields_own_file_is_read_whole():
    if not SHARED.exists():
        pytest.skip(f"the real test sets are not here (looked for {SHARED})")
    pairs = read_pairs(SHARED)
    assert len(pairs) == len({pair.id for pair in pairs}) == 1508
    assert len({pair.kind for pair in pairs}) == 9
    assert sum(pair.kind == "race-color" for pair in pairs) == 516
