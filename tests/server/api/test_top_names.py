from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.api.top_names import OTHER, REVIEW_S, TopCounts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(counts: TopCounts) -> dict[str, float]:
    return {label: value for (label,), value in counts.column("requests")}


def make_counts(k: int) -> tuple[TopCounts, Clock]:
    clock = Clock()
    return TopCounts(("requests", "tokens"), k, clock), clock


def test_ten_thousand_adapters_have_fifty_one_label_values():
    counts, clock = make_counts(50)
    rng = random.Random(7)
    total: Counter[str] = Counter()
    weights = [1.0 / (rank + 1) for rank in range(10_000)]
    for name in rng.choices([f"a{i}" for i in range(10_000)], weights, k=60_000):
        clock.now += 0.05
        total[name] += 1
        counts.add(name, 1.0, requests=1)
        assert len(shown(counts)) <= 51
    rows = shown(counts)
    assert len(rows) == 51
    assert {f"a{i}" for i in range(10)} <= rows.keys()  # whatever came first, the busiest are there
    assert all(rows[name] <= total[name] for name in rows if name != OTHER)


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 4),
    events=st.lists(
        st.tuples(st.integers(0, 12), st.floats(0, 100), st.sampled_from((0.0, 1.0, REVIEW_S))),
        max_size=300,
    ),
)
def test_every_event_is_counted_once_and_no_row_goes_back(k, events):
    counts, clock = make_counts(k)
    highest: dict[str, float] = {}
    for number, traffic, pause_s in events:
        clock.now += pause_s
        before = shown(counts)
        counts.add(f"a{number}", traffic, requests=1)
        rows = shown(counts)
        assert len(rows) <= k + 1
        # One row went up by one, and nothing else changed, but for who is shown.
        grown = {n for n, v in rows.items() if v != before.get(n, highest.get(n, 0.0))}
        assert grown in ({f"a{number}"}, {OTHER})
        for name, value in rows.items():
            assert value >= highest.get(name, 0.0)
            highest[name] = value
    assert sum(highest.values()) == len(events)


def test_a_busy_newcomer_takes_the_row_of_a_quiet_name_and_goes_on_when_it_comes_back():
    counts, clock = make_counts(1)
    counts.add("old", 1.0, requests=1)
    counts.add("new", 100.0, requests=1)
    assert shown(counts) == {"old": 1, OTHER: 1}
    clock.now += REVIEW_S
    counts.add("new", 1.0, requests=1)
    assert shown(counts) == {"new": 1, OTHER: 1}
    counts.add("old", 1000.0, requests=1)
    clock.now += REVIEW_S
    counts.add("old", 1.0, requests=1)
    assert shown(counts) == {"old": 2, OTHER: 2}


def test_a_little_more_traffic_takes_nobodys_row():
    counts, clock = make_counts(1)
    counts.add("first", 100.0, requests=1)
    for _ in range(20):
        counts.add("second", 9.0, requests=1)
    clock.now += REVIEW_S
    counts.add("second", 0.0, requests=1)
    assert counts.is_shown("first")
    assert not counts.is_shown("second")


def test_an_adapter_called_other_is_counted_among_the_others():
    counts, _ = make_counts(5)
    counts.add(OTHER, 10.0, requests=1)
    assert shown(counts) == {OTHER: 1}
    assert not counts.is_shown(OTHER)


def test_what_is_remembered_of_quiet_names_is_bounded():
    counts, clock = make_counts(2)
    for number in range(5000):
        clock.now += REVIEW_S
        counts.add(f"a{number}", float(number), requests=1)
    assert len(counts._rows) <= 2 * 20 + 1
    assert len(counts._names._outside) <= 2 * 20 * 2
