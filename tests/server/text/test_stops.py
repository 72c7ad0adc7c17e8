from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.text.stops import StopMatcher


def run(matcher: StopMatcher, pieces: list[str]) -> str:
    text = "".join(matcher.push(piece) for piece in pieces)
    return text if matcher.has_matched else text + matcher.flush()


def test_a_stop_string_over_three_pieces_is_found_and_left_out():
    matcher = StopMatcher(["STOP"])
    assert [matcher.push(p) for p in ("say S", "TO", "P now", "more")] == ["say ", "", "", ""]
    assert matcher.matched == "STOP"


def test_text_that_only_began_like_a_stop_string_comes_later():
    matcher = StopMatcher(["STOP"])
    assert [matcher.push(p) for p in ("a ST", "AR")] == ["a ", "STAR"]
    assert matcher.push("S") == ""
    assert matcher.flush() == "S"


def test_a_stop_string_is_kept_when_asked_but_nothing_after_it():
    matcher = StopMatcher(["\n\n"], include_in_output=True)
    assert run(matcher, ["one\n", "\ntwo"]) == "one\n\n"


def test_the_match_that_is_complete_first_decides():
    assert run(StopMatcher(["abcdef", "cd"]), ["abcdef"]) == "ab"
    assert run(StopMatcher(["cd", "bcd"]), ["abcd"]) == "a"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])


letters = st.text("abc", max_size=30)


@given(letters, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_the_cut_into_pieces_never_changes_the_outcome(
    text: str, stops: list[str], data: st.DataObject
):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    whole, cut = StopMatcher(stops), StopMatcher(stops)
    assert run(whole, [text]) == run(cut, pieces)
    assert whole.matched == cut.matched
    assert whole.has_matched == any(stop in text for stop in stops)
