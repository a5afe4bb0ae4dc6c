import pytest

from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.records import Item, Summary, count, read_items, write_items
from direct_rlhf.evaluate.statistics import summarise

SCORED = Item("t", "1", "scored", 1.0, output="a\u2028b", finish="eos", cluster="c", extra={"prompt": "p"})
UNPARSED = Item("t", "2", "unparsed", 0.0, reason="no_answer")
FAILED = Item("t", "3", "failed", None, reason="non_finite")


def test_items_survive_the_file(tmp_path):
    write_items(tmp_path / "x.jsonl", [SCORED, UNPARSED, FAILED])
    assert read_items(tmp_path / "x.jsonl") == [SCORED, UNPARSED, FAILED]


def test_a_damaged_line_is_named_with_its_number(tmp_path):
    write_items(tmp_path / "x.jsonl", [SCORED, UNPARSED])
    path = tmp_path / "x.jsonl"
    path.write_text(path.read_text() + '{"task": "t", "id"', encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl:3: not an evaluation item .*Delete the file to measure again"):
        read_items(path)


@pytest.mark.parametrize(
    ("status", "value", "reason"),
    [
        ("scored", None, ""),
        ("scored", float("nan"), ""),
        ("scored", float("inf"), ""),
        ("failed", 0.0, "x"),
        ("failed", None, ""),
    ],
)
def test_a_row_that_contradicts_its_status_cannot_be_made(status, value, reason):
    with pytest.raises(ValueError, match="item t/1"):
        Item("t", "1", status, value, reason=reason)


def test_counts_cover_every_item():
    counts = count([SCORED, UNPARSED, FAILED, FAILED])
    assert (counts.n_total, counts.n_scored, counts.n_unparsed, counts.n_failed, counts.n_valued) == (4, 1, 1, 2, 2)
    assert counts.reasons == {"no_answer": 1, "non_finite": 2}
    assert counts.coverage == 0.5


@pytest.mark.promise("J2")
def test_a_failed_item_is_no_zero_and_low_coverage_withholds_the_headline():
    summary = summarise([SCORED, FAILED], draws=100, seed=0)
    assert summary.mean == 1.0
    assert summary.headline(0.5) == 1.0
    assert summary.headline(0.95) is None


def test_the_mean_of_nothing_is_none():
    for items in ([], [FAILED]):
        summary = summarise(items, draws=100, seed=0)
        assert summary == Summary(None, None, None, None, count(items))
        assert summary.headline(0.0) is None
