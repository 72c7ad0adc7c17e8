"""Policies that do not look at the adapter: every replica sees all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from loraplex_server.simulator.routing.router import FleetView

#: A stream of one's own: a trace of the same seed draws its adapters from the first numbers of the
#: plain one, and random routing by the same numbers would be affine.
STREAM: Final = 1


class _Spread:
    report_every_s: float | None = None
    forgets = False

    def homes(self, adapter: int, share: float, alive: Sequence[int]) -> Sequence[int]:
        del adapter, share
        return alive

    def spill(self, adapter: int, alive: Sequence[int]) -> Sequence[int]:
        del adapter, alive
        return ()


class Random(_Spread):
    """Any, with equal chances."""

    def __init__(self, seed: int = 42) -> None:
        self._rng = np.random.default_rng([seed, STREAM])

    def choose(self, adapter: int, fleet: FleetView) -> int:
        del adapter
        return fleet.alive[int(self._rng.random() * len(fleet.alive))]


class RoundRobin(_Spread):
    """Each in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, adapter: int, fleet: FleetView) -> int:
        del adapter
        self._next += 1
        return fleet.alive[(self._next - 1) % len(fleet.alive)]


class LeastLoaded(_Spread):
    """The one with the fewest unanswered requests; among equals each in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, adapter: int, fleet: FleetView) -> int:
        del adapter
        self._next += 1
        num, in_flight = len(fleet.alive), fleet.in_flight
        turned = (fleet.alive[(self._next + i) % num] for i in range(num))
        return min(turned, key=in_flight.__getitem__)
