"""Loading adapters beside the step: one thread reads, packs and copies; the step only polls.

The loader writes pages that belong to adapters in state `loading`, which no plan names, so the
running batch never waits for a disk and no lock guards the pool. Plans launched earlier may still
use them on the device: the writer's fence holds its copies back until these are computed.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loraplex_memory.adapter_file import read_adapter_file
from loraplex_memory.packing import pack_adapter
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import DirectWriter, Fence, PoolWriter
from loraplex_scheduler.plan import AdapterLoad

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadResult:
    """`error` is None when the adapter is in its pages."""

    adapter_id: str
    error: str | None = None


class AdapterLoader:
    """Owned by the engine step, which submits and polls; the work happens in one thread.

    Args:
        pool: takes the packed adapters.
        on_done: called in the loader's thread after each load, to wake a sleeping engine.
        writer: how they get there; by default a plain copy, for a pool in host memory.
    """

    def __init__(
        self,
        pool: PagePool,
        on_done: Callable[[], None] = lambda: None,
        writer: PoolWriter | None = None,
    ) -> None:
        self._dtype = pool.dtype
        self._on_done = on_done
        self._writer = writer or DirectWriter(pool)
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self.num_outstanding = 0
        """Loads submitted whose result `poll` has not returned."""
        self.num_loads = 0
        self.num_failures = 0

    def submit(self, load: AdapterLoad) -> None:
        """Start a load; its result appears in `poll`.

        To be called when every step that may use its pages has been launched, and from the thread
        (and on the stream) that launches them.
        """
        self._thread.submit(self._run, load, self._writer.fence())
        self.num_outstanding += 1

    def poll(self, timeout_s: float = 0.0) -> list[LoadResult]:
        """Return the loads that ended; wait up to `timeout_s` for the first one."""
        results: list[LoadResult] = []
        try:
            results.append(self._results.get(block=timeout_s > 0, timeout=timeout_s or None))
            while True:
                results.append(self._results.get_nowait())
        except queue.Empty:
            pass
        self.num_outstanding -= len(results)
        self.num_loads += sum(result.error is None for result in results)
        self.num_failures += sum(result.error is not None for result in results)
        return results

    def close(self) -> None:
        """Finish the load under way, drop the queued ones."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, load: AdapterLoad, after: Fence) -> None:
        adapter_id = load.adapter.adapter_id
        try:
            weights = read_adapter_file(Path(load.adapter.path))
            buffer = self._writer.buffer(load.layout.num_pages)
            packed = pack_adapter(weights, load.layout, dtype=self._dtype, out=buffer)
            self._writer.write(load.pages, packed, after=after)
            result = LoadResult(adapter_id)
        except Exception as error:  # noqa: BLE001  (a thread's top frame: becomes a failed load)
            log.warning("adapter %s could not be loaded: %s", adapter_id, error)
            result = LoadResult(adapter_id, f"the adapter could not be loaded: {error}")
        self._results.put(result)
        self._on_done()
