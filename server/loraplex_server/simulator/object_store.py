"""Fetching adapter files from an object store, before a request that needs one can be queued.

The server fetches in the API's threads, any number at once: a file takes the time to the first
byte, then what one stream gets, and all streams of a machine share its network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: A file stays until its load had time to begin, for those who ask right behind.
_KEPT_S: Final = 5.0


@dataclass(frozen=True)
class StoreSpeed:
    """What an object store gives one machine.

    The defaults are what AWS says of S3 ("Performance design patterns for Amazon S3": 100 to 200 ms
    to the first byte, 85 to 90 MB/s per connection) and a network of 25 Gbit/s.
    """

    first_byte_s: float = 0.15
    stream_bytes_per_s: float = 90e6
    network_bytes_per_s: float = 3.1e9


class ObjectStore:
    """One replica's fetches; its times only go forward.

    A file is fetched once however many requests ask for it meanwhile. It is kept no longer
    than host memory keeps the adapter: a disk for files would act as so much more of that.
    """

    def __init__(self, speed: StoreSpeed) -> None:
        self._speed = speed
        self._network_free_s = 0.0
        self._arrivals: dict[str, float] = {}
        self.num_fetches = 0
        self.fetched_bytes = 0.0

    def fetch(self, adapter_id: str, num_bytes: float, now: float) -> float:
        """Return when the file will be here."""
        done_s = self._arrivals.get(adapter_id, float("-inf"))
        if now < done_s + _KEPT_S:
            return max(done_s, now)
        speed = self._speed
        self._network_free_s = max(self._network_free_s, now)
        self._network_free_s += num_bytes / speed.network_bytes_per_s
        alone_s = now + num_bytes / speed.stream_bytes_per_s
        done_s = speed.first_byte_s + max(alone_s, self._network_free_s)
        self._arrivals[adapter_id] = done_s
        self.num_fetches += 1
        self.fetched_bytes += num_bytes
        return done_s
