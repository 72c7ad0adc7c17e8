"""Names that expire when nobody has used them for long: noting uses, and deleting what is due."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Final

from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import AdapterNotFound
from loraplex_server.adapters.last_uses import LastUses
from loraplex_server.adapters.references import AdapterReference
from loraplex_server.adapters.registry import Registry
from loraplex_server.adapters.removal import RemovedVersions
from loraplex_server.adapters.store import AdapterStore

_AT_ONCE: Final = 100
#: Of a registry that other servers use too, which write uses down twice a minute. One that is cut
#: off goes on with names for `outage_s` more before it can write.
SHARED_EXPIRY_GRACE_S: Final = 90


class NameExpiry:
    """Owned by the catalogue; every method may be called from any thread. Times are Unix seconds.

    Args:
        is_shared: other servers may have used a name and not written that down yet.
        outage_s: how long they go on with known names while the registry does not answer them.
    """

    def __init__(
        self, registry: Registry, store: AdapterStore, *, is_shared: bool, outage_s: float
    ) -> None:
        self._registry = registry
        self._store = store
        self._grace_s = SHARED_EXPIRY_GRACE_S + math.ceil(outage_s) if is_shared else 0
        self.uses = LastUses()

    def delete_expired(self, now: int) -> Iterator[RemovedVersions]:
        """Delete some of the names whose time is up and that nobody uses; raises StorageFailed."""
        self.write_uses(now)
        due = now - self._grace_s
        with (
            storage_errors("list expired adapters"),
            self._store.database.connect() as connection,
        ):
            names = self._registry.expired(connection, due, _AT_ONCE)
        for name in names:
            with contextlib.suppress(AdapterNotFound):  # another server was faster
                removed = self._store.remove(AdapterReference(name), now=now, expired_at=due)
                if removed is not None:
                    yield removed

    def write_uses(self, now: int) -> None:
        """Write down when names were used, those of running requests too; raises StorageFailed."""
        for name in self._store.in_use.names():
            self.uses.note(name, now)
        with (
            self.uses.taken() as uses,
            storage_errors("note uses"),
            self._store.database.begin() as connection,
        ):
            self._registry.touch(connection, uses)
