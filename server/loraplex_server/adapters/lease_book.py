"""Who holds which adapter right now."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.references import AdapterReference
from loraplex_server.adapters.store import AdapterStore
from loraplex_server.adapters.version_row import VersionRow


class LeaseBook:
    """Owned by the catalogue; methods may be called from any thread.

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

    def try_acquire(self, reference: AdapterReference) -> AdapterLease | None:
        """Return a lease by what is known; None where that takes asking. Does not block.

        Raises:
            AdapterNotFound: as far as is known, see `AdaptersInUse.try_hold`.
        """
        row = self._store.in_use.try_hold(reference)
        if row is None:
            return None
        path = self._store.files.local_copy(row)
        if path is None:
            self._store.in_use.release(row.adapter_id, row.name)
            return None
        return self._lease(row, path)

    def acquire(self, reference: AdapterReference, *, is_fresh: bool = False) -> AdapterLease:
        """Resolve a reference and hold what it stands for; raises as `AdapterCatalog.acquire`."""
        row = self._store.in_use.resolve_and_hold(reference, is_fresh=is_fresh)
        # Outside the lock, since a remote store may have to fetch the file; held, so it stays.
        try:
            path = self._store.files.local_path(row)
        except StorageFailed:
            self._store.in_use.release(row.adapter_id, row.name)
            raise
        return self._lease(row, path)

    def _lease(self, row: VersionRow, path: Path) -> AdapterLease:
        manifest = AdapterManifest(row.adapter_id, path=str(path), spec=row.adapter.spec)
        lease = AdapterLease(self._record_of(row), manifest, self._release)
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
        self._store.in_use.release(lease.record.id, lease.record.name)
