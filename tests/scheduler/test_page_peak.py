"""The peak of growths, against playing them through step by step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loraplex_scheduler.page_peak import PagePeak

growths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), max_size=8)
growth = st.tuples(st.integers(0, 40), st.integers(0, 60))


def played(growths, page_tokens):
    """Return the most pages held at once."""
    return max(
        sum(
            -(-(num_tokens + step) // page_tokens)
            for num_steps, num_tokens in growths
            if num_steps >= step
        )
        for step in range(max(num_steps for num_steps, _ in growths) + 1)
    )


@given(growths, growth, st.integers(1, 16))
def test_the_peak_is_enough_and_less_than_a_page_each_too_much(others, newcomer, page_tokens):
    peak = PagePeak(page_tokens, others).with_one_more(newcomer)
    exact = played([*others, newcomer], page_tokens)
    assert exact <= peak < exact + len(others) + 1


@given(growths, growth)
def test_with_pages_of_one_token_the_peak_is_exact(others, newcomer):
    assert PagePeak(1, others).with_one_more(newcomer) == played([*others, newcomer], 1)


@given(growths, growth, growth, st.integers(1, 16))
def test_adding_one_is_like_having_had_it(others, added, newcomer, page_tokens):
    peak = PagePeak(page_tokens, others)
    peak.with_one_more(newcomer)
    peak.add(added)
    assert peak.with_one_more(newcomer) == PagePeak(page_tokens, [*others, added]).with_one_more(
        newcomer
    )


def test_alone_it_is_what_the_last_step_needs():
    assert PagePeak(16).with_one_more((10, 22)) == 2
    assert PagePeak(16).with_one_more((11, 22)) == 3
