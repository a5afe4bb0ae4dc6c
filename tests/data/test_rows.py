import gzip
import io
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data.pair_files import everything, jsonl, load, pair_row, section, sources
from direct_rlhf.data import rows as rows_module
from direct_rlhf.data.load import fingerprint, sniff, write_rejected
from direct_rlhf.data.types import RejectedRow
from direct_rlhf.errors import DataError

# --- T1: bad rows are counted by reason, listed with their line, and stop the run above the limit ---

BAD_LINES = [
    ("broken_json", "Expecting ',' delimiter at column 16", b'{"prompt": "a" "chosen": "b"}'),
    ("broken_json", "Unterminated string starting at column 12", b'{"prompt": "a'),
    ("wrong_type", "a row must be a JSON object, this one is a list", b'["a", "b"]'),
    ("missing_key", "rejected is missing; there is: prompt, chosen", b'{"prompt": "a", "chosen": "b"}'),
    ("wrong_type", "chosen must be text, is int", b'{"prompt": "a", "chosen": 1, "rejected": "c"}'),
    ("empty_chosen", "the chosen answer is empty", b'{"prompt": "a", "chosen": " ", "rejected": "c"}'),
    ("lone_surrogate", "prompt holds half a surrogate pair at character 0", b'{"prompt": "\\udc00", "chosen": "b", "rejected": "c"}'),
    ("nul", "chosen holds a NUL character", b'{"prompt": "a", "chosen": "\\u0000", "rejected": "c"}'),
    ("nul", "NUL byte at column 13", b'{"prompt": "\0", "chosen": "b", "rejected": "c"}'),
    ("bad_encoding", "not UTF-8 at column 13", b'{"prompt": "\xe9", "chosen": "b", "rejected": "c"}'),
    ("line_too_long", "more than 4,194,304 bytes", b'{"prompt": "' + b"a" * 10_000_000 + b'", "chosen": "b", "rejected": "c"}'),
    ("identical", "chosen and rejected are the same", b'{"prompt": "a", "chosen": "b", "rejected": "b"}'),
    ("roles_out_of_order", "a prompt must start and end with a human turn, its turns are: human, assistant", b'{"prompt": "\\n\\nHuman: a\\n\\nAssistant: b", "chosen": "b", "rejected": "c"}'),
]  # fmt: skip


@pytest.mark.promise("T1")
@pytest.mark.parametrize(("reason", "detail", "line"), BAD_LINES, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD_LINES)])
def test_a_bad_line_is_counted_listed_and_costs_no_other_row(tmp_path, reason, detail, line):
    (tmp_path / "a.jsonl").write_bytes(jsonl(pair_row(1), line, pair_row(2)))
    data = load(tmp_path, section("a.jsonl", max_bad_rows=0.5))
    assert data.rejected == (RejectedRow("a.jsonl:2", reason, detail),)
    assert sources(everything(data)) == ["a.jsonl:1", "a.jsonl:3"]
    assert data.counts == {"read": 3, "kept": 2, reason: 1, "cut_early": 0}


@pytest.mark.promise("T1")
def test_too_many_malformed_rows_stop_with_counts_and_examples(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        jsonl(*[pair_row(at) for at in range(96)], b"{", {"prompt": "a", "chosen": "b"}, b"{")
    )
    with pytest.raises(DataError) as caught:
        load(tmp_path, section("a.jsonl"))
    assert str(caught.value) == (
        "a.jsonl: 3 of 99 rows (3.0%) are malformed, more than data.max_bad_rows = 1.0% allows: 2 broken_json, 1 missing_key. "
        "First: a.jsonl:97: broken_json (Expecting property name enclosed in double quotes at column 2); "
        "a.jsonl:98: missing_key (rejected is missing; there is: prompt, chosen); "
        "a.jsonl:99: broken_json (Expecting property name enclosed in double quotes at column 2). "
        "Repair them, or raise data.max_bad_rows."
    )


@pytest.mark.promise("T1")
def test_one_bad_row_in_a_hundred_is_at_the_limit_and_passes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*[pair_row(at) for at in range(99)], b"{"))
    assert load(tmp_path, section("a.jsonl")).counts["kept"] == 99


@pytest.mark.promise("T1")
def test_rows_set_aside_by_our_rules_do_not_count_as_malformed(tmp_path):
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    (tmp_path / "a.jsonl").write_bytes(jsonl(pair_row(1), pair_row(1), same))
    data = load(tmp_path, section("a.jsonl"))
    assert data.counts == {"read": 3, "kept": 1, "duplicate": 1, "identical": 1, "cut_early": 0}


