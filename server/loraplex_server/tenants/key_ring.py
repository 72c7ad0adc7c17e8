"""Which keys are good right now, as the event loop asks for every request.

Another server's change is seen `STALE_S` after it at the latest: what was read longer ago than that
decides nothing, but for `outage_s` where the database does not answer. While requests come, keys
are read again beside them, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Final

import anyio
import anyio.to_thread

from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.tenants.api_key import ApiKey, digest_of
from loraplex_server.tenants.key_store import KeyStore, KnownKeys
from loraplex_server.tenants.principal import SETTING_KEY_ID, Role

log = logging.getLogger(__name__)

#: Read again in the background what is older than this.
REFRESH_S: Final = 0.5
#: Never decide by what is older than this.
STALE_S: Final = 1.5
#: A database that takes longer does not answer: one that is frozen breaks no connection.
SILENT_S: Final = 2.0


class KeyRing:
    """Used from one event loop; `write_uses` and `last_uses` from any thread.

    Args:
        setting: the secret of the settings, an admin's.
        outage_s: how long what is known decides while the database does not answer.
        clock: Unix seconds, for expiry.
    """

    def __init__(
        self,
        store: KeyStore,
        setting: str | None = None,
        *,
        outage_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._clock = clock
        self._outage_s = outage_s
        self._is_cut_off = False
        self._setting_digest = digest_of(setting) if setting else None
        self._setting = ApiKey(SETTING_KEY_ID, "api_key of the settings", Role.ADMIN, "", 0)
        self._keys = KnownKeys(-1, {}, is_any=False, tenants=frozenset())
        self._read_s = -math.inf
        self._reading: asyncio.Task[None] | None = None
        self._uses: dict[str, int] = {}
        # Its own: whoever fills the threads that all share must not hold up every request.
        self._thread = anyio.CapacityLimiter(1)

    @property
    def has_setting(self) -> bool:
        return self._setting_digest is not None

    async def current(self) -> KnownKeys:
        """Return the keys as they were at most `STALE_S` seconds ago.

        Raises:
            StorageFailed: the database has not answered for so long, and for `outage_s`.
        """
        age_s = time.monotonic() - self._read_s
        if age_s > REFRESH_S:
            reading = self._read_again()
            if age_s > STALE_S and not (self._is_cut_off and age_s <= self._outage_s):
                await self._wait_for(reading)
        return self._keys

    async def _wait_for(self, reading: asyncio.Task[None]) -> None:
        await asyncio.wait([reading], timeout=SILENT_S)
        is_known = time.monotonic() - self._read_s <= self._outage_s
        if is_known and not reading.done():
            self._is_cut_off = True  # until it answers: nobody else waits for it
            return
        try:
            await asyncio.shield(reading)
        except StorageFailed:
            if not is_known:
                raise

    async def is_on(self) -> bool:
        """Whether requests need keys; raises StorageFailed."""
        return self.has_setting or (await self.current()).is_any

    async def find(self, secret: str) -> ApiKey | None:
        """Return the key with this secret, which may have expired; raises StorageFailed."""
        digest = digest_of(secret)
        if digest == self._setting_digest:
            return self._setting
        key = (await self.current()).by_digest.get(digest)
        if key is not None:
            self._uses[key.key_id] = int(self._clock())
        return key

    async def refresh(self) -> None:
        """See a change of this server's own at once."""
        if self._reading is not None:  # it may have begun before the change
            await asyncio.wait([self._reading])
        await asyncio.shield(self._read_again())

    def last_uses(self) -> dict[str, int]:
        """Return uses that the database does not know yet, by id, in Unix seconds."""
        return dict(self._uses)

    def write_uses(self) -> None:
        """Write down when keys were used; blocks. Raises StorageFailed, and nothing is lost."""
        uses = dict(self._uses)
        self._store.touch(uses)
        for key_id, when in uses.items():
            if self._uses.get(key_id) == when:
                self._uses.pop(key_id, None)

    def _read_again(self) -> asyncio.Task[None]:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(self._end_reading)
        return self._reading

    def _end_reading(self, reading: asyncio.Task[None]) -> None:
        self._reading = None
        if reading.cancelled():
            return
        error, was_cut_off = reading.exception(), self._is_cut_off
        self._is_cut_off = error is not None
        if error is not None and not was_cut_off:  # else every request would say so
            log.warning("keys were not read, and will be again: %s", error)

    async def _read(self) -> None:
        began_s = time.monotonic()
        # After an outage the database may be an older one, whose count means something else.
        known = -1 if self._is_cut_off else self._keys.num_changes
        keys = await anyio.to_thread.run_sync(self._read_if_changed, known, limiter=self._thread)
        if keys is not None:
            self._keys = keys
        self._read_s = began_s

    def _read_if_changed(self, known: int) -> KnownKeys | None:
        return None if self._store.num_changes() == known else self._store.read()
