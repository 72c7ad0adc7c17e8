from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.sse import SSEDecoder


def decode(*chunks: bytes) -> list[str]:
    decoder = SSEDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_events_split_at_any_byte_are_whole(end):
    text = f'data: {{"text":"é\u2028🏴"}}{end}{end}data: [DONE]{end}{end}'
    stream = text.encode()
    for cut in range(len(stream) + 1):
        assert decode(stream[:cut], stream[cut:]) == ['{"text":"é\u2028🏴"}', "[DONE]"]
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == [
        '{"text":"é\u2028🏴"}',
        "[DONE]",
    ]


def test_data_lines_of_one_event_are_joined():
    assert decode(b"data: one\ndata:two\ndata\n\n") == ["one\ntwo\n"]


def test_only_one_leading_space_is_removed():
    assert decode(b"data:  x \n\n") == [" x "]


def test_comments_and_other_fields_are_skipped():
    assert decode(b": ping\n\nevent: message\nid: 7\nretry: 1\ndata: x\n\n: end\n\n") == ["x"]


def test_a_byte_order_mark_is_skipped():
    assert decode(b"\xef", b"\xbb", b"\xbfdata: x\n\n") == ["x"]


def test_an_event_cut_off_by_the_end_is_dropped():
    assert decode(b"data: x\n\ndata: y\n") == ["x"]


def test_blank_lines_make_no_events():
    assert decode(b"\n\n\r\n\r\n") == []


@given(
    events=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n")), max_size=5),
    end=st.sampled_from([b"\n", b"\r", b"\r\n"]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_where_the_network_splits_does_not_matter(events, end, cuts):
    stream = b"".join(b"data: " + event.encode() + end + end for event in events)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(edges)]
    assert decode(*chunks) == events