@pytest.mark.promise("T1")
def test_byte_order_mark_windows_line_ends_and_blank_lines_are_no_damage(tmp_path):
    text = b"\xef\xbb\xbf" + jsonl(pair_row(1), b"", pair_row(2)).replace(b"\n", b"\r\n")
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl").write_bytes(jsonl(pair_row(1), b"", pair_row(2)).rstrip(b"\n"))
    first, second = load(tmp_path, section("a.jsonl")), load(tmp_path, section("b.jsonl"))
    assert first.counts["read"] == first.counts["kept"] == 2
    assert [p.id for p in everything(first)] == [p.id for p in everything(second)]
    assert sources(everything(first)) == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.promise("T1")
def test_every_kind_of_bad_line_in_one_file_is_listed_by_line_and_counted_by_reason(tmp_path):
    lines = [part for at, (_, _, line) in enumerate(BAD_LINES) for part in (pair_row(at), line)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(*lines).replace(b"\n", b"\r\n"))
    data = load(tmp_path, section("a.jsonl", max_bad_rows=0.5))
    write_rejected(tmp_path / "rejected.jsonl", data.rejected)
    listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["reason"], row["detail"]) for row in listed] == [
        (f"a.jsonl:{2 * at + 2}", reason, detail) for at, (reason, detail, _) in enumerate(BAD_LINES)
    ]
    reasons = Counter(reason for reason, _, _ in BAD_LINES)
    assert data.counts == {"read": len(lines), "kept": len(BAD_LINES), "cut_early": 0, **reasons}
    malformed = len(BAD_LINES) - reasons["identical"]
    with pytest.raises(
        DataError, match=rf"{malformed} of {len(lines)} rows .* are malformed, more than .* = 1.0%"
    ) as caught:
        load(tmp_path, section("a.jsonl"))
    assert caught.value.exit_code == 3


@pytest.mark.promise("T1")
def test_a_file_name_that_is_no_utf8_stops_nothing(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / os.fsdecode(b"b\xff.jsonl")).write_bytes(jsonl(pair_row(1), b"{"))
    data = load(tmp_path, section("a", max_bad_rows=0.5))
    assert data.counts["kept"] == 1
    assert len(fingerprint(section("a"), tmp_path)) == 64
    write_rejected(tmp_path / "rejected.jsonl", data.rejected)
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["source"] == "a/b\udcff.jsonl:2"


BAD_FILES = [
    ("a.jsonl", b"", "a.jsonl: holds no rows. Check that it is the right file."),
    ("a.jsonl", jsonl({"question": "a", "best": "b"}), "a.jsonl: no known row format; the first row's keys are question, best. Accepted as data.preferences are rows with prompt + chosen + rejected, chosen + rejected (transcripts or message lists), conversations + chosen + rejected, or instruction + chosen + rejected. Rename the columns, or set the source's `format`."),
    ("a.jsonl", jsonl({"text": "a"}), "a.jsonl: text rows cannot serve as data.preferences. Accepted there are rows with prompt + chosen + rejected, chosen + rejected (transcripts or message lists), conversations + chosen + rejected, or instruction + chosen + rejected."),
    ("a.jsonl", b"\x89PNG\r\n\x1a\n", "a.jsonl: none of the first 2 rows can be read; a.jsonl:1: bad_encoding (not UTF-8 at column 1)."),
    ("a.jsonl", json.dumps(pair_row()).encode("utf-16"), "{folder}/a.jsonl: saved as UTF-16. Save it as UTF-8."),
    ("a.json", b'[{"prompt": "a", "chosen": "b", "rejected": "c"},\n {"prompt": ]', "{folder}/a.json: broken JSON array at line 2 (character 51): Expecting value: line 2 column 13 (char 62). Repair it, or write one row a line as JSONL, where a broken row is set aside alone."),
    ("a.json", json.dumps([pair_row()]).encode() + b'\n[{"prompt": "a"}]', "{folder}/a.json: the JSON array ends at line 1, and 17 characters follow. Write one array, or one row a line as JSONL."),
    ("a.jsonl", jsonl({"prompt": "a", "chosen": "b", "rejected": "b"}), "a.jsonl: none of its 1 rows can be used. First: a.jsonl:1: identical (chosen and rejected are the same)."),
    ("a.parquet", b"PAR1 is not enough", "{folder}/a.parquet: no readable Parquet footer at its end (byte 18): Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file. The file is cut or damaged; fetch it again."),
    ("a.jsonl.gz", b"no gzip at all", "{folder}/a.jsonl.gz: damaged gzip at or before byte 2 of 14 (after 0 bytes of text): Not a gzipped file (b'no'). Fetch or compress the file again."),
]  # fmt: skip


