"""Loads on the other ranks, as rank 0's loader follows them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_scheduler.plan import AdapterLoad
from loraplex_server.engine.loader import LoadResult
from loraplex_server.engine.messages import DiscardAdapter, PrefetchAdapter
from loraplex_server.engine.ranks.messages import LoaderReport, LoadPart
from loraplex_server.engine.ranks.workers import RankWorkers

#: How often to look whether a rank is lost.
_TICK_S: Final = 0.5


class LeadLoads:
    """Implements `loader.LoadPeers`.

    All ranks load in the order in which they were told, so the oldest results belong together.
    """

    def __init__(self, workers: RankWorkers, on_discarded: Callable[[], None]) -> None:
        """Follow the ranks' loads.

        Args:
            on_discarded: called in another thread when no rank holds what was discarded.
        """
        self._workers = workers
        self._on_discarded = on_discarded
        ranks = range(1, workers.num_ranks)
        self._lock = threading.Condition()
        self._ended: dict[int, deque[LoadResult]] = {rank: deque() for rank in ranks}
        self._host_bytes = dict.fromkeys(ranks, 0)
        self._discarding: dict[str, set[int]] = {}
        self._is_closed = False
        workers.on_report = self._take

    @property
    def num_ranks(self) -> int:
        return self._workers.num_ranks

    @property
    def host_bytes(self) -> int:
        with self._lock:
            return sum(self._host_bytes.values())

    def load(self, load: AdapterLoad) -> None:
        """See `LoadPeers`."""
        self._workers.send(LoadPart(load.adapter, load.pages))

    def prefetch(self, adapter: AdapterManifest) -> None:
        """See `LoadPeers`."""
        self._workers.send(PrefetchAdapter(adapter))

    def discard(self, adapter_id: str) -> None:
        """See `LoadPeers`."""
        with self._lock:
            # It is asked for at every step until it is done: who has answered, has answered.
            self._discarding.setdefault(adapter_id, set(self._ended))
        self._workers.send(DiscardAdapter(adapter_id))

    def is_discarding(self, adapter_id: str) -> bool:
        """See `LoadPeers`."""
        with self._lock:
            return adapter_id in self._discarding

    def wait(self, adapter_id: str) -> str | None:
        """See `LoadPeers`."""
        give_up_at = time.monotonic() + self._workers.timeout_s
        with self._lock:
            while late := [rank for rank, ended in self._ended.items() if not ended]:
                if self._is_closed or self._workers.failure:
                    return self._workers.failure or "the engine is closing"
                if time.monotonic() > give_up_at:
                    break
                self._lock.wait(_TICK_S)
            else:
                return _reason([ended.popleft() for ended in self._ended.values()], adapter_id)
        # Its pages may still be written to, so nothing goes on.
        reason = (
            f"rank {late[0]} of {self.num_ranks} has not loaded adapter {adapter_id} in "
            f"{self._workers.timeout_s:g} s"
        )
        self._workers.lose(reason)
        return reason

    def close(self) -> None:
        """See `LoadPeers`."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()

    def _take(self, rank: int, report: LoaderReport) -> None:
        with self._lock:
            self._ended[rank] += report.loads
            self._host_bytes[rank] = report.host_bytes
            for adapter_id in report.discarded:
                waiting = self._discarding.get(adapter_id, set())
                waiting.discard(rank)
                if not waiting:
                    self._discarding.pop(adapter_id, None)
            self._lock.notify_all()
        if report.discarded:
            self._on_discarded()


def _reason(results: list[LoadResult], adapter_id: str) -> str | None:
    """Return why a load failed, if it did; `results` are those of ranks 1 and up."""
    assert all(result.adapter_id == adapter_id for result in results), "one order on all ranks"
    failed = ((rank, result.error) for rank, result in enumerate(results, 1) if result.error)
    return next((f"on rank {rank}, {error}" for rank, error in failed), None)
