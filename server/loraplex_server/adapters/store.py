"""Registry and files together: what may change both, one step at a time.

Invariants:
- An adapter's file exists while a version or a hold refers to it. Whoever registers holds the id
  too while it stores the file, so that a concurrent delete of the same content cannot take it.
- A registration is in the database or it did not happen; files without a row are swept.
- Whatever is changed here is known here at once, and written down for the servers that share the
  registry in the same transaction.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_server.adapters.adapter_files import AdapterFiles
from loraplex_server.adapters.audit_log import Actor, AuditEntry, write_audit
from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.change_feed import ChangeFeed
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import (
    AdapterNotFound,
    AmbiguousVersion,
    VersionIsCurrent,
)
from loraplex_server.adapters.in_use import AdaptersInUse
from loraplex_server.adapters.local_copies import LocalCopies
from loraplex_server.adapters.name_changes import NameChange, note_change
from loraplex_server.adapters.other_bases import warn_of_other_bases
from loraplex_server.adapters.pins import change_settings
from loraplex_server.adapters.references import AdapterReference
from loraplex_server.adapters.registration import Registration
from loraplex_server.adapters.registration_rules import (
    check_owner,
    check_ownership,
    check_replaceable,
)
from loraplex_server.adapters.registry import Registry, is_stored
from loraplex_server.adapters.registry_database import open_database, opening_registry
from loraplex_server.adapters.registry_migrations import BlobUpgrade
from loraplex_server.adapters.removal import RemovedVersions
from loraplex_server.adapters.storage_places import StoragePlaces
from loraplex_server.adapters.version_row import NewVersion, VersionRow

#: Of what nobody asked for: names expire.
_ITSELF: Final = Actor()


class AdapterStore:
    """Owned by the catalogue; every method blocks and may be called from any thread."""

    def __init__(
        self,
        registry: Registry,
        blobs: BlobStore,
        copies: LocalCopies,
        *,
        database_url: str,
        upgrade_blob: BlobUpgrade,
        places: StoragePlaces,
        keep_versions: int,
        on_discard: Callable[[str], None],
        at_stage: Callable[[str], None],
    ) -> None:
        """Open the database and sweep what nobody refers to.

        Args:
            copies: of the store's files, on this machine's disk.
            places: where `database_url` and `blobs` are. If they are shared, no file is deleted
                before `adapter_files.SHARED_GRACE_S` have passed, and changes are written down
                for the others.
            on_discard: told of each adapter that nothing refers to any more, from any thread.
            at_stage: told how far a change has come; for tests that stop there.

        Attributes:
            in_use: who holds what on this server.
            files: of what is registered.
            changes: what other servers change.

        Raises:
            StorageFailed: one of them does not answer, or the files are another registry's.
        """
        self._registry = registry
        self._is_shared = is_shared = places.is_shared
        self._keep_versions = keep_versions
        self._at_stage = at_stage
        # One change at a time: what it leaves to be deleted must not be registered meanwhile.
        self._changing = threading.Lock()
        # One change of settings at a time: what is pinned together is bounded.
        self._pinning = threading.Lock()
        self.in_use = AdaptersInUse(
            self.resolve,
            blobs,
            is_shared=is_shared,
            outage_s=places.outage_s,
            on_discard=on_discard,
            at_stage=at_stage,
        )
        opening = opening_registry(is_shared=is_shared)
        with storage_errors(opening):
            self.database = open_database(database_url, upgrade_blob)
        try:
            # Before all else: what is deleted during it is followed.
            self.changes = ChangeFeed(self.database, registry.scope, self.in_use)
            self.files = AdapterFiles(blobs, copies, self.database, places)
            self.files.sweep_at_start()
            with storage_errors(opening), self.database.connect() as connection:
                warn_of_other_bases(connection, registry.scope)
        except BaseException:
            self.database.dispose()
            raise

    def close(self) -> None:
        self.database.dispose()

    def make_room(self) -> None:
        """Delete copies of files on this machine before its disk fills up; nobody holds them."""
        self.files.make_room(self.in_use.drop_copy)

    # ---- looking up ------------------------------------------------------------------------

    def resolve(self, reference: AdapterReference) -> VersionRow:
        """Return what the reference stands for now.

        Raises:
            AdapterNotFound, AmbiguousVersion, StorageFailed
        """
        with storage_errors("look the adapter up"), self.database.connect() as connection:
            return self._resolve(connection, reference)

    def version(self, name: str, version: int) -> VersionRow:
        """Return a version of a name by its number; raises AdapterNotFound, StorageFailed."""
        with storage_errors("look the version up"), self.database.connect() as connection:
            found = self._registry.find_version(connection, name, version)
        if found is None:
            raise AdapterNotFound(f"{name} version {version}")
        return found

    def doom_unless_named(self, adapter_id: str) -> None:
        """Have the file of a held adapter deleted at the end, as its registration has failed."""
        with (
            self._changing,
            contextlib.suppress(SQLAlchemyError),
        ):  # else it is swept at the next start
            self._settle(adapter_id)

    # ---- changing --------------------------------------------------------------------------

    def add(self, new: NewVersion, wish: Registration, now: int) -> tuple[VersionRow, bool]:
        """Commit a version, or find that the name has this content already.

        The caller holds the id, and its file is stored. If it ends without a name, the file is
        doomed again, and goes when the last hold ends.

        Returns:
            The version, and whether anything but settings changed.
        """
        with self._changing, storage_errors("register the adapter"):
            try:
                row, is_new, gone = self._add(new, wish, now)
            finally:
                self.in_use.forget(new.name)  # it may be committed even if that was not heard
                self._settle(new.adapter.adapter_id)
            self._at_stage("committed")
            self.in_use.take_place(new.name, new.adapter.adapter_id, gone)
        return row, is_new

    def set_current(self, name: str, row: VersionRow, now: int, actor: Actor) -> VersionRow:
        """Let the name stand for another of its versions."""
        with self._changing, storage_errors("roll the adapter back"):
            try:
                changed = self._set_current(name, row, now, actor)
            finally:
                self.in_use.forget(name)
            self._at_stage("rolled back")
        return changed

    def _set_current(self, name: str, row: VersionRow, now: int, actor: Actor) -> VersionRow:
        with self.database.begin() as connection:
            self._registry.lock(connection, name)
            found = self._registry.find_version(connection, name, row.version)
            if found is None or found.adapter_id != row.adapter_id:  # it was deleted meanwhile
                raise AdapterNotFound(f"{name}@{row.adapter_id}")
            if not found.is_current:
                self._registry.set_current(connection, name, row.version, now)
                _note(connection, "rollback", found, actor, now, version=found.version)
                self.note_change(connection, name, now)
            changed = self._registry.find_version(connection, name, row.version)
        assert changed is not None, "it was there a moment ago, in the same transaction"
        return changed

    def change(
        self,
        name: str,
        settings: Mapping[str, Any],
        pages_of: Callable[[AdapterSpec], int],
        max_pinned_pages: int | None,
        *,
        now: int,
        actor: Actor,
    ) -> VersionRow:
        """Change the given fields of a name's settings.

        Raises:
            AdapterNotFound, PinRefused, StorageFailed
        """
        with self._pinning, storage_errors("change the adapter"):
            try:
                with self.database.begin() as connection:
                    row = change_settings(
                        self._registry,
                        connection,
                        name,
                        settings,
                        pages_of,
                        max_pinned_pages,
                        actor=actor,
                        now=now,
                    )
                    self.note_change(connection, name, now)
            finally:
                self.in_use.forget(name)
        return row

    def remove(
        self,
        reference: AdapterReference,
        *,
        now: int,
        actor: Actor = _ITSELF,
        expired_at: int | None = None,
        cancels: bool = False,
    ) -> RemovedVersions | None:
        """Take a name with all its versions away, or one version that is not current.

        Args:
            expired_at: only if the name had expired by then and nobody uses it here; else None is
                returned.
            cancels: other servers are to end what runs on it there.

        Raises:
            AdapterNotFound, AmbiguousVersion, VersionIsCurrent, StorageFailed
        """
        name = reference.name
        with self._changing, storage_errors("delete the adapter"):
            try:
                removed = self._remove(reference, now, actor, expired_at, cancels)
            finally:
                self.in_use.forget(name)
            if removed is None:
                return None
            self._at_stage("unnamed")
            row, ids, gone = removed
            drains = self.in_use.take_away(name, ids, gone)
        return RemovedVersions(row, tuple(drains), is_name=reference.id_prefix is None)

    def _remove(
        self,
        reference: AdapterReference,
        now: int,
        actor: Actor,
        expired_at: int | None,
        cancels: bool,
    ) -> tuple[VersionRow, set[str], set[str]] | None:
        """Return what the reference stood for, all that was removed, and what has no name now."""
        name = reference.name
        with self.database.begin() as connection:
            self._registry.lock(connection, name)
            self._registry.lock_contents(connection, name)
            row = self._resolve(connection, reference)
            if expired_at is not None and not self._has_expired(connection, name, expired_at):
                return None
            if reference.id_prefix is not None and row.is_current:
                raise VersionIsCurrent(name, row.adapter_id)
            if reference.id_prefix is None:
                ids = {v.adapter_id for v in self._registry.versions(connection, name, None)}
                gone = self._registry.remove_name(connection, name)
            else:
                ids = {row.adapter_id}
                gone = self._registry.remove_versions(connection, name, [row])
            details = {"ids": sorted(ids), "expired": expired_at is not None}
            _note(connection, "delete", row, actor, now, **details)
            self.note_change(connection, name, now, removed=ids, gone=gone, cancels=cancels)
        return row, ids, gone

    # ---- with other servers ------------------------------------------------------------------

    def note_change(
        self,
        connection: Connection,
        name: str,
        now: int,
        *,
        removed: Collection[str] = (),
        gone: Collection[str] = (),
        cancels: bool = False,
    ) -> None:
        """Have other servers know that a name was changed, once the transaction is committed."""
        if self._is_shared:
            scope = self._registry.scope
            change = NameChange(scope, name, frozenset(removed), frozenset(gone), cancels)
            note_change(connection, change, now)

    # ---- pieces ------------------------------------------------------------------------------

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
            self._registry.lock_contents(connection, name, adapter_id)
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
            if is_new or wish.settings or old:
                removed = {version.adapter_id for version in old}
                self.note_change(connection, name, now, removed=removed, gone=gone)
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
        is_used = name in self.in_use.names()
        return not is_used and self._registry.is_expired(connection, name, now)

    def _settle(self, adapter_id: str) -> None:
        with self.database.connect() as connection:
            is_named = is_stored(connection, adapter_id)
        self.in_use.settle(adapter_id, is_named=is_named)


def _note(
    connection: Connection, verb: str, row: VersionRow, actor: Actor, now: int, **details: Any
) -> None:
    entry = AuditEntry(f"adapter.{verb}", row.name, row.owner, row.adapter_id, details, actor)
    write_audit(connection, entry, now)
