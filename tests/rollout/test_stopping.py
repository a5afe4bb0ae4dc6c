from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis.strategies import data, integers, lists, text
from tokenizers import Tokenizer, decoders, models

from direct_rlhf.rollout.stopping import StopHit, StopTracker, TextStream

ALPHABET = "ab:H\n é😀"


def split(string, cuts, pieces):
    """``string`` as ids of a made-up vocabulary: its UTF-8 bytes, cut anywhere."""
    raw = string.encode()
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    chunks = [raw[a:b] for a, b in pairwise(edges)]
    vocabulary = sorted(set(chunks))
    return pieces([b"", b"", b"", *vocabulary]), [3 + vocabulary.index(chunk) for chunk in chunks], edges


@given(
    string=text(ALPHABET, max_size=30),
    stops=lists(text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=lists(integers(0, 200), max_size=40),
)
def test_the_tracker_finds_what_find_finds_under_every_split_into_tokens(pieces, string, stops, cuts):
    tokens, ids, edges = split(string, cuts, pieces)
    tracker = StopTracker(tokens, stops)
    for n, token_id in enumerate(ids, 1):
        so_far = tokens.decode(ids[:n])
        found = [so_far.find(stop) for stop in stops if stop in so_far]
        hit = tracker.push(7, token_id)
        if found:
            byte = len(so_far[: min(found)].encode())
            assert hit == StopHit(min(found), sum(edge < byte for edge in edges[:n]))
            return
        assert hit is None


@given(d=data())
def test_streamed_text_is_the_final_text_and_shows_no_part_of_a_stop_string(pieces, d):
    stop = d.draw(text(ALPHABET, min_size=1, max_size=4))
    tokens, ids, _ = split(d.draw(text(ALPHABET, max_size=20)), d.draw(lists(integers(0, 80), max_size=20)), pieces)
    tracker, stream, given_out = StopTracker(tokens, [stop]), TextStream(tokens, [stop]), ""
    whole = tokens.decode(ids)
    final = whole[: whole.find(stop)] if stop in whole else whole
    for n, token_id in enumerate(ids, 1):
        if tracker.push(0, token_id):
            break
        given_out += stream.push(ids[:n])
        assert final.startswith(given_out)
    assert given_out + stream.finish(final) == final


def test_rows_are_independent_and_keep_their_ids(pieces):
    tokens = pieces([b"", b"", b"", b"a", b"\n", b"b"])
    tracker = StopTracker(tokens, ["\n\n"])
    assert tracker.push(0, 3) is tracker.push(1, 4) is tracker.push(0, 4) is None
    assert tracker.push(1, 4) == StopHit(0, 0)
    assert tracker.push(0, 4) == StopHit(1, 1)
    assert (tracker.ids(0), tracker.ids(1), tracker.ids(2)) == ([3, 4, 4], [4, 4], [])


def test_the_earliest_of_several_stop_strings_counts(pieces):
    tokens = pieces([b"", b"", b"", b"xabc"])
    assert StopTracker(tokens, ["c", "bc", "abc"]).push(0, 3) == StopHit(1, 1)


def test_a_token_that_reaches_into_the_stop_string_begins_before_it(pieces):
    tokens = pieces([b"", b"", b"", b"Yes", b".\n\n", b"Human", b":"])
    tracker = StopTracker(tokens, ["\n\nHuman:"])
    assert [tracker.push(0, i) for i in (3, 4, 5)] == [None] * 3
    assert tracker.push(0, 6) == StopHit(4, 2)


def byte_fallback_tokenizer():
    """As SentencePiece models have it: spaces are marks, rare characters are bytes, the first space is stripped."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": 1 + b for b in range(256)}, "▁Human": 257, "Human": 258, ":": 259, "▁": 260}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def fallback_bytes(string):
    return [1 + byte for byte in string.encode()]


@pytest.mark.parametrize(
    ("ids", "stop", "hit"),
    [
        ([*fallback_bytes("😀\n\n"), 258, 259], "\n\nHuman:", StopHit(1, 4)),
        ([*fallback_bytes("é\n")], "\n", StopHit(1, 2)),
        ([257, 257, 260], " Human ", StopHit(5, 1)),
        ([*fallback_bytes("a"), 260], " ", StopHit(1, 1)),
        ([*fallback_bytes("aé")], "é", StopHit(1, 1)),
    ],
)
def test_byte_fallback_vocabularies_hide_no_stop_string(ids, stop, hit):
    tracker = StopTracker(byte_fallback_tokenizer(), [stop])
    assert [tracker.push(0, token_id) for token_id in ids] == [None] * (len(ids) - 1) + [hit]


def test_tokens_that_cannot_end_a_stop_string_are_decoded_once(pieces):
    tokens = pieces([b"", b"", b"", b"a", b"Hum", b":"])
    calls = []
    tokens.decode, decode = lambda ids: calls.append(len(ids)) or decode(ids), tokens.decode
    tracker = StopTracker(tokens, ["\n\nHuman:"])
    for _ in range(500):
        tracker.push(0, 3)
        tracker.push(0, 4)
    assert calls == [1, 1]
    tracker.push(0, 5)
    assert calls[2] == 1
    assert calls[3] < 10


def test_an_empty_stop_string_is_refused(pieces):
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopTracker(pieces([]), ["\n", ""])
