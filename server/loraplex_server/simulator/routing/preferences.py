"""In which order an adapter prefers replicas: the two consistent hashes.

Both give an adapter the same replica for as long as it is there, and move only the adapters of a
replica that leaves: about one in `num_replicas`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Final, Protocol

#: HAProxy puts 16 points on its ring per unit of a server's weight, so this is `weight 8`. The
#: shares of replicas then differ by 1 / sqrt(points): 9 %.
RING_POINTS: Final = 128


def hashed(text: str) -> int:
    """Return 64 bits that are the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class Preferences(Protocol):
    """Without state that matters: the same adapter always gets the same order."""

    def order(self, adapter: int) -> Iterable[int]:
        """Yield every replica once, the preferred one first."""


class HashRing:
    """Karger's ring: the replica of the next of many points per replica, clockwise."""

    def __init__(self, num_replicas: int, *, points: int = RING_POINTS) -> None:
        placed = sorted(
            (hashed(f"replica {i}/{point}"), i)
            for i in range(num_replicas)
            for point in range(points)
        )
        self._num_replicas = num_replicas
        self._points = [at for at, _ in placed]
        self._owners = [owner for _, owner in placed]
        self._starts: dict[int, int] = {}

    def order(self, adapter: int) -> Iterator[int]:
        start = self._starts.get(adapter)
        if start is None:
            start = bisect_right(self._points, hashed(f"adapter {adapter}"))
            self._starts[adapter] = start
        seen: set[int] = set()
        num_points = len(self._points)
        for step in range(num_points):
            owner = self._owners[(start + step) % num_points]
            if owner not in seen:
                seen.add(owner)
                yield owner
                if len(seen) == self._num_replicas:
                    return


class Rendezvous:
    """In the order of hash(adapter, replica) (Thaler and Ravishankar, 1998): even shares."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._orders: dict[int, list[int]] = {}

    def order(self, adapter: int) -> list[int]:
        order = self._orders.get(adapter)
        if order is None:
            hashes = [hashed(f"{adapter}/{i}") for i in range(self._num_replicas)]
            order = sorted(range(self._num_replicas), key=hashes.__getitem__)
            self._orders[adapter] = order
        return order
