"""Who holds which adapter right now."""

from __future__ import annotations

import threading
from collections.abc import Callable

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.references import AdapterReference
from loraplex_server.adapters.registry import VersionRow
from loraplex_server.adapters.store import AdapterStore


class LeaseBook:
    """Owned by the catalogue; every method may be called from any thread, and blocks.

    Args:
        record_of: says what a row stands for.
        note_use: called with a name when a lease of it begins, and when it ends.
    """

    def __init__(
        self,
        store: AdapterStore,
        record_of: Callable[[VersionRow], AdapterRecord],
        note_use: Callable[[str], None],
    ) -> None:
        self._store = store
        self._record_of = record_of
        self._note_use = note_use
        self._lock = threading.Lock()
        self._leases: set[AdapterLease] = set()

    def acquire(self, reference: AdapterReference) -> AdapterLease:
        """Resolve a reference and hold what it stands for; raises as `AdapterCatalog.acquire`."""
        row = self._store.resolve_and_hold(reference)
        # Outside the lock, since a remote store may have to fetch the file; held, so it stays.
        try:
            lease = AdapterLease(self._record_of(row), self._manifest(row), self._release)
        except StorageFailed:
            self._store.release(row.adapter_id, row.name)
            raise
        self._note_use(row.name)
        with self._lock:
            self._leases.add(lease)
        return lease

    def _release(self, lease: AdapterLease) -> None:
        with self._lock:
            if lease not in self._leases:
                return
            self._leases.discard(lease)
        self._note_use(lease.record.name)
        self._store.release(lease.record.id, lease.record.name)

    def _manifest(self, row: VersionRow) -> AdapterManifest:
        path = self._store.local_path(row)
        return AdapterManifest(adapter_id=row.adapter_id, path=str(path), spec=row.adapter.spec)
