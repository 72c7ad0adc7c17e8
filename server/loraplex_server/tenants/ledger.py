"""What is being used, on its way to the database: collected in memory, written every `WRITE_S`.

Invariant: what a request has used so far is in exactly one of its own counts, the sums here, or the
database. A killed process loses what the last `WRITE_S` seconds brought, and what could not be
written since the database stopped to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from typing import Final, Protocol

from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.tenants.usage_store import HOUR_S, Account, Amounts, UsageStore

log = logging.getLogger(__name__)

WRITE_S: Final = 2.0


class Metered(Protocol):
    """A request in flight, whose use is taken while it runs."""

    @property
    def tenant(self) -> str: ...

    @property
    def adapter(self) -> str:
        """Its name; "" is the base model."""
        ...

    def used(self) -> Amounts:
        """Return all that it has used so far."""
        ...


class UsageLedger:
    """Used from one event loop; its task runs while there is something to write."""

    def __init__(self, store: UsageStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._writer_id = secrets.token_hex(16)
        self._taken: dict[Metered, Amounts] = {}
        self._sums: dict[Account, Amounts] = {}
        # The batch that is being written, whose fate may be unknown: it keeps its number.
        self._batch: dict[Account, Amounts] = {}
        self._num_batches = 0
        self._writing = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self, request: Metered) -> None:
        """A request begins to use something."""
        self._taken[request] = Amounts()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def close(self, request: Metered) -> None:
        """It has used all that it will."""
        self._take(request)
        del self._taken[request]

    async def write(self) -> None:
        """Write down all that was used up to now; raises StorageFailed, and nothing is lost."""
        async with self._writing:
            await self._write_batch()  # one that failed
            for request in self._taken:
                self._take(request)
            self._batch, self._sums = self._sums, {}
            self._num_batches += bool(self._batch)
            await self._write_batch()

    async def _write_batch(self) -> None:
        if not self._batch:
            return
        now = int(self._clock())
        await asyncio.to_thread(
            self._store.add, self._writer_id, self._num_batches, self._batch, now
        )
        self._batch = {}

    async def stop(self) -> None:
        """Write the rest and end; what cannot be written is lost, and said so."""
        self._stopping.set()
        if (task := self._task) is not None:
            await asyncio.wait([task])
        try:
            await self.write()
        except StorageFailed as error:
            log.warning("the usage of the last seconds is lost: %s", error)

    def _take(self, request: Metered) -> None:
        used = request.used()
        new = used.minus(self._taken[request])
        if any(new):
            hour = int(self._clock()) // HOUR_S * HOUR_S
            account = Account(hour, request.tenant, request.adapter)
            self._sums[account] = self._sums.get(account, Amounts()).plus(new)
            self._taken[request] = used

    async def _run(self) -> None:
        try:
            while (self._taken or self._sums or self._batch) and not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), WRITE_S)
                try:
                    await self.write()
                except StorageFailed as error:
                    log.warning("usage was not written, and will be again: %s", error)
        finally:
            self._task = None  # in the same step as the last look: or `open` could miss the end
