"""Loading adapters beside the step: one thread reads, packs and copies; the step only polls.

    disk --read, pack--> host arena --copy--> pages of the pool

The loader writes pages that belong to adapters in state `loading`, which no plan names, so the
running batch never waits for a disk and no lock guards the pool. Plans launched earlier may still
use them on the device: the writer's fence holds its copies back until these are computed.

Loads come first, in their order. A prefetch goes only as far as the arena, when nothing else is to
be done, and holds a load up by no more than itself; nobody waits for it or hears of its failure.

Two threads meet here: a lock guards the queues, another the arena's accounts, and neither is held
while bytes move. Each counter has one writer.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.file_packer import CompiledPack, FilePacker
from loraplex_memory.host_arena import HostArena
from loraplex_memory.host_pages import HostPages
from loraplex_memory.pool import PagePool
from loraplex_memory.transfers import DirectWriter, Fence, PoolWriter
from loraplex_scheduler.plan import AdapterLoad
from loraplex_server.background import start_background_thread
from loraplex_server.engine.step_meter import LOAD_S
from loraplex_server.engine.tally import Tally, TallyCounts

log = logging.getLogger(__name__)

#: What waits behind so many others would come for requests that have come and gone.
_MAX_PREFETCHES: Final = 8


@dataclass(frozen=True)
class LoadResult:
    """`error` is None when the adapter is in its pages; `took_s` is the load itself, no queue.

    `tier` is where it came from: `host` memory or `disk`.
    """

    adapter_id: str
    error: str | None = None
    took_s: float = 0.0
    tier: str = "disk"


@dataclass
class _Job:
    """`load` is None of a prefetch; `is_discarded`: not to stay in the arena when it has ended.

    `was_read`: it was not in the arena.
    """

    adapter: AdapterManifest
    load: AdapterLoad | None = None
    after: Fence = None
    is_discarded: bool = False
    was_read: bool = False


class LoadPeers(Protocol):
    """The other ranks of a replica, each of which loads its own part of every adapter.

    `wait` is called in the loader's thread, everything else in the engine's.
    """

    @property
    def num_ranks(self) -> int:
        """Of the replica, this one included."""

    @property
    def host_bytes(self) -> int:
        """What adapters take of all other ranks' arenas."""

    def load(self, load: AdapterLoad) -> None:
        """Start a load on all of them."""

    def prefetch(self, adapter: AdapterManifest) -> None:
        """Start a prefetch on all of them."""

    def discard(self, adapter_id: str) -> None:
        """Have all of them forget an adapter."""

    def is_discarding(self, adapter_id: str) -> bool:
        """Whether some of them have not forgotten it yet."""

    def wait(self, adapter_id: str) -> str | None:
        """Wait for the oldest load, which is of this adapter; return why it failed, if it did."""

    def close(self) -> None:
        """End a `wait` that is under way, and all later ones."""


