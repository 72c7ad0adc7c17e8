"""Who is in host memory and who leaves it, by decayed use per page."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex_memory.host_tier import HostTier


def test_an_adapter_stays_until_its_pages_are_wanted():
    tier = HostTier(10)
    pages = tier.reserve("a", 4, 0.0)
    assert pages == (0, 1, 2, 3)
    assert tier.reserve("b", 6, 1.0) == (4, 5, 6, 7, 8, 9)
    assert tier.lookup("a", 2.0) == pages
    assert tier.lookup("c", 2.0) is None
    assert (tier.num_hits, tier.num_misses, tier.num_evictions) == (1, 1, 0)
    assert (list(tier), len(tier), tier.num_used_pages) == (["a", "b"], 2, 10)
    tier.check()


def test_the_least_used_leaves_first_and_only_as_many_as_must():
    tier = HostTier(9)
    for name in "abc":
        tier.reserve(name, 3, 0.0)
    for name in "aab":
        tier.lookup(name, 1.0)
    assert tier.reserve("d", 2, 2.0) is not None
    assert list(tier) == ["a", "b", "d"]
    assert tier.reserve("e", 3, 3.0) is not None
    assert list(tier) == ["a", "b", "e"]
    assert tier.num_evictions == 2
    tier.check()


def test_use_per_page_counts():
    tier = HostTier(10)
    tier.reserve("large", 8, 0.0)
    tier.reserve("small", 2, 0.0)
    for _ in range(2):
        tier.lookup("large", 0.0)
    assert tier.reserve("new", 2, 0.0) is not None
    assert list(tier) == ["small", "new"], "three uses of eight pages are less than one of two"


@pytest.mark.parametrize(("late_s", "survivor"), [(25.0, "old"), (35.0, "new")])
def test_eight_uses_are_worth_one_after_three_half_lives(late_s, survivor):
    tier = HostTier(2, half_life_s=10.0)
    tier.reserve("old", 1, 0.0)
    for _ in range(7):
        tier.lookup("old", 0.0)
    tier.reserve("new", 1, late_s)
    tier.reserve("next", 1, late_s)
    assert list(tier) == [survivor, "next"]


def test_what_cannot_fit_changes_nothing():
    tier = HostTier(5)
    tier.reserve("a", 2, 0.0)
    tier.reserve("b", 3, 0.0)
    tier.pin("a")
    assert tier.reserve("c", 6, 1.0) is None
    assert tier.reserve("c", 4, 1.0) is None
    assert list(tier) == ["a", "b"]
    assert tier.reserve("c", 3, 1.0) is not None
    assert list(tier) == ["a", "c"]
    assert HostTier(0).reserve("a", 1, 0.0) is None


def test_a_pinned_adapter_is_passed_over_and_can_leave_later():
    tier = HostTier(2)
    tier.reserve("pinned", 1, 0.0)
    tier.reserve("used", 1, 0.0)
    tier.lookup("used", 1.0)
    tier.pin("pinned")
    tier.pin("pinned")
    tier.reserve("b", 1, 2.0)
    assert list(tier) == ["pinned", "b"]
    tier.unpin("pinned")
    tier.reserve("c", 1, 3.0)
    assert list(tier) == ["pinned", "c"]
    tier.unpin("pinned")
    tier.check()
    tier.reserve("d", 1, 4.0)
    assert list(tier) == ["c", "d"]


def test_what_is_dropped_goes_at_once_or_when_it_is_unpinned():
    tier = HostTier(4)
    tier.reserve("a", 2, 0.0)
    tier.reserve("b", 2, 0.0)
    tier.pin("b")
    tier.drop("a")
    tier.drop("b")
    tier.drop("nobody")
    assert tier.num_used_pages == 2
    assert tier.lookup("b", 1.0) is None, "nobody may begin to use what is on its way out"
    tier.check()
    tier.unpin("b")
    assert tier.num_used_pages == 0
    assert tier.num_evictions == 0
    tier.check()


def test_pages_of_one_adapter_lie_together_when_they_can():
    tier = HostTier(12)
    for name in "abc":
        tier.reserve(name, 4, 0.0)
    for name in "bca":
        tier.drop(name)
    assert tier.reserve("d", 12, 1.0) == tuple(range(12))


def test_many_uses_leave_no_heap_of_stale_entries():
    tier = HostTier(4)
    for name in "abcd":
        tier.reserve(name, 1, 0.0)
    for i in range(10_000):
        tier.lookup("abcd"[i % 4], float(i))
    assert len(tier._heap) <= 2 * 4 + 64 + 1
    tier.check()


class HostTierMachine(RuleBasedStateMachine):
    """Against a model that sums uses up and ranks by brute force."""

    HALF_LIFE_S = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(20, half_life_s=self.HALF_LIFE_S)
        self.now_s = 0.0
        self.uses: dict[str, list[float]] = {}
        self.sizes: dict[str, int] = {}
        self.pins: dict[str, int] = {}
        self.doomed: set[str] = set()

    def value(self, name: str) -> float:
        uses = sum(2.0 ** (-(self.now_s - t) / self.HALF_LIFE_S) for t in self.uses[name])
        return uses / self.sizes[name]

    def forget(self, name: str) -> None:
        del self.uses[name], self.sizes[name], self.pins[name]
        self.doomed.discard(name)

    names = st.sampled_from("abcdefgh")

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds):
        self.now_s += seconds

    @rule(name=names)
    def lookup(self, name):
        pages = self.tier.lookup(name, self.now_s)
        is_here = name in self.uses and name not in self.doomed
        assert (pages is not None) == is_here
        if is_here:
            self.uses[name].append(self.now_s)

    @rule(name=names, num_pages=st.integers(1, 22))
    def reserve(self, name, num_pages):
        if name in self.uses:
            return
        before = set(self.tier)
        pages = self.tier.reserve(name, num_pages, self.now_s)
        pinned = sum(self.sizes[i] for i in self.uses if self.pins[i])
        assert (pages is not None) == (num_pages <= 20 - pinned)
        gone = before - set(self.tier)
        if pages is None:
            assert not gone
            return
        stayed = [i for i in self.uses if i not in gone and not self.pins[i]]
        free = 20 - sum(self.sizes.values())
        if gone:
            worst_kept = min((self.value(i) for i in stayed), default=float("inf"))
            best_gone = max(self.value(i) for i in gone)
            assert best_gone <= worst_kept * (1 + 1e-9)
            last = max(gone, key=self.value)
            assert free + sum(self.sizes[i] for i in gone) - self.sizes[last] < num_pages or any(
                abs(self.value(i) - self.value(last)) < 1e-9 for i in gone - {last}
            ), "one more left than had to"
        for i in gone:
            assert not self.pins[i]
            self.forget(i)
        self.uses[name], self.sizes[name], self.pins[name] = [self.now_s], num_pages, 0

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def pin(self, data):
        name = data.draw(st.sampled_from(sorted(self.uses)))
        self.tier.pin(name)
        self.pins[name] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data):
        name = data.draw(st.sampled_from(sorted(i for i, n in self.pins.items() if n)))
        self.tier.unpin(name)
        self.pins[name] -= 1
        if name in self.doomed and not self.pins[name]:
            self.forget(name)

    @rule(name=names)
    def drop(self, name):
        self.tier.drop(name)
        if self.pins.get(name):
            self.doomed.add(name)
        elif name in self.uses:
            self.forget(name)

    @invariant()
    def accounts_are_right(self):
        self.tier.check()
        assert set(self.tier) == set(self.uses)
        assert self.tier.num_used_pages == sum(self.sizes.values())


HostTierMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHostTierMachine = HostTierMachine.TestCase
