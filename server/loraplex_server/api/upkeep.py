"""What nobody asks for: names expire, uses are written down, pinned adapters are kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from loraplex_server.adapters.adapter_files import SHARED_GRACE_S
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterError
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.removals import AdapterRemovals
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.handle import EngineHandle

log = logging.getLogger(__name__)

#: So a name expires at most so late, and its last use is at most a minute old in the registry.
TICK_S: Final = 30.0
_SWEEP_EVERY_S: Final = SHARED_GRACE_S / 4


class Upkeep:
    """One task for the life of the server; used from the event loop."""

    def __init__(
        self,
        engine: EngineHandle,
        catalog: AdapterCatalog,
        removals: AdapterRemovals,
        adapter_names: AdapterNames,
        *,
        is_shared: bool,
        chores: Sequence[Callable[[], None]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        is_shared: other servers use registry and files too; what they left is swept here.
        chores: what else is to be done at each tick, in a thread; may raise StorageFailed.
        """
        self._engine = engine
        self._catalog = catalog
        self._removals = removals
        self._names = adapter_names
        self._is_shared = is_shared
        self._chores = chores
        self._clock = clock
        self._sweep_due_s = clock() + _SWEEP_EVERY_S
        self._kept: frozenset[str] = frozenset()
        self._pinning = asyncio.Lock()
        self._loading: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            try:
                await self.tick()
            except Exception:  # the task's top frame: nobody else would ever expire or pin
                log.exception("upkeep failed, and will be tried again")
            await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        """Do all of it once; a failure is logged, and tried again at the next one."""
        try:
            for removal in await asyncio.to_thread(self._catalog.delete_expired):
                log.info("adapter %s has expired", removal.record.name)
                self._removals.follow(removal)
            await self.keep_pinned()
            for chore in self._chores:
                await asyncio.to_thread(chore)
            if self._is_shared and self._clock() >= self._sweep_due_s:
                self._sweep_due_s = self._clock() + _SWEEP_EVERY_S
                await asyncio.to_thread(self._catalog.sweep)
        except AdapterError as error:
            log.warning("upkeep failed, and will be tried again: %s", error)

    async def keep_pinned(self) -> None:
        """Tell the engine what is pinned now, and have it loaded; raises StorageFailed.

        Nobody waits for the loading: files may have to be fetched, from a store that may hang.
        """
        async with self._pinning:  # or the engine could be told last what was read first
            pinned = await asyncio.to_thread(self._catalog.pinned)
            kept = frozenset(record.id for record in pinned)
            new, self._kept = kept - self._kept, kept
            self._engine.keep_adapters(kept)
            self._names.pinned = kept
        if new:
            names = [record.name for record in pinned if record.id in new]
            loading = asyncio.create_task(self._load(names))
            self._loading.add(loading)
            loading.add_done_callback(self._loading.discard)

    async def _load(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(AdapterError, EngineUnavailable):
                await prefetch(self._engine, self._catalog, self._names, name)


async def prefetch(
    engine: EngineHandle, catalog: AdapterCatalog, names: AdapterNames, name: str
) -> str:
    """Hint that requests for the adapter will come soon; returns its id.

    Raises:
        AdapterNotFound, StorageFailed, EngineUnavailable
    """
    lease = await asyncio.to_thread(catalog.acquire, name, is_fresh=True)
    try:
        record = lease.record
        names.remember(record)
        engine.prefetch(lease.manifest)
        return record.id
    finally:
        # The file may go once nobody has a lease; a hint is worth no more than that.
        await asyncio.to_thread(lease.release)
