"""The adapter catalogue: which name stands for which adapter, durably.

What may be registered is for `checks` to say, what a change does to registry and files for `store`;
here is what the rest of the server sees: records, leases, versions, settings.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.adapter_writer import AdapterWriter
from loraplex_server.adapters.audit_log import Actor
from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.change_feed import ChangeFeed
from loraplex_server.adapters.checks import AdapterChecks
from loraplex_server.adapters.data_dir import DataDir, storage_errors
from loraplex_server.adapters.errors import AdapterNotFound, BaseNameTaken, StorageFailed
from loraplex_server.adapters.expiry import NameExpiry
from loraplex_server.adapters.holds import Drain
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.adapters.lease_book import LeaseBook
from loraplex_server.adapters.local_copies import LocalCopies
from loraplex_server.adapters.names import check_adapter_name
from loraplex_server.adapters.reader import AdapterReader
from loraplex_server.adapters.record import AdapterLimits, AdapterRecord
from loraplex_server.adapters.references import AdapterReference, check_id_prefix, parse_reference
from loraplex_server.adapters.registrar import AdapterRegistrar
from loraplex_server.adapters.registration import Registration
from loraplex_server.adapters.registry import Registry, scope_of
from loraplex_server.adapters.registry_database import sqlite_url
from loraplex_server.adapters.removal import Removal, RemovedVersions
from loraplex_server.adapters.storage_places import IN_DATA_DIR, StoragePlaces
from loraplex_server.adapters.store import AdapterStore
from loraplex_server.adapters.upload import UploadStaging
from loraplex_server.adapters.validation import Validation, validate
from loraplex_server.adapters.version_record import make_record
from loraplex_server.adapters.version_row import VersionRow

DEFAULT_KEEP_VERSIONS: Final = 5
_SPEC_CACHE: Final = 1024

#: Who changes what where nobody says.
_SOMEBODY: Final = Actor()

_log = logging.getLogger(__name__)


class AdapterCatalog:
    """Owned by the API process, one per data folder; every method may be called from any thread.

    Every method blocks (disk, SQL; `register` for as long as reading the adapter takes), so an
    event loop calls them in worker threads.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        pool_layout: PoolLayout,
        base_name: str,
        reader: AdapterReader,
        base_aliases: tuple[str, ...] = (),
        base_id: str | None = None,
        places: StoragePlaces = IN_DATA_DIR,
        keep_versions: int = DEFAULT_KEEP_VERSIONS,
        limits: AdapterLimits | None = None,
        on_discard: Callable[[str], None] = lambda adapter_id: None,
        at_stage: Callable[[str], None] = lambda stage: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the catalogue and sweep what an interrupted run left behind.

        Args:
            data_dir: created if missing; one process at a time.
            base_name: the name requests use for the base; no adapter may have it.
            reader: reads uploaded folders for this base.
            base_aliases: other names of the same base (hub id, folder), which are reserved too.
            base_id: what tells this base from others across restarts, `base_name` by default.
                Give it where the served name may change while the model stays.
            places: where names and files are, if not in `data_dir`.
            keep_versions: of each name, the current one included; older ones are deleted.
            on_discard: called with an adapter id, in the thread that ended its last use, when
                no name and no lease refers to it any more. A hint to free its pages: the same
                content may be registered again at any time.
            at_stage: called with what has been done at each step of a change; for tests.
            clock: Unix seconds.

        Raises:
            StorageFailed: the folder cannot be used, or another process uses it.
            BaseNameTaken: an adapter of this base has its name, which was free before.
        """
        self._num_pages = lru_cache(_SPEC_CACHE)(
            lambda spec: AdapterLayout(pool_layout, spec).num_pages
        )
        self._base_names = (base_name, *base_aliases)
        self._limits = limits or AdapterLimits()
        self._clock = clock
        self._checks = AdapterChecks(reader, pool_layout, at_stage)
        self._is_closed = False
        scope = scope_of(base_id or base_name, pool_layout.geometry)
        self._registry = Registry(scope, pool_layout.geometry.num_layers)
        self._dir = DataDir(data_dir)
        try:
            with storage_errors("open the adapters' files"):
                copies = LocalCopies(self._dir.root / "cache", places.copies_bytes)
                url = places.blob_url or str(self._dir.blobs.absolute())
                blobs = BlobStore(url, copies=copies)
            writer = AdapterWriter(blobs, self._dir.staging, at_stage)
            self._store = AdapterStore(
                self._registry,
                blobs,
                copies,
                database_url=places.registry_url or sqlite_url(self._dir.database),
                upgrade_blob=writer.upgrade,
                places=places,
                keep_versions=keep_versions,
                on_discard=on_discard,
                at_stage=at_stage,
            )
            self._expiry = NameExpiry(
                self._registry, self._store, is_shared=places.is_shared, outage_s=places.outage_s
            )
            self._leases = LeaseBook(self._store, self._record, self._note_use)
            self._registrar = AdapterRegistrar(
                self._checks, writer, self._registry, self._store, base_name=base_name
            )
        except BaseException:
            self._dir.close()
            raise
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            with self._reading("look the base's name up") as connection:
                if (name := self._registry.find_like(connection, base_name)) is not None:
                    raise BaseNameTaken(name, base_name)
            on_failure.pop_all()

    @property
    def database(self) -> Engine:
        """Where names are, and all that must change together with them."""
        return self._store.database

    @property
    def scope(self) -> str:
        """What tells the served base from others in the database."""
        return self._registry.scope

    @property
    def changes(self) -> ChangeFeed:
        """What other servers change in a registry that several share."""
        return self._store.changes

    def close(self) -> None:
        """Write what is not written yet, and let go of the data folder. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.write_uses()
        except StorageFailed as error:
            _log.warning("when adapters were used last is lost: %s", error)
        finally:
            self._store.close()
            self._dir.close()

    # ---- registering -----------------------------------------------------------------------

    def new_upload(self) -> UploadStaging:
        """Return a fresh quarantine folder, a context manager; raises StorageFailed."""
        return UploadStaging(self._dir.staging, self._limits)

    def check_name(self, name: str) -> None:
        """Check `name` before an upload is received; raises InvalidAdapterName."""
        check_adapter_name(name, reserved=self._base_names)

    def validate(
        self, folder: Path, *, check_base: bool = True, max_pages: int | None = None
    ) -> Validation:
        """Judge a folder as `register` would, and keep nothing.

        Raises:
            InvalidUpload, UploadTooLarge, SelfTestFailed, StorageFailed
        """
        return validate(self._checks, folder, check_base=check_base, max_pages=max_pages)

    def register(
        self, wish: Registration, folder: Path, *, max_pages: int | None = None
    ) -> tuple[AdapterRecord, bool]:
        """Validate the PEFT folder, test and store its canonical form and give it its name.

        Args:
            max_pages: pages of the pool; an adapter that needs more is refused.

        Returns:
            The record, and whether it is new: registering the same content under the same name
            again changes nothing but the settings that are given.

        Raises:
            InvalidAdapterName, AdapterRefused, InvalidUpload, SelfTestFailed, StorageFailed
            AdapterNameTaken: the name stands for other content, which is not to be replaced.
            VersionConflict: it is, but not the content that the name has.
        """
        self.check_name(wish.name)
        row, is_new = self._registrar.register(wish, folder, max_pages, self._now())
        return self._record(row), is_new

    # ---- looking up ------------------------------------------------------------------------

    def get(self, name: str) -> AdapterRecord:
        """Return the record of `name` or `name@sha256:...`.

        Raises:
            AdapterNotFound, AmbiguousVersion, InvalidAdapterName, StorageFailed
        """
        return self._record(self._store.resolve(parse_reference(name)))

    def report(self, record: AdapterRecord) -> list[dict[str, str]]:
        """Return what became of the uploaded folder; raises AdapterNotFound, StorageFailed."""
        with self._reading("read the report") as connection:
            report = self._registry.report(connection, record.name, record.version)
        if report is None:  # it was deleted meanwhile
            raise AdapterNotFound(record.name)
        return list(report)

    def list(
        self, *, limit: int = 100, after: str | None = None, reader: str | None = None
    ) -> tuple[AdapterRecord, ...]:
        """Return up to `limit` records ordered by name, those behind the name `after`.

        Args:
            reader: only what this tenant may read.

        Raises:
            StorageFailed
        """
        with self._reading("list adapters") as connection:
            return self._records(self._registry.page(connection, limit, after, reader))

    def versions(
        self, name: str, *, limit: int = 100, before: int | None = None
    ) -> tuple[AdapterRecord, ...]:
        """The same of a name's versions, newest first; raises AdapterNotFound, StorageFailed."""
        self._store.resolve(AdapterReference(name))
        with self._reading("list versions") as connection:
            return self._records(self._registry.versions(connection, name, limit, before))

    # ---- changing --------------------------------------------------------------------------

    def rollback(
        self,
        name: str,
        *,
        version: int | None = None,
        adapter_id: str | None = None,
        actor: Actor = _SOMEBODY,
    ) -> AdapterRecord:
        """Let the name stand for one of its other versions, given by its number or its id.

        Raises:
            AdapterNotFound, AmbiguousVersion, InvalidAdapterName, StorageFailed
        """
        if adapter_id is not None:
            what = AdapterReference(name, check_id_prefix(adapter_id, adapter_id))
            row = self._store.resolve(what)
        else:
            assert version is not None, "a version or an id"
            row = self._store.version(name, version)
        return self._record(self._store.set_current(name, row, self._now(), actor))

    def change(
        self,
        name: str,
        settings: Mapping[str, Any],
        *,
        max_pinned_pages: int | None = None,
        actor: Actor = _SOMEBODY,
    ) -> AdapterRecord:
        """Change the given fields of a name's settings.

        Args:
            max_pinned_pages: what pinned adapters may take together; None for no bound.

        Raises:
            AdapterNotFound, PinRefused, StorageFailed
        """
        row = self._store.change(
            name, settings, self._num_pages, max_pinned_pages, now=self._now(), actor=actor
        )
        return self._record(row)

    def delete(self, name: str, *, actor: Actor = _SOMEBODY, cancels: bool = False) -> Removal:
        """Take a name with all its versions away, or the one version `name@sha256:...`.

        It is gone when this returns. Users that hold a lease go on, and `Removal` tells when they
        have ended.

        Args:
            cancels: have other servers end theirs; this one's are the caller's to end.

        Raises:
            AdapterNotFound, AmbiguousVersion, InvalidAdapterName, VersionIsCurrent, StorageFailed
        """
        what = parse_reference(name)
        removed = self._store.remove(what, now=self._now(), actor=actor, cancels=cancels)
        assert removed is not None, "nothing was asked of its age"
        return self._removal(removed)

    # ---- time ------------------------------------------------------------------------------

    def pinned(self) -> tuple[AdapterRecord, ...]:
        """Return the current versions of all pinned names; raises StorageFailed."""
        with self._reading("list pinned adapters") as connection:
            return self._records(self._registry.pinned(connection))

    def delete_expired(self) -> tuple[Removal, ...]:
        """Delete some of the names whose time is up and that nobody uses; raises StorageFailed."""
        return tuple(map(self._removal, self._expiry.delete_expired(self._now())))

    def write_uses(self) -> None:
        """Write down when names were used; raises StorageFailed."""
        self._expiry.write_uses(self._now())

    def sweep(self) -> None:
        """Delete files that nobody refers to, and old news; for registries that servers share."""
        self._store.files.sweep()
        self._store.changes.prune(self._now())

    def make_room(self) -> None:
        """Delete copies of files on this machine before its disk fills up; nobody holds them."""
        self._store.make_room()

    # ---- leases ----------------------------------------------------------------------------

    def acquire(self, name: str, *, is_fresh: bool = False) -> AdapterLease:
        """Resolve `name` or `name@sha256:...` once and hold what it stands for.

        Args:
            is_fresh: as the registry knows it now, and not as it was known moments ago.

        Raises:
            AdapterNotFound, AmbiguousVersion, InvalidAdapterName, StorageFailed
        """
        return self._leases.acquire(parse_reference(name), is_fresh=is_fresh)

    def try_acquire(self, name: str) -> AdapterLease | None:
        """The same of what is known here; None where something must be asked. Does not block.

        Raises:
            AdapterNotFound: as far as is known; `acquire` with `is_fresh` knows.
            InvalidAdapterName
        """
        return self._leases.try_acquire(parse_reference(name))

    def num_leases(self, content_id: str) -> int:
        """Users of the adapter right now, for metrics and tests."""
        return self._store.in_use.num_held(content_id)

    def num_held_by(self, content_id: str, name: str) -> int:
        """Users of the adapter right now who asked for it by `name`."""
        return self._store.in_use.num_held_by(content_id, name)

    def num_waited_for(self, drain: Drain) -> int:
        """Return how many users a drain waits for."""
        if drain.is_last:
            return self._store.in_use.num_held(drain.adapter_id)
        return self._store.in_use.num_held_by(drain.adapter_id, drain.name)

    def _removal(self, removed: RemovedVersions) -> Removal:
        record = self._record(removed.row)
        if removed.is_name:
            self._expiry.uses.forget(record.name)
        return Removal(record, removed.drains)

    # ---- pieces ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(self, action: str) -> Iterator[Connection]:
        with storage_errors(action), self._store.database.connect() as connection:
            yield connection

    def _now(self) -> int:
        return int(self._clock())

    def _note_use(self, name: str) -> None:
        self._expiry.uses.note(name, self._now())

    def _records(self, rows: Iterable[VersionRow]) -> tuple[AdapterRecord, ...]:
        return tuple(map(self._record, rows))

    def _record(self, row: VersionRow) -> AdapterRecord:
        return make_record(row, self._num_pages(row.adapter.spec), self._expiry.uses.of(row.name))
