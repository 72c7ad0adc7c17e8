"""What is worth least in the pool: the policies that rank idle adapters and idle prefix pages.

A policy gives each idle thing a key; the `Evictor` takes the least first, whatever its kind. Keys
must not depend on the time at which they are asked for: between two uses of a thing its key stays
the same, so one heap serves without being sorted again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log2
from typing import Protocol


class RestoreCosts(Protocol):
    """What it takes to have again what was evicted; seconds, estimated by the scheduler."""

    def adapter_s(self, num_pages: int) -> float:
        """Time to load an adapter of so many pages."""

    def prefix_page_s(self) -> float:
        """Time to compute one page of a prompt again, as part of a larger step."""


class EvictionPolicy(Protocol):
    """Without state; the same object may serve many pools.

    A key is `log2(value) + t / half_life`, where t is the time of the last use and the value is the
    one that it had then; it halves with every half-life of its kind.

    Attributes:
        adapter_half_life_s: after this time, a use of an adapter counts half.
        prefix_half_life_s: after this time, a use of a prefix page counts half.
        drops_unused: adapters leave once nobody runs with them, needed or not.
    """

    @property
    def adapter_half_life_s(self) -> float: ...

    @property
    def prefix_half_life_s(self) -> float: ...

    @property
    def drops_unused(self) -> bool: ...

    def adapter_key(self, *, last_use_s: float, use_score: float, page_cost: float) -> float:
        """Rank an idle adapter.

        Args:
            last_use_s: when the last sequence ran with it, or when it came.
            use_score: its decayed count of requests, as `usage` defines scores.
            page_cost: log2 of the seconds to restore it, per page.
        """

    def prefix_key(
        self, *, last_use_s: float, use_score: float, page_cost: float, is_orphan: bool
    ) -> float:
        """Rank an idle prefix page; `is_orphan`: its adapter is not in the pool."""


@dataclass(frozen=True)
class CostAware:
    """Seconds to restore x chance of use / pages; the least valuable goes first.

    The factors are those of GreedyDual-Size-Frequency (Cherkasova, 1998), with decay in place of
    its inflating clock, and of ELORA's cost model (transfer cost x visit probability x recency). A
    decayed count f of half-life h stands for `f * ln(2) / h` uses per second. For adapters f counts
    requests, whoever they were for; for a prefix page see `PrefixCache`. Adapters keep their
    popularity for longer than a conversation lasts, hence two half-lives.

    ELORA drops prefixes with their adapter, as they cannot be used without it. But the request that
    brings the adapter back finds them, and a deep discount lost more than it gained on mixed
    traffic: they only count `orphan_weight`.
    """

    adapter_half_life_s: float = 300.0
    prefix_half_life_s: float = 60.0
    orphan_weight: float = 0.9
    drops_unused: bool = False

    def adapter_key(self, *, last_use_s: float, use_score: float, page_cost: float) -> float:
        del last_use_s
        return use_score + page_cost - self._log_adapter_half_life

    def prefix_key(
        self, *, last_use_s: float, use_score: float, page_cost: float, is_orphan: bool
    ) -> float:
        del last_use_s
        key = use_score + page_cost - self._log_prefix_half_life
        return key + self._log_orphan_weight if is_orphan else key

    # Asked for with every page that leaves, so taken once.

    @cached_property
    def _log_adapter_half_life(self) -> float:
        return log2(self.adapter_half_life_s)

    @cached_property
    def _log_prefix_half_life(self) -> float:
        return log2(self.prefix_half_life_s)

    @cached_property
    def _log_orphan_weight(self) -> float:
        return log2(self.orphan_weight)


@dataclass(frozen=True)
class LeastRecentlyUsed:
    """By the time of the last use alone, for adapters and prefix pages alike."""

    half_life_s: float = 300.0
    drops_unused: bool = False

    @property
    def adapter_half_life_s(self) -> float:
        return self.half_life_s

    @property
    def prefix_half_life_s(self) -> float:
        return self.half_life_s

    def adapter_key(self, *, last_use_s: float, use_score: float, page_cost: float) -> float:
        del use_score, page_cost
        return last_use_s / self.half_life_s

    def prefix_key(
        self, *, last_use_s: float, use_score: float, page_cost: float, is_orphan: bool
    ) -> float:
        del use_score, page_cost, is_orphan
        return last_use_s / self.half_life_s


@dataclass(frozen=True)
class DropUnused(LeastRecentlyUsed):
    """S-LoRA's: an adapter stays only while a running sequence uses it.

    In between, when pages are short, as `LeastRecentlyUsed`.
    """

    drops_unused: bool = True


def page_cost(total_s: float, num_pages: int) -> float:
    """Return log2 of the seconds per page; costs of nothing count as a nanosecond."""
    return log2(max(total_s, 1e-9) / max(1, num_pages))