@pytest.mark.promise("T1", "T2")
@pytest.mark.parametrize(
    ("name", "content", "message"), BAD_FILES, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD_FILES)]
)
def test_a_file_that_cannot_serve_is_refused_in_these_words(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path, section(name))
    assert str(caught.value) == message.replace("{folder}", str(tmp_path))
    assert sniff(section(name), tmp_path) == [f"data.preferences[0]: {caught.value}"]


@pytest.mark.promise("T2")
def test_a_damaged_gzip_file_is_named_with_its_offset(tmp_path):
    noise = random.Random(0)
    packed = gzip.compress(jsonl(*[pair_row(at, note=noise.random()) for at in range(5000)]))

    def offset(content):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError) as caught:
            load(tmp_path, section("a.jsonl.gz"))
        found = re.match(
            rf"{tmp_path}/a\.jsonl\.gz: damaged gzip at or before byte ([\d,]+) of {len(content):,} \(after [\d,]+ bytes "
            r"of text\): .*\. Fetch or compress the file again\.",
            str(caught.value),
        )
        assert found is not None, caught.value
        return int(found[1].replace(",", ""))

    for at in (11, len(packed) // 2, len(packed) - 1):
        assert offset(packed[:at]) == at  # a cut is where the file ends
        flipped = bytearray(packed)
        flipped[at] ^= 0xFF
        assert offset(flipped) >= at


def parquet_file(path, rows=40, **settings):
    parquet.write_table(
        pyarrow.Table.from_pylist([pair_row(at) for at in range(rows)]), path, row_group_size=rows // 2, **settings
    )
    return path.read_bytes()


@pytest.mark.promise("T2")
def test_a_damaged_parquet_page_is_named_with_its_offset(tmp_path):
    path = tmp_path / "a.parquet"
    content = bytearray(parquet_file(path, 400, write_page_checksum=True, compression="none"))
    group = parquet.ParquetFile(path).metadata.row_group(1)
    pages = [(column.dictionary_page_offset, column.total_compressed_size) for column in map(group.column, range(3))]
    first, last = pages[0][0], pages[-1][0] + pages[-1][1]
    content[first + 400] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path, section("a.parquet"))
    found = re.fullmatch(
        rf"{path}: damaged Parquet row group 1 \(between bytes ([\d,]+) and ([\d,]+) of {len(content):,}, after row "
        rf"200\): .*CRC checksum verification failed.*\. Fetch the file again\.",
        str(caught.value),
    )
    assert found is not None, caught.value
    start, end = (int(number.replace(",", "")) for number in found.groups())
    assert first <= start <= first + 400 < end <= last
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"no readable Parquet footer at its end \(byte {len(content) // 2:,}\)"):
        load(tmp_path, section("a.parquet"))


