"""Deleting: the name goes at once; the answer waits until what it stood for has gone too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from loraplex_server.adapters.audit_log import Actor
from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound, StorageFailed
from loraplex_server.adapters.holds import Drain
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.removal import Removal
from loraplex_server.api.adapter_names import AdapterNames
from loraplex_server.api.errors import AdapterDraining
from loraplex_server.api.generations import Generations
from loraplex_server.engine.errors import EngineUnavailable
from loraplex_server.engine.handle import EngineHandle

#: How long to wait for running requests where nobody says.
DRAIN_S: Final = 30.0
#: Requests that were just resolving the name begin so soon after the delete, and end likewise.
_CANCEL_EVERY_S: Final = 0.05


class RemovalMode(StrEnum):
    DRAIN = "drain"
    CANCEL = "cancel"


@dataclass(frozen=True)
class FreedBytes:
    """What came free of each kind of memory."""

    pool: int = 0
    host: int = 0
    disk: int = 0

    def __add__(self, other: FreedBytes) -> FreedBytes:
        return FreedBytes(self.pool + other.pool, self.host + other.host, self.disk + other.disk)


class AdapterRemovals:
    """Used from the event loop; what outlasts a request goes on in tasks of its own."""

    def __init__(
        self,
        engine: EngineHandle,
        catalog: AdapterCatalog,
        generations: Generations,
        adapter_names: AdapterNames,
    ) -> None:
        self._engine = engine
        self._catalog = catalog
        self._generations = generations
        self._names = adapter_names
        self._tasks: set[asyncio.Task[FreedBytes] | asyncio.Task[None]] = set()

    async def remove(
        self, name: str, mode: RemovalMode, timeout_s: float, actor: Actor
    ) -> tuple[AdapterRecord, FreedBytes]:
        """Delete a name, or the one version `name@sha256:...`.

        From here on nothing resolves it. Its requests are waited for, or cancelled.

        Returns:
            What the name stood for, and what came free once nobody used it any more.

        Raises:
            AdapterDraining: requests still ran after `timeout_s`. The name is gone all the same,
                and its memory is freed when they end.
            AdapterError: see `AdapterCatalog.delete`; nothing has changed.
        """
        cancels = mode is RemovalMode.CANCEL
        removal = await asyncio.to_thread(self._catalog.delete, name, actor=actor, cancels=cancels)
        task = self.follow(removal)
        if cancels:
            await self._cancel_users(removal, task, timeout_s)
        else:
            await asyncio.wait([task], timeout=timeout_s)
        if not task.done():
            num_users = await asyncio.to_thread(self._num_users, removal)
            raise AdapterDraining(name, timeout_s, num_users)
        return removal.record, task.result()

    def follow(self, removal: Removal) -> asyncio.Task[FreedBytes]:
        """Wait in a task of its own until all of a removal is free."""
        for drain in removal.drains:
            self._names.forget(drain.adapter_id, drain.name)
        task = asyncio.create_task(self._freed(removal))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel_users(self, name: str, ids: Collection[str]) -> None:
        """End whatever runs on these adapters by this name: another server took it away."""
        task = asyncio.create_task(self._cancel_all(name, ids))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel_all(self, name: str, ids: Collection[str]) -> None:
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline:
            gone = await asyncio.to_thread(self._gone, name, ids)
            self._generations.cancel_users(name, gone or ())
            await asyncio.sleep(_CANCEL_EVERY_S)
            if gone is not None and not any(self._catalog.num_held_by(i, name) for i in gone):
                return

    def _gone(self, name: str, ids: Collection[str]) -> frozenset[str] | None:
        """Return which of these are no versions of the name; None while nobody can say.

        What has been registered again has users of its own, and may be so at any time.
        """
        try:
            return frozenset(ids) - {record.id for record in self._catalog.versions(name)}
        except AdapterNotFound:
            return frozenset(ids)
        except StorageFailed:
            return None

    async def _cancel_users(
        self, removal: Removal, task: asyncio.Task[FreedBytes], timeout_s: float
    ) -> None:
        ids = {drain.adapter_id for drain in removal.drains}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not task.done() and loop.time() <= deadline:
            self._generations.cancel_users(removal.record.name, ids)
            await asyncio.wait([task], timeout=_CANCEL_EVERY_S)

    async def _freed(self, removal: Removal) -> FreedBytes:
        freed = FreedBytes()
        for drain in removal.drains:
            freed += await self._freed_by(drain, removal.record)
        return freed

    async def _freed_by(self, drain: Drain, record: AdapterRecord) -> FreedBytes:
        disk_bytes = await asyncio.wrap_future(drain.freed)
        # The catalogue has told the engine before it said that the last user let go.
        memory = await self._engine.freed(drain.adapter_id)
        try:
            page_bytes = self._engine.info.page_bytes
        except EngineUnavailable:
            page_bytes = 0
        return FreedBytes(
            pool=(memory.weight_pages + memory.prefix_pages) * page_bytes,
            host=memory.host_bytes,
            disk=disk_bytes,
        )

    def _num_users(self, removal: Removal) -> int:
        return sum(map(self._catalog.num_waited_for, removal.drains))
