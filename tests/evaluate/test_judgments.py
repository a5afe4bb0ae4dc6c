import pytest

from direct_rlhf.errors import DataError
from direct_rlhf.evaluate.judgments import NAME, Kept, spent


@pytest.mark.promise("J3")
def test_a_row_is_on_the_disk_when_put_returns(tmp_path):
    kept = Kept(tmp_path / "a" / NAME)
    kept.put("k1", {"reply": "one"})
    assert Kept(kept.path).get("k1") == {"key": "k1", "reply": "one"}
    assert kept.get("k2") is None
    kept.put("k2", {"reply": "two\u2028three"})
    assert len(Kept(kept.path)) == 2


@pytest.mark.promise("J3")
def test_a_line_that_a_crash_cut_is_left_out_and_written_again(tmp_path):
    kept = Kept(tmp_path / NAME)
    kept.put("k1", {"reply": "one"})
    kept.put("k2", {"reply": "two"})
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole[:-7])
    again = Kept(kept.path)
    assert (again.get("k1")["reply"], again.get("k2")) == ("one", None)
    again.put("k2", {"reply": "two"})
    assert kept.path.read_bytes() == whole


@pytest.mark.parametrize("line", ['{"reply": "x"}\n', "[1]\n", '{"key": 3}\n'])
def test_a_row_without_a_key_is_refused(tmp_path, line):
    (tmp_path / NAME).write_text(line)
    with pytest.raises(DataError, match="row 1 has no key"):
        Kept(tmp_path / NAME)


def test_what_a_run_has_spent_is_counted_over_all_its_files(tmp_path):
    for place, costs in (("base", [0.5, 0.25]), ("pairwise", [1.0])):
        for number, cost in enumerate(costs):
            Kept(tmp_path / place / NAME).put(f"k{number}", {"cost": cost})
    (tmp_path / "base" / "answers.jsonl").write_text('{"key": "x", "cost": 9}\n')
    assert spent(tmp_path) == (3, 1.75)
    assert spent(tmp_path / "nothing") == (0, 0.0)
