from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.text.reasoning import ReasoningSplitter


def split(parts, *, begins_inside=False):
    splitter = ReasoningSplitter(begins_inside=begins_inside)
    pairs = [*map(splitter.push, parts), splitter.flush()]
    return "".join(thought for thought, _ in pairs), "".join(rest for _, rest in pairs)


@pytest.mark.parametrize(
    ("text", "begins_inside", "expected"),
    [
        ("<think>\na b\n</think>\n\nyes", False, ("a b", "yes")),
        ("\n<think></think> yes", False, ("", "yes")),
        ("a b </think>yes", True, ("a b", "yes")),
        ("<think>cut of", False, ("cut of", "")),
        ("cut </thi", True, ("cut </thi", "")),
        (" <thin ice", False, ("", " <thin ice")),
        (" <thi", False, ("", " <thi")),
        ("no <think>x</think>", False, ("", "no <think>x</think>")),
        ("a</think>b</think>", True, ("a", "b</think>")),
        ("", False, ("", "")),
    ],
)
def test_reasoning_ends_at_its_mark(text, begins_inside, expected):
    assert split([text], begins_inside=begins_inside) == expected
    assert split(list(text), begins_inside=begins_inside) == expected


_BITS = st.sampled_from(["<think>", "</think>", "<think", "</", ">", " ", "\n", "ab"])


@settings(max_examples=200, deadline=None)
@given(bits=st.lists(_BITS, max_size=8), begins_inside=st.booleans(), data=st.data())
def test_any_text_is_split_alike_however_it_is_cut(bits, begins_inside, data):
    text = "".join(bits)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    edges = [0, *cuts, len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(edges)]
    whole = split([text], begins_inside=begins_inside)
    assert split(parts, begins_inside=begins_inside) == whole
