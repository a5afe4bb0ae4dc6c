import json
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_rlhf.errors import ConfigError, DataError, DirectRLHFError
from direct_rlhf.run.atomic import (
    append_jsonl,
    finite,
    read_json,
    read_jsonl,
    safe_name,
    write_atomic,
    write_json,
    write_jsonl,
)
from faults import FaultyFS, every_call


@pytest.mark.parametrize("fault", ["crash", "short"])
def test_after_a_crash_at_any_call_a_file_holds_all_of_the_old_or_all_of_the_new(tmp_path, fault):
    path = tmp_path / "status.json"
    seen = set()
    write_atomic(path, "old" * 100)
    for k in range(every_call(lambda: write_atomic(tmp_path / "other", "x"))):
        write_atomic(path, "old" * 100)
        with FaultyFS(at=k, fault=fault):
            write_atomic(path, "new" * 100)
        seen.add(path.read_text())
    assert seen == {"old" * 100, "new" * 100}


@pytest.mark.promise("R1")
@pytest.mark.parametrize("fault", ["full", "filling"])
def test_a_full_disk_names_needed_and_free_bytes_and_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "report.html"
    write_atomic(path, "old")
    calls = every_call(lambda: write_atomic(path, "old"))
    left = set()
    for k in range(1, calls):  # call 0 finds the folder there
        with (
            FaultyFS(at=k, fault=fault),
            pytest.raises(DirectRLHFError, match=r"report.html: .*300 bytes needed, \d+ free.*intact"),
        ):
            write_atomic(path, "new" * 100)
        left.add(path.read_text())
        assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
        write_atomic(path, "old")
    assert left == {"old", "new" * 100}  # the last call is the sync after the rename


@pytest.mark.promise("R1")
@pytest.mark.parametrize("fault", ["full", "filling"])
def test_a_full_disk_while_appending_names_the_bytes_and_keeps_the_rows_before(tmp_path, fault, caplog):
    caplog.set_level(logging.ERROR)
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"n": 1})
    for k in range(1, every_call(lambda: append_jsonl(tmp_path / "other", {"n": 1}))):
        with (
            FaultyFS(at=k, fault=fault),
            pytest.raises(DirectRLHFError, match=r"metrics.jsonl: the disk is full: 9 bytes needed, \d+ free"),
        ):
            append_jsonl(path, {"n": 2})
        append_jsonl(path, {"n": 3})
        assert read_jsonl(path) in ([{"n": 1}, {"n": 3}], [{"n": 1}, {"n": 2}, {"n": 3}])
        path.unlink()
        append_jsonl(path, {"n": 1})


def test_an_error_that_is_no_full_disk_passes_unchanged(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "folder", "x")


def test_json_has_sorted_keys_and_refuses_nan_unless_told_to_write_null(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    write_json(path, {"a": math.nan, "b": [math.inf, 1.0]}, null_nonfinite=True)
    assert read_json(path) == {"a": None, "b": [None, 1.0]}


def test_text_that_utf8_cannot_hold_survives(tmp_path):
    append_jsonl(tmp_path / "x.jsonl", {"text": "\ud800 é \u2028 \n"})
    assert read_jsonl(tmp_path / "x.jsonl") == [{"text": "\ud800 é \u2028 \n"}]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.none())))
def test_rows_come_back_as_they_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "x.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows


def test_every_cut_of_the_last_line_loses_that_line_only_and_is_reported(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"n": 1}, {"n": 22}])
    whole = path.read_bytes()
    first = len(b'{"n": 1}\n')
    for cut in range(first + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        caplog.clear()
        assert read_jsonl(path) == [{"n": 1}]
        assert "x.jsonl:2: the last line is cut off" in caplog.text
        append_jsonl(path, {"n": 3})
        assert read_jsonl(path) == [{"n": 1}, {"n": 3}]


def test_a_line_that_lost_only_its_newline_is_kept(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"n": 1}')
    assert read_jsonl(path) == [{"n": 1}]
    append_jsonl(path, {"n": 2})
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}]
    assert not caplog.records


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(DataError, match=r"x.jsonl:2: not valid JSON"):
        read_jsonl(tmp_path / "x.jsonl")


@pytest.mark.parametrize("fault", ["crash", "short"])
def test_after_a_crash_while_appending_the_rows_before_are_readable(tmp_path, fault, caplog):
    caplog.set_level(logging.ERROR)
    path = tmp_path / "x.jsonl"
    for k in range(every_call(lambda: append_jsonl(tmp_path / "other", {"n": 1}))):
        path.unlink(missing_ok=True)
        append_jsonl(path, {"n": 1})
        with FaultyFS(at=k, fault=fault):
            append_jsonl(path, {"n": 2})
        append_jsonl(path, {"n": 3})
        assert read_jsonl(path) in ([{"n": 1}, {"n": 3}], [{"n": 1}, {"n": 2}, {"n": 3}])


def test_numbers_that_are_not_finite_are_named_by_their_place():
    import numpy as np

    values = {"loss": math.nan, "tasks": {"a": [1.0, -math.inf]}, "n": np.float32(0.5), "text": "nan"}
    assert finite(values) == (
        {"loss": None, "tasks": {"a": [1.0, None]}, "n": 0.5, "text": "nan"},
        ["loss", "tasks.a[1]"],
    )


@pytest.mark.promise("X6")
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc",
        "a\0b",
        "a" * 101,
        "con",
        "NUL.txt",
        "-rf",
        ".hidden",
        "ä",
        "a b",
        "a\n",
    ],
)
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(ConfigError, match="must be 1 to 100 letters"):
        safe_name(name)


@pytest.mark.parametrize("name", ["direct_ppo", "evaluation-base", "a.b-c_d", "0", "a" * 100, "console"])
def test_an_ordinary_name_is_kept(name):
    assert safe_name(name) == name


def test_json_lines_are_plain_json(tmp_path):
    append_jsonl(tmp_path / "x.jsonl", {"b": 1, "a": [1.5, None, True]})
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"b": 1, "a": [1.5, None, True]}
