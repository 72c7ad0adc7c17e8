"""Placement by popularity: hot adapters on several replicas, all others on one."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final

from loraplex_server.simulator.routing.affine import BoundedLoad
from loraplex_server.simulator.routing.preferences import Preferences
from loraplex_server.simulator.routing.router import FleetView

#: An adapter may take this share of one replica's mean load before it gets another replica. So
#: small that a third of all requests (Zipf 1.0) have a choice of replicas, and balance the others,
#: for copies of some thirty adapters.
FULL_SHARE: Final = 0.05

#: Whoever has one home leaves it only for a replica in real trouble: elsewhere its adapter is cold.
COLD_BOUND: Final = 2.0

#: Counts are halved after so many requests, so that shares follow the traffic of the last minutes.
_HALVE_AFTER: Final = 100_000


class PopularityPlacement(BoundedLoad):
    """The least loaded of the adapter's first few; how many follows from its measured share.

    Bounded as `BoundedLoad` is, for the many cold adapters that may meet on one replica.
    """

    def __init__(
        self, preferences: Preferences, *, bound: float = COLD_BOUND, full_share: float = FULL_SHARE
    ) -> None:
        super().__init__(preferences, bound=bound)
        self._full_share = full_share
        self._counts: dict[int, float] = {}
        self._total = 0.0

    def choose(self, adapter: int, fleet: FleetView) -> int:
        homes = self.homes(adapter, self._count(adapter), fleet.alive)
        chosen = min(homes, key=fleet.in_flight.__getitem__)
        if fleet.in_flight[chosen] + 1 <= self._most(fleet):
            return chosen
        return super().choose(adapter, fleet)

    def homes(self, adapter: int, share: float, alive: Sequence[int]) -> Sequence[int]:
        num = max(1, ceil(share * len(alive) / self._full_share))
        living = self._living(adapter, alive)
        return [replica for _, replica in zip(range(num), living, strict=False)]

    def learn(self, shares: Sequence[float]) -> None:
        """Start with these shares, by adapter, as if they had been measured for long."""
        self._counts = {i: share * _HALVE_AFTER for i, share in enumerate(shares)}
        self._total = sum(self._counts.values())

    def _count(self, adapter: int) -> float:
        """Count a request and return the adapter's share of all."""
        count = self._counts.get(adapter, 0.0) + 1.0
        self._counts[adapter] = count
        self._total += 1.0
        if self._total >= 2 * _HALVE_AFTER:
            # What was asked for once and not again is forgotten.
            self._counts = {i: num / 2 for i, num in self._counts.items() if num >= 1.0}
            self._total = sum(self._counts.values())
        return count / max(self._total, _HALVE_AFTER / 10)