@pytest.mark.promise("T2")
def test_no_cut_of_a_parquet_file_goes_unnoticed(tmp_path):
    content = parquet_file(tmp_path / "a.parquet")
    for size in [1, 4, 8, *range(9, len(content), 97), len(content) - 1]:
        (tmp_path / "a.parquet").write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"a\.parquet: no readable Parquet footer at its end \(byte {size:,}\)"):
            load(tmp_path, section("a.parquet"))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A folder, the bytes of a Parquet file whose pages have checksums, and where its footer, which has none, starts."""
    folder = tmp_path_factory.mktemp("sealed")
    content = parquet_file(folder / "a.parquet", write_page_checksum=True)
    return folder, content, len(content) - 8 - int.from_bytes(content[-8:-4], "little")


def load_flipped(sealed, at, mask):
    """The chosen answers of a file with some bits of one byte flipped; None if it is refused by name."""
    folder, content, _ = sealed
    broken = bytearray(content)
    broken[at] ^= mask
    (folder / "a.parquet").write_bytes(broken)
    try:
        return {pair.chosen for pair in everything(load(folder, section("a.parquet")))}
    except DataError as error:
        return None if "a.parquet: " in str(error) else {str(error)}


@pytest.mark.promise("T2")
@settings(max_examples=200)
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_in_a_parquet_page_with_a_checksum_changes_no_row_or_is_an_error(sealed, share, mask):
    assert load_flipped(sealed, int(share * sealed[2]), mask) in (None, {f"good {at}" for at in range(40)})


@pytest.mark.promise("T2")
@settings(max_examples=200)
@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_in_a_parquet_footer_loses_no_row(sealed, share, mask):
    footer, size = sealed[2], len(sealed[1])
    answers = load_flipped(sealed, footer + int(share * (size - footer)), mask)
    assert answers is None or len(answers) == 40


@pytest.mark.promise("T2")
def test_a_parquet_footer_whose_row_counts_disagree_is_refused(sealed):
    folder, content, footer = sealed
    refused = []
    for found in re.finditer(
        rb"\x16\x28", content[footer:]
    ):  # the number 20 in Thrift; two of these are rows of a group
        broken = bytearray(content)
        broken[footer + found.start() + 1] -= 2
        (folder / "a.parquet").write_bytes(broken)
        try:
            load(folder, section("a.parquet"))
        except DataError as error:
            refused.append(str(error))
    counts = [text for text in refused if "footer" in text and "it counts 40 rows, its row groups 39" in text]
    assert len(counts) == 2, refused


def test_a_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path):
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xe9")]
    )
    table = pyarrow.table({"prompt": broken, "chosen": ["b", "c"], "rejected": ["d", "e"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = load(tmp_path, section("a.parquet", max_bad_rows=0.5))
    assert [(row.source, row.reason) for row in data.rejected] == [("a.parquet:2", "bad_encoding")]
    assert data.counts["kept"] == 1


# --- containers ---


def test_every_container_gives_the_same_pairs(tmp_path):
    rows = [pair_row(at) for at in range(7)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(*rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "e" / "deep").mkdir(parents=True)
    (tmp_path / "e" / "1.jsonl").write_bytes(jsonl(*rows[:3]))
    (tmp_path / "e" / "deep" / "2.jsonl").write_bytes(jsonl(*rows[3:]))
    (tmp_path / "e" / "README.md").write_text("not data")
    found = {name: load(tmp_path, section(name)) for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet", "e")}
    ids = {name: [pair.id for pair in everything(data)] for name, data in found.items()}
    assert len({tuple(value) for value in ids.values()}) == 1
    assert "b.json:2" in sources(everything(found["b.json"]))
    assert "e/deep/2.jsonl:4" in sources(everything(found["e"]))
    assert found["a.jsonl"].formats == {"a.jsonl": "explicit"}


def test_a_hub_data_set_is_loaded_by_name_and_split(monkeypatch):
    asked = {}

    def load_dataset(name, **settings):
        asked.update(settings, name=name)
        return datasets.Dataset.from_list([pair_row(1), pair_row(2)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load(Path(), section("hf:some/pairs:test"))
    assert asked == {"name": "some/pairs", "split": "test", "revision": None, "data_dir": None}
    assert sources(everything(data)) == ["hf:some/pairs:test:1", "hf:some/pairs:test:2"]
    assert len(fingerprint(section("hf:some/pairs:test"), None)) == 64


def test_an_unreachable_hub_data_set_says_what_to_do(monkeypatch):
    def load_dataset(name, **settings):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        load(Path(), section("hf:some/pairs"))
    assert str(caught.value) == (
        "hf:some/pairs: this data set cannot be loaded from the Hugging Face hub (Couldn't reach 'some/pairs' on the Hub "
        "(OfflineModeIsEnabled)). Check the name, the split and the connection, or download the file and give its path. Data "
        "sets that need code of their own are not run."
    )


def test_long_lines_are_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 100)
    longest = 0

    class Watched(io.BytesIO):
        def readline(self, size=-1):
            nonlocal longest
            line = super().readline(size)
            longest = max(longest, len(line))
            return line

    stream = Watched(jsonl(pair_row(1), b"x" * 10_000, pair_row(2)))
    found = list(rows_module._lines(tmp_path, "a", stream, stream))
    assert [row.problem and row.problem[0] for row in found] == [None, "line_too_long", None]
    assert longest <= 101


@pytest.mark.promise("T1")
@given(
    content=st.lists(
        st.binary(max_size=8) | st.sampled_from([b"{}", b'{"a": 1}', b"[" * 3000, b"1" * 5000, b"\r"])
    ).map(b"\n".join)
)
def test_any_bytes_give_one_row_for_each_line_that_is_not_blank(content):
    stream = io.BytesIO(content)
    found = list(rows_module._lines(Path("a"), "a", stream, stream))
    filled = [
        at
        for at, line in enumerate(content.split(b"\n"), 1)
        if (line.removeprefix(b"\xef\xbb\xbf") if at == 1 else line).strip()
    ]
    assert [row.source for row in found] == [f"a:{at}" for at in filled]
    assert all((row.value is None) != (row.problem is None) for row in found)
