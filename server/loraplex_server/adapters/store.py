"""Registry and files together: what may change both, one step at a time.

Invariants:
- A name resolves in one atomic step (one lock over look-up and count) to a held adapter; what the
  name stands for later is of no concern to the hold.
- An adapter's file exists while a version or a hold refers to it. Whoever registers holds the id
  too while it stores the file, so that a concurrent delete of the same content cannot take it.
- A registration is in the database or it did not happen; files without a row are swept.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from loraplex_server.adapters.audit_log import Actor, AuditEntry, write_audit
from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import (
    AdapterNotFound,
    AmbiguousVersion,
    StorageFailed,
    VersionIsCurrent,
)
from loraplex_server.adapters.holds import AdapterHolds, Drain
from loraplex_server.adapters.references import AdapterReference
from loraplex_server.adapters.registration import Registration
from loraplex_server.adapters.registration_rules import (
    check_owner,
    check_ownership,
    check_replaceable,
)
from loraplex_server.adapters.registry import (
    NewVersion,
    Registry,
    VersionRow,
    is_stored,
    stored_ids,
)
from loraplex_server.adapters.registry_database import open_database
from loraplex_server.adapters.registry_migrations import BlobUpgrade

_log = logging.getLogger(__name__)

#: Of a registry that other servers use too: whoever stores a file has so long to register it, and
#: whoever runs on a deleted one elsewhere so long to have read it.
SHARED_GRACE_S: Final = 3600.0


#: Of what nobody asked for: names expire.
_ITSELF: Final = Actor()


@dataclass(frozen=True)
class RemovedVersions:
    """What a delete took away.

    Attributes:
        row: the version that was named, by itself or as the name's current one.
        drains: one for each adapter that somebody may still use.
        is_name: the name went, with all its versions.
    """

    row: VersionRow
    drains: tuple[Drain, ...]
    is_name: bool


class AdapterStore:
    """Owned by the catalogue; every method blocks and may be called from any thread."""

    def __init__(
        self,
        registry: Registry,
        blobs: BlobStore,
        *,
        database_url: str,
        upgrade_blob: BlobUpgrade,
        is_shared: bool,
        keep_versions: int,
        on_discard: Callable[[str], None],
        at_stage: Callable[[str], None],
    ) -> None:
        """Open the database and sweep what nobody refers to.

        Args:
            is_shared: other servers use registry and files too: no file is deleted before
                `SHARED_GRACE_S` have passed.
            on_discard: told of each adapter that nothing refers to any more, from any thread.
            at_stage: told how far a change has come; for tests that stop there.

        Raises:
            StorageFailed
        """
        self._registry = registry
        self._blobs = blobs
        self._is_shared = is_shared
        self._keep_versions = keep_versions
        self._on_discard = on_discard
        self._at_stage = at_stage
        self._lock = threading.Lock()
        self._holds = AdapterHolds()
        with storage_errors("open the registry"):
            self.database = open_database(database_url, upgrade_blob)
        try:
            self.sweep_files()
        except BaseException:
            self.database.dispose()
            raise

    def close(self) -> None:
        self.database.dispose()

    def sweep_files(self) -> None:
        """Delete files that no row refers to; at any time where the registry is shared."""

        def keep() -> set[str]:
            with self.database.connect() as connection:
                return stored_ids(connection)

        with storage_errors("sweep the adapters' files"):
            self._blobs.sweep(keep, min_age_s=SHARED_GRACE_S if self._is_shared else 0.0)

    # ---- holding ---------------------------------------------------------------------------

    def resolve(self, reference: AdapterReference) -> VersionRow:
        """Return what the reference stands for now.

        Raises:
            AdapterNotFound, AmbiguousVersion, StorageFailed
        """
        with storage_errors("look the adapter up"), self.database.connect() as connection:
            return self._resolve(connection, reference)

    def resolve_and_hold(self, reference: AdapterReference) -> VersionRow:
        """The same, and hold it in the same step, by its name."""
        with self._lock:
            row = self.resolve(reference)
            self._holds.hold(row.adapter_id, row.name)
        return row

    def hold(self, adapter_id: str) -> None:
        """Hold an adapter that may have no name yet."""
        with self._lock:
            self._holds.hold(adapter_id)

    def release(self, adapter_id: str, name: str | None = None) -> None:
        """End a hold; if it was the last of a deleted adapter, its file goes."""
        with self._lock:
            is_over = self._holds.release(adapter_id, name)
            freed = self._delete_file(adapter_id) if is_over else 0
            drained = self._holds.take_drained(adapter_id, is_gone=is_over)
        self._tell(adapter_id if is_over else None, drained, freed)

    def doom_unless_named(self, adapter_id: str) -> None:
        """Have the file of a held adapter deleted at the end, as its registration has failed."""
        with self._lock, contextlib.suppress(SQLAlchemyError):  # else it is swept at the next start
            self._doom_unless_named(adapter_id)

    def num_held(self, adapter_id: str) -> int:
        with self._lock:
            return self._holds.num_held(adapter_id)

    def num_held_by(self, adapter_id: str, name: str) -> int:
        """Return how many users hold the adapter who asked for it by `name`."""
        with self._lock:
            return self._holds.num_held_by(adapter_id, name)

    def names_in_use(self) -> set[str]:
        with self._lock:
            return set(self._holds.names_in_use())

    # ---- changing --------------------------------------------------------------------------

    def add(self, new: NewVersion, wish: Registration, now: int) -> tuple[VersionRow, bool]:
        """Commit a version, or find that the name has this content already.

        The caller holds the id, and its file is stored. If it ends without a name, the file is
        doomed again, and goes when the last hold ends.

        Returns:
            The version, and whether anything but settings changed.
        """
        with self._lock, storage_errors("register the adapter"):
            try:
                row, is_new, gone = self._add(new, wish, now)
            finally:
                self._doom_unless_named(new.adapter.adapter_id)
            self._at_stage("committed")
            self._holds.take_over(new.adapter.adapter_id, new.name)
            endings = [self._doom(adapter_id) for adapter_id in gone]
            drained = self._holds.take_drained(new.adapter.adapter_id, is_gone=False)
        self._tell(None, drained, 0)
        for ending in endings:
            self._tell(*ending)
        return row, is_new

    def set_current(self, name: str, row: VersionRow, now: int, actor: Actor) -> VersionRow:
        """Let the name stand for another of its versions."""
        with self._lock, storage_errors("roll the adapter back"):
            with self.database.begin() as connection:
                self._registry.lock(connection, name)
                found = self._registry.find_version(connection, name, row.version)
                if found is None:
                    raise AdapterNotFound(f"{name}@{row.adapter_id}")
                if not found.is_current:
                    self._registry.set_current(connection, name, row.version, now)
                    _note(connection, "rollback", found, actor, now, version=found.version)
                changed = self._registry.find_version(connection, name, row.version)
            self._at_stage("rolled back")
        assert changed is not None, "it was there a moment ago, in the same transaction"
        return changed

    def remove(
        self,
        reference: AdapterReference,
        *,
        now: int,
        actor: Actor = _ITSELF,
        is_expiry: bool = False,
    ) -> RemovedVersions | None:
        """Take a name with all its versions away, or one version that is not current.

        Args:
            is_expiry: only if the name has expired and nobody uses it; None otherwise.

        Raises:
            AdapterNotFound, AmbiguousVersion, VersionIsCurrent, StorageFailed
        """
        name = reference.name
        with self._lock:
            with storage_errors("delete the adapter"), self.database.begin() as connection:
                self._registry.lock(connection, name)
                row = self._resolve(connection, reference)
                if is_expiry and not self._has_expired(connection, name, now):
                    return None
                if reference.id_prefix is not None and row.is_current:
                    raise VersionIsCurrent(name, row.adapter_id)
                if reference.id_prefix is None:
                    ids = {v.adapter_id for v in self._registry.versions(connection, name, None)}
                    gone = self._registry.remove_name(connection, name)
                else:
                    ids = {row.adapter_id}
                    gone = self._registry.remove_versions(connection, name, [row])
                details = {"ids": sorted(ids), "expired": is_expiry}
                _note(connection, "delete", row, actor, now, **details)
            self._at_stage("unnamed")
            drains = tuple(Drain(i, name, is_last=i in gone) for i in sorted(ids))
            for drain in drains:
                self._holds.wait(drain)
            endings = [self._doom(i) if i in gone else self._ending(i) for i in sorted(ids)]
        for ending in endings:
            self._tell(*ending)
        return RemovedVersions(row, drains, is_name=reference.id_prefix is None)

    # ---- pieces, under the lock ------------------------------------------------------------

    def _resolve(self, connection: Connection, reference: AdapterReference) -> VersionRow:
        if reference.id_prefix is None:
            row = self._registry.find(connection, reference.name)
            rows = [row] if row else []
        else:
            rows = self._registry.find_by_id(connection, reference.name, reference.id_prefix)
        if not rows:
            raise AdapterNotFound(str(reference))
        if len(rows) > 1:
            raise AmbiguousVersion(str(reference))
        return rows[0]

    def _add(
        self, new: NewVersion, wish: Registration, now: int
    ) -> tuple[VersionRow, bool, set[str]]:
        name, adapter_id = new.name, new.adapter.adapter_id
        with self.database.begin() as connection:
            if wish.owner:
                self._registry.lock_owner(connection, wish.owner)
            self._registry.lock(connection, name)
            current = self._registry.find(connection, name)
            check_ownership(wish, current)
            is_new = current is None or current.adapter_id != adapter_id
            if is_new:
                check_replaceable(wish, current)
                check_owner(self._registry, connection, wish, current, new)
                self._make_current(connection, new, now)
            else:
                assert current is not None, "it has the content"
                self._registry.set_current(connection, name, current.version, now)
            self._registry.set_settings(connection, name, wish.settings)
            old = self._surplus(connection, name, current)
            gone = self._registry.remove_versions(connection, name, old) if old else set()
            row = self._registry.find(connection, name)
            assert row is not None, "it was written in the same transaction"
            if is_new or wish.settings:
                verb = ("replace" if current else "create") if is_new else "change"
                details = {"version": row.version, "source": row.source, "pruned": sorted(gone)}
                _note(connection, verb, row, wish.actor, now, **details)
        return row, is_new, gone

    def _make_current(self, connection: Connection, new: NewVersion, now: int) -> None:
        earlier = self._registry.find_by_id(connection, new.name, new.adapter.adapter_id)
        if earlier:
            self._registry.set_current(connection, new.name, earlier[0].version, now)
        else:
            self._registry.add_version(connection, new)

    def _surplus(
        self, connection: Connection, name: str, former: VersionRow | None
    ) -> list[VersionRow]:
        """Return the oldest versions beyond those to keep; never the current one.

        The one that was current until now counts as the newest of the others: it is what a
        rollback most likely wants.
        """
        rows = self._registry.versions(connection, name, None)
        others = [row for row in rows if not row.is_current]
        others.sort(key=lambda row: former is None or row.version != former.version)
        return others[self._keep_versions - 1 :]

    def _has_expired(self, connection: Connection, name: str, now: int) -> bool:
        is_used = name in self._holds.names_in_use()
        return not is_used and self._registry.is_expired(connection, name, now)

    def _doom(self, adapter_id: str) -> tuple[str | None, list[Drain], int]:
        """No version refers to the adapter any more."""
        if not self._holds.doom(adapter_id):
            return self._ending(adapter_id)
        freed = self._delete_file(adapter_id)
        return adapter_id, self._holds.take_drained(adapter_id, is_gone=True), freed

    def _ending(self, adapter_id: str) -> tuple[None, list[Drain], int]:
        return None, self._holds.take_drained(adapter_id, is_gone=False), 0

    def _doom_unless_named(self, adapter_id: str) -> None:
        with self.database.connect() as connection:
            is_named = is_stored(connection, adapter_id)
        if is_named:
            self._holds.spare(adapter_id)
        else:
            self._holds.doom(adapter_id)

    def _delete_file(self, adapter_id: str) -> int:
        """Return the bytes freed. Under the lock: nobody begins to use the file meanwhile.

        A failure costs only disk space, until the sweep at the next start: no reason to fail the
        delete, or the request that happened to end last.
        """
        try:
            if self._is_shared:
                self._blobs.forget(adapter_id)
                return 0
            freed = self._blobs.delete(adapter_id)
        except OSError as error:
            _log.warning("adapter file %s was not deleted: %s", adapter_id, error)
            return 0
        self._at_stage("file deleted")
        return freed

    # ---- outside the lock ------------------------------------------------------------------

    def _tell(self, discarded: str | None, drained: list[Drain], freed: int) -> None:
        """Say that an adapter is gone, then that nobody needs to wait for it."""
        if discarded is not None:
            self._on_discard(discarded)
        for drain in drained:
            # Whoever waited may have been cancelled, such as when the server stops.
            if drain.freed.set_running_or_notify_cancel():
                drain.freed.set_result(freed)

    def local_path(self, row: VersionRow) -> Path:
        """Return the adapter's file on a local disk; the caller holds it.

        Raises:
            StorageFailed
        """
        try:
            with storage_errors("open the adapter's file"):
                return self._blobs.local_path(row.adapter_id)
        except StorageFailed as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise StorageFailed(
                    f"the weights of {row.name!r} are gone from the data folder; upload it again"
                ) from error
            raise


def _note(
    connection: Connection, verb: str, row: VersionRow, actor: Actor, now: int, **details: Any
) -> None:
    entry = AuditEntry(f"adapter.{verb}", row.name, row.owner, row.adapter_id, details, actor)
    write_audit(connection, entry, now)
