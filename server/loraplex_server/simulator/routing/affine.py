"""Policies that hash the adapter: each is asked of one replica, or of few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Final

from loraplex_server.simulator.routing.preferences import Preferences, hashed
from loraplex_server.simulator.routing.router import FleetView

#: Replicas behind the first that are worth counting with: each gets a part of a part.
_SPILLED: Final = 3


class ModuloHash:
    """The adapter's hash modulo the number of replicas: nearly all move when that changes."""

    report_every_s: float | None = None
    forgets = False

    def choose(self, adapter: int, fleet: FleetView) -> int:
        return self.homes(adapter, 0.0, fleet.alive)[0]

    def homes(self, adapter: int, share: float, alive: Sequence[int]) -> Sequence[int]:
        del share
        return [alive[hashed(f"adapter {adapter}") % len(alive)]]

    def spill(self, adapter: int, alive: Sequence[int]) -> Sequence[int]:
        del adapter, alive
        return ()


class ConsistentHash:
    """The first replica of the adapter's order that is alive, however loaded."""

    report_every_s: float | None = None
    forgets = False

    def __init__(self, preferences: Preferences) -> None:
        self._preferences = preferences

    def choose(self, adapter: int, fleet: FleetView) -> int:
        return next(self._living(adapter, fleet.alive))

    def homes(self, adapter: int, share: float, alive: Sequence[int]) -> Sequence[int]:
        del share
        return [next(self._living(adapter, alive))]

    def spill(self, adapter: int, alive: Sequence[int]) -> Sequence[int]:
        del adapter, alive
        return ()

    def _living(self, adapter: int, alive: Sequence[int]) -> Iterator[int]:
        return (i for i in self._preferences.order(adapter) if i in alive)


class BoundedLoad(ConsistentHash):
    """The first of the adapter's order that has less than `bound` times the mean load.

    Consistent hashing with bounded loads (Mirrokni et al., SODA 2018), as HAProxy's
    `hash-balance-factor` and Envoy's `hash_balance_factor` do it; they count it in per cent.
    """

    def __init__(self, preferences: Preferences, *, bound: float = 1.25) -> None:
        super().__init__(preferences)
        self._bound = bound

    def choose(self, adapter: int, fleet: FleetView) -> int:
        in_flight = fleet.in_flight
        most = self._most(fleet)
        for replica in self._living(adapter, fleet.alive):
            if in_flight[replica] + 1 <= most:
                return replica
        # So few requests that one more is above the bound anywhere.
        return min(self._living(adapter, fleet.alive), key=in_flight.__getitem__)

    def homes(self, adapter: int, share: float, alive: Sequence[int]) -> Sequence[int]:
        num = ceil(share * len(alive) / self._bound)
        return list(self._living(adapter, alive))[: max(1, num)]

    def spill(self, adapter: int, alive: Sequence[int]) -> Sequence[int]:
        return list(self._living(adapter, alive))[1 : 1 + _SPILLED]

    def _most(self, fleet: FleetView) -> float:
        """Return the requests that a replica may have, this one included; at least one."""
        num = sum([fleet.in_flight[i] for i in fleet.alive])
        return max(1.0, self._bound * (num + 1) / len(fleet.alive))


class TwoChoices(ConsistentHash):
    """The less loaded of the first two of the adapter's order (power of two choices)."""

    def choose(self, adapter: int, fleet: FleetView) -> int:
        return min(self.homes(adapter, 0.0, fleet.alive), key=fleet.in_flight.__getitem__)

    def homes(self, adapter: int, share: float, alive: Sequence[int]) -> Sequence[int]:
        del share
        living = self._living(adapter, alive)
        return [replica for _, replica in zip(range(2), living, strict=False)]
