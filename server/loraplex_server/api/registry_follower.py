"""Following what other servers change in a registry that several share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

import anyio
import anyio.to_thread

from loraplex_server.adapters.change_feed import ChangeFeed
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.name_changes import NameChange
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.removals import AdapterRemovals
from loraplex_server.api.upkeep import Upkeep
from loraplex_server.tenants.key_ring import SILENT_S, KeyRing

log = logging.getLogger(__name__)

#: With `known_names.STALE_S`, what is done through one server is done on all within two seconds.
READ_EVERY_S: Final = 0.5


class RegistryFollower:
    """One task for the life of the server; used from the event loop."""

    def __init__(
        self,
        changes: ChangeFeed,
        removals: AdapterRemovals,
        upkeep: Upkeep,
        adapter_names: AdapterNames,
        keys: KeyRing,
    ) -> None:
        self._changes = changes
        self._removals = removals
        self._upkeep = upkeep
        self._names = adapter_names
        self._keys = keys
        self._is_cut_off = False
        self._has_news = False
        self._pinning: asyncio.Task[None] | None = None
        # Its own: whoever waits for the registry in those that all share must not hold it up.
        self._thread = anyio.CapacityLimiter(1)

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            try:
                await self.read()
            except Exception:  # the task's top frame: nothing else would follow other servers
                log.exception("following other servers failed, and will be tried again")
            await asyncio.sleep(READ_EVERY_S)

    async def read(self) -> None:
        """Follow what was changed up to now; a registry that does not answer is logged once."""
        try:
            changes = await self._read_changes()
            self._note(None)
            self._follow(changes or ())
            self._has_news |= changes != ()
            await self._keep_pinned()
        except StorageFailed as error:
            self._note(error)
        with contextlib.suppress(StorageFailed):  # which they log themselves
            await self._keys.current()  # or an outage after a silence would find nothing known

    async def _keep_pinned(self) -> None:
        """Have what is pinned now kept, if that may have changed; raises StorageFailed.

        It reads other tables than changes are in. Somebody may have locked these, so whoever
        follows changes waits for it once, and not again.
        """
        if (pinning := self._pinning) is None:
            if not self._has_news:
                return
            self._has_news = False
            self._pinning = pinning = asyncio.create_task(self._upkeep.keep_pinned())
            await asyncio.wait([pinning], timeout=SILENT_S)
        if pinning.done():
            self._pinning = None
            self._has_news |= pinning.exception() is not None
            pinning.result()

    async def _read_changes(self) -> tuple[NameChange, ...] | None:
        reading = asyncio.ensure_future(
            anyio.to_thread.run_sync(self._changes.catch_up, limiter=self._thread)
        )
        try:
            await asyncio.wait([reading], timeout=SILENT_S)
            if not reading.done():
                self._note(StorageFailed(f"it is silent for {SILENT_S:g} s"))
            return await reading
        finally:
            reading.cancel()

    def _follow(self, changes: tuple[NameChange, ...]) -> None:
        for change in changes:
            for adapter_id in change.removed:
                self._names.forget(adapter_id, change.name)
            if change.cancels:
                self._removals.cancel_users(change.name, change.removed)

    def _note(self, error: StorageFailed | None) -> None:
        if error is not None and not self._is_cut_off:
            log.warning(
                "the registry does not answer; known names and keys are served on: %s", error
            )
        elif error is None and self._is_cut_off:
            log.warning("the registry answers again")
        self._is_cut_off = error is not None
