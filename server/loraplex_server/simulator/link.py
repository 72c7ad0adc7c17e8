"""The way of adapters into the pool: disk, host memory, bus. One loader, one thing at a time."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from loraplex_memory.host_tier import HostTier


class Arrival(NamedTuple):
    """A load that is under way: when it will have ended, and how long it takes from its start."""

    done_s: float
    adapter_id: str
    took_s: float


class AdapterLink:
    """Owned by one replica, whose time it follows.

    Attributes:
        host: the adapters in host memory.
        under_way: loads in the order of their ends.
    """

    def __init__(
        self, host: HostTier, *, copy_page_s: float, disk_page_s: float, start_s: float = 0.0
    ) -> None:
        """`copy_page_s`, `disk_page_s`: seconds a page takes over the bus, and from the disk."""
        self.host = host
        self._copy_page_s = copy_page_s
        self._disk_page_s = disk_page_s
        self._free_s = start_s
        self.under_way: deque[Arrival] = deque()
        self.num_loads = 0
        self.num_loaded_pages = 0
        self.num_host_hits = 0

    def load(self, adapter_id: str, num_pages: int, now: float) -> Arrival:
        """Start a load into the pool, behind those that were started before."""
        took_s = num_pages * self._copy_page_s
        self.num_loads += 1
        self.num_loaded_pages += num_pages
        if self.host.lookup(adapter_id, now) is not None:
            self.num_host_hits += 1
        else:
            self.host.reserve(adapter_id, num_pages, now)
            took_s += num_pages * self._disk_page_s
        self._free_s = max(self._free_s, now) + took_s
        arrival = Arrival(self._free_s, adapter_id, took_s)
        self.under_way.append(arrival)
        return arrival

    def has_in_host(self, adapter_id: str) -> bool:
        """Whether host memory has the adapter, or is being filled with it."""
        return adapter_id in self.host

    def prefetch(self, adapter_id: str, num_pages: int, now: float) -> bool:
        """Bring an adapter into host memory if the loader is idle; False if it is not."""
        if self._free_s > now:
            return False
        if adapter_id not in self.host and self.host.reserve(adapter_id, num_pages, now):
            self._free_s = now + num_pages * self._disk_page_s
        return True