class AdapterLoader:
    """Owned by the engine step, which submits and polls; the work happens in one thread.

    Args:
        pool: takes the packed adapters.
        on_done: called in the loader's thread after each load or prefetch, to wake a sleeping
            engine.
        writer: how they get there; by default a plain copy, for a pool in host memory.
        arena: where adapters stay packed in host memory; None to read each load from disk. The
            loader owns it from here on.
        pack: compiled code that packs adapters; None to do it with torch.
        clock: seconds.
        rank: whose part of each adapter to load, where the model is cut over several.
        peers: the other ranks, of rank 0: then a load has ended when it has on all of them, and
            what is told of host memory is told of all of it.
    """

    def __init__(
        self,
        pool: PagePool,
        on_done: Callable[[], None] = lambda: None,
        writer: PoolWriter | None = None,
        arena: HostArena | None = None,
        *,
        pack: CompiledPack | None = None,
        clock: Callable[[], float] = time.monotonic,
        rank: int = 0,
        peers: LoadPeers | None = None,
    ) -> None:
        self._layout = pool.layout
        self._peers = peers
        self._on_done = on_done
        self._writer = writer or DirectWriter(pool)
        self._arena = arena
        self._clock = clock
        self._packer = FilePacker(pool.dtype, pack, rank)
        # None: a prefetch has ended.
        self._results: queue.SimpleQueue[LoadResult | None] = queue.SimpleQueue()
        self._lock = threading.Condition()
        self._loads: deque[_Job] = deque()
        self._prefetches: OrderedDict[str, _Job] = OrderedDict()
        self._current: _Job | None = None
        self._is_closing = False
        self._num_unreported = 0
        # Written by the engine's thread, in `poll`.
        self.num_loads = 0
        self.num_failures = 0
        self.load_s = 0.0
        """Seconds that successful loads took, without their time in the queue."""
        self._load_seconds = {"host": Tally(LOAD_S), "disk": Tally(LOAD_S)}
        # Written by the loader's thread.
        self.num_prefetches = 0
        """Prefetches that brought an adapter into the arena."""
        self._thread = start_background_thread("adapter-loader", self._work)

    @property
    def num_outstanding(self) -> int:
        """Loads that `poll` has not returned, and prefetches that have not ended."""
        with self._lock:
            current = self._current
            is_prefetching = current is not None and current.load is None
            return self._num_unreported + len(self._prefetches) + is_prefetching

    @property
    def num_host_hits(self) -> int:
        """Loads that found their adapter in the arena."""
        return self._arena.num_hits if self._arena else 0

    @property
    def host_bytes(self) -> int:
        """Bytes of the arena that adapters take."""
        own = self._arena.used_bytes if self._arena else 0
        return own + (self._peers.host_bytes if self._peers else 0)

    @property
    def host_capacity_bytes(self) -> int:
        return self._num_ranks * (self._arena.capacity_bytes if self._arena else 0)

    @property
    def _num_ranks(self) -> int:
        return self._peers.num_ranks if self._peers else 1

    def load_seconds(self) -> dict[str, TallyCounts]:
        """Return how long successful loads took, by where they came from."""
        return {tier: tally.counts() for tier, tally in self._load_seconds.items()}

    def host_adapters(self) -> tuple[str, ...]:
        """Return the ids of the adapters in the arena."""
        return self._arena.adapter_ids() if self._arena else ()

    def host_bytes_of(self, adapter_id: str) -> int:
        """Return what an adapter takes of the arena; its parts on all ranks are equal."""
        return self._num_ranks * (self._arena.bytes_of(adapter_id) if self._arena else 0)

    def holds(self, adapter_id: str) -> bool:
        """Whether an adapter is in host memory, or was discarded and still is on some rank."""
        if self._peers is not None and self._peers.is_discarding(adapter_id):
            return True
        return self.host_bytes_of(adapter_id) > 0

    def submit(self, load: AdapterLoad) -> None:
        """Start a load; its result appears in `poll`.

        To be called when every step that may use its pages has been launched, and from the thread
        (and on the stream) that launches them.
        """
        job = _Job(load.adapter, load, self._writer.fence())
        if self._peers is not None:
            self._peers.load(load)
        with self._lock:
            self._num_unreported += 1
            self._loads.append(job)
            self._lock.notify()

    def prefetch(self, adapter: AdapterManifest) -> bool:
        """Bring an adapter into the arena when there is time.

        Does nothing if it is there, or on its way in either queue.

        Returns:
            Whether more may be asked for: there is an arena, and not too many wait.
        """
        adapter_id = adapter.adapter_id
        if self._arena is None:
            return False
        if adapter_id in self._arena:
            return True
        with self._lock:
            if adapter_id not in self._prefetches and not any(self._jobs_of(adapter_id)):
                if len(self._prefetches) == _MAX_PREFETCHES:
                    return False
                self._prefetches[adapter_id] = _Job(adapter)
                self._lock.notify()
            else:
                return True
        if self._peers is not None:
            self._peers.prefetch(adapter)
        return True

    def discard(self, adapter_id: str) -> None:
        """Forget an adapter in host memory: now, or when the loads that name it have ended."""
        with self._lock:
            self._prefetches.pop(adapter_id, None)
            for job in self._jobs_of(adapter_id):
                job.is_discarded = True
        if self._arena is not None:
            self._arena.discard(adapter_id)
        if self._peers is not None:
            self._peers.discard(adapter_id)

    def poll(self, timeout_s: float = 0.0) -> list[LoadResult]:
        """Return the loads that ended; wait up to `timeout_s` for the first one.

        The end of a prefetch ends the waiting, too.
        """
        ended: list[LoadResult | None] = []
        try:
            ended.append(self._results.get(block=timeout_s > 0, timeout=timeout_s or None))
            while True:
                ended.append(self._results.get_nowait())
        except queue.Empty:
            pass
        results = [result for result in ended if result is not None]
        with self._lock:
            self._num_unreported -= len(results)
        for result in results:
            if result.error is None:
                self.num_loads += 1
                self.load_s += result.took_s
                self._load_seconds[result.tier].observe(result.took_s)
            else:
                self.num_failures += 1
        return results

    def close(self) -> None:
        """Finish the load under way, drop the queued ones, and give the arena up."""
        with self._lock:
            self._is_closing = True
            self._lock.notify()
        if self._peers is not None:
            self._peers.close()
        self._thread.join()
        if self._arena is not None:
            self._arena.close()

    def _jobs_of(self, adapter_id: str) -> Iterator[_Job]:
        """Yield the loads of an adapter, and what is under way."""
        for job in (*self._loads, self._current):
            if job is not None and job.adapter.adapter_id == adapter_id:
                yield job

    # ---- in the loader's thread ----------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._next()) is not None:
            result = self._run(job)
            with self._lock:
                self._current = None
            if job.is_discarded and self._arena is not None:
                self._arena.discard(job.adapter.adapter_id)
            self._results.put(result)
            self._on_done()

    def _next(self) -> _Job | None:
        """Wait for the next job and return it; None to stop."""
        with self._lock:
            while not (self._is_closing or self._loads or self._prefetches):
                self._lock.wait()
            if self._is_closing:
                return None
            if self._loads:
                self._current = self._loads.popleft()
            else:
                _, self._current = self._prefetches.popitem(last=False)
            return self._current

    def _run(self, job: _Job) -> LoadResult | None:
        """Do a job; None of a prefetch, whatever became of it."""
        adapter_id = job.adapter.adapter_id
        started = self._clock()
        error = None
        try:
            if job.load is None:
                self._prefetch(job)
            else:
                self._load(job, job.load)
        except Exception as reason:  # noqa: BLE001  (a thread's top frame: becomes a failed load)
            log.warning("adapter %s could not be loaded: %s", adapter_id, reason)
            error = f"the adapter could not be loaded: {reason}"
        if job.load is None:
            return None
        if self._peers is not None:
            # Even if it failed here: until all have ended, its pages may be written.
            elsewhere = self._peers.wait(adapter_id)
            error = error or elsewhere
        tier = "disk" if job.was_read else "host"
        return LoadResult(adapter_id, error, self._clock() - started, tier)

    def _load(self, job: _Job, load: AdapterLoad) -> None:
        with self._held(job, load.layout) as held:
            if held is None:
                held = self._writer.buffer(load.layout.num_pages)
                self._fill(held, job, load.layout)
            self._writer.write(load.pages, held, after=job.after)

    def _prefetch(self, job: _Job) -> None:
        """Leave an adapter in the arena; nothing if a load has brought it there meanwhile."""
        adapter = job.adapter
        if self._arena is not None and adapter.adapter_id not in self._arena:
            with self._held(job, AdapterLayout(self._layout, adapter.spec)) as held:
                self.num_prefetches += held is not None

    def _held(self, job: _Job, layout: AdapterLayout) -> AbstractContextManager[HostPages | None]:
        """Return the adapter's pages in the arena, read from disk if need be; None for no room."""
        if self._arena is None:
            return nullcontext()
        fill = functools.partial(self._fill, job=job, layout=layout)
        adapter_id = job.adapter.adapter_id
        return self._arena.hold(adapter_id, layout.num_pages, self._clock(), fill)

    def _fill(self, pages: HostPages, job: _Job, layout: AdapterLayout) -> None:
        job.was_read = True
        self._packer.fill(pages, Path(job.adapter.path), layout)
