"""The adapter catalogue: which name stands for which adapter, durably.

Invariants:
- A name resolves in one atomic step (one lock over look-up and count) to a lease on an immutable
  adapter; what the name stands for later is of no concern to the lease.
- An adapter's file exists while a name or a lease refers to it. `register` holds the id too while
  it stores the file, so that a concurrent delete of the same content cannot take it away.
- A registration is in the database or it did not happen; files without a row are swept at start.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loraplex_memory.adapter_file import write_adapter_file
from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_weights import AdapterWeights
from loraplex_memory.layout import PROJECTIONS, PoolLayout
from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.catalog_tables import (
    NameRow,
    NameTable,
    is_stored,
    open_database,
    scope_of,
    stored_ids,
)
from loraplex_server.adapters.data_dir import DataDir, storage_errors
from loraplex_server.adapters.errors import (
    AdapterNameTaken,
    AdapterNotFound,
    AdapterRefused,
    BaseNameTaken,
    StorageFailed,
)
from loraplex_server.adapters.holds import AdapterHolds
from loraplex_server.adapters.identity import adapter_id
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.adapters.names import check_adapter_name
from loraplex_server.adapters.peft_format import PeftFolderReader
from loraplex_server.adapters.record import AdapterLimits, AdapterRecord
from loraplex_server.adapters.upload import UploadStaging

__all__ = ["AdapterCatalog", "AdapterLease"]

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
        base_aliases: tuple[str, ...] = (),
        base_id: str | None = None,
        blob_url: str | None = None,
        limits: AdapterLimits | None = None,
        on_discard: Callable[[str], None] | None = None,
    ) -> None:
        """Open or create the catalogue and sweep what an interrupted run left behind.

        Args:
            data_dir: created if missing; one process at a time.
            base_name: the name requests use for the base; no adapter may have it.
            base_aliases: other names of the same base (hub id, folder), for the base check.
            base_id: what tells this base from others across restarts, `base_name` by default.
                Give it where the served name may change while the model stays.
            blob_url: where adapter files are kept, any fsspec URL; `data_dir/blobs` by default.
                This catalogue's alone: files it does not know are swept.
            on_discard: called with an adapter id, in the thread that ended its last use, when
                no name and no lease refers to it any more. A hint to free its pages: the same
                content may be registered again at any time.

        Raises:
            StorageFailed: the folder cannot be used, or another process uses it.
            BaseNameTaken: an adapter of this base has its name, which was free before.
        """
        self._pool_layout = pool_layout
        self._base_names = (base_name, *base_aliases)
        self._limits = limits or AdapterLimits()
        self._on_discard = on_discard
        self._reader = PeftFolderReader(pool_layout.geometry, self._base_names, self._limits)
        self._lock = threading.Lock()
        self._holds = AdapterHolds()
        self._leases: set[AdapterLease] = set()
        scope = scope_of(base_id or base_name, pool_layout.geometry)
        self._names = NameTable(scope, pool_layout.geometry.num_layers)
        self._dir = DataDir(data_dir)
        try:
            self._open(blob_url)
        except BaseException:
            self._dir.close()
            raise
        try:
            self._check_base_name()
        except BaseException:
            self.close()
            raise

    def _open(self, blob_url: str | None) -> None:
        with storage_errors("open the catalogue"):
            self._database = open_database(self._dir.database)
            self._blobs = BlobStore(
                blob_url or str(self._dir.blobs.absolute()), cache_dir=self._dir.root / "cache"
            )
            with self._database.connect() as connection:
                self._blobs.sweep(keep=stored_ids(connection))

    def _check_base_name(self) -> None:
        base_name = self._base_names[0]
        with storage_errors("look the base's name up"), self._database.connect() as connection:
            if (name := self._names.find_like(connection, base_name)) is not None:
                raise BaseNameTaken(name, base_name)

    def close(self) -> None:
        """Let go of the data folder. Idempotent."""
        self._database.dispose()
        self._dir.close()

    def new_upload(self) -> UploadStaging:
        """Return a fresh quarantine folder for one upload; use it as a context manager.

        Raises:
            StorageFailed
        """
        return UploadStaging(self._dir.staging, self._limits)

    def check_name(self, name: str) -> None:
        """Check `name` before an upload is received; raises InvalidAdapterName."""
        check_adapter_name(name, reserved=self._base_names)

    def register(
        self, name: str, folder: Path, *, check_base: bool = True, max_pages: int | None = None
    ) -> tuple[AdapterRecord, bool]:
        """Validate the PEFT folder, store its canonical form and give it `name`.

        Args:
            check_base: refuse an adapter whose config names another base model.
            max_pages: pages of the pool; an adapter that needs more is refused.

        Returns:
            The record, and whether it is new: registering the same content under the same name
            again changes nothing.

        Raises:
            InvalidAdapterName, AdapterRefused, InvalidUpload, StorageFailed
            AdapterNameTaken: the name stands for other content.
        """
        self.check_name(name)
        try:
            with storage_errors("read the upload"):
                adapter = self._reader.read(folder, check_base=check_base)
                content_id = adapter_id(adapter.weights)
        except AdapterRefused as refusal:
            raise AdapterRefused(refusal.reasons, name) from refusal
        spec = adapter.weights.spec(self._pool_layout.geometry.num_layers)
        self._check_pages(name, AdapterLayout(self._pool_layout, spec).num_pages, max_pages)
        self._check_free(name, content_id)
        self._hold(content_id)
        try:
            row = NameRow(
                name=name,
                adapter_id=content_id,
                base_model=adapter.base_model or self._base_names[0],
                created=int(time.time()),
                spec=spec,
                size_bytes=self._store(content_id, adapter.weights),
            )
            return self._add(row)
        finally:
            self._end_hold(content_id)

    def get(self, name: str) -> AdapterRecord:
        """Return the record of `name`; raises AdapterNotFound, StorageFailed."""
        return self._record(self._find(name))

    def list(self, *, limit: int = 100, after: str | None = None) -> tuple[AdapterRecord, ...]:
        """Return up to `limit` records ordered by name, those behind the name `after`.

        Raises:
            StorageFailed
        """
        with storage_errors("list adapters"), self._database.connect() as connection:
            rows = self._names.page(connection, limit, after)
        return tuple(self._record(row) for row in rows)

    def delete(self, name: str) -> AdapterRecord:
        """Take the name away and return what it stood for; users that hold a lease go on.

        Raises:
            AdapterNotFound, StorageFailed
        """
        with self._lock:
            with storage_errors("delete the adapter"), self._database.begin() as connection:
                row = self._names.find(connection, name)
                if row is None:
                    raise AdapterNotFound(name)
                is_last_name = self._names.remove(connection, row)
            is_over = is_last_name and self._holds.doom(row.adapter_id)
            if is_over:
                self._delete_file(row.adapter_id)
        if is_over:
            self._tell_discard(row.adapter_id)
        return self._record(row)

    def acquire(self, name: str) -> AdapterLease:
        """Resolve `name` once and hold what it stands for.

        Raises:
            AdapterNotFound, StorageFailed
        """
        with self._lock:
            row = self._find(name)
            self._holds.hold(row.adapter_id)
        # Outside the lock, since a remote store may have to fetch the file; held, so it stays.
        try:
            lease = AdapterLease(self._record(row), self._manifest(row), self._release)
        except StorageFailed:
            self._end_hold(row.adapter_id)
            raise
        with self._lock:
            self._leases.add(lease)
        return lease

    def num_leases(self, content_id: str) -> int:
        """Users of the adapter right now, for metrics and tests."""
        with self._lock:
            return self._holds.num_held(content_id)

    def _release(self, lease: AdapterLease) -> None:
        with self._lock:
            if lease not in self._leases:
                return
            self._leases.discard(lease)
        self._end_hold(lease.record.id)

    def _hold(self, content_id: str) -> None:
        with self._lock:
            self._holds.hold(content_id)

    def _end_hold(self, content_id: str) -> None:
        with self._lock:
            is_over = self._holds.release(content_id)
            if is_over:
                self._delete_file(content_id)
        if is_over:
            self._tell_discard(content_id)

    def _delete_file(self, content_id: str) -> None:
        """Under the lock, so that nobody begins to use the file meanwhile.

        A failure costs only disk space, until the sweep at the next start: no reason to fail the
        delete, or the request that happened to end last.
        """
        try:
            self._blobs.delete(content_id)
        except OSError as error:
            _log.warning("adapter file %s was not deleted: %s", content_id, error)

    def _tell_discard(self, content_id: str) -> None:
        if self._on_discard is not None:
            self._on_discard(content_id)

    def _find(self, name: str) -> NameRow:
        with storage_errors("look the adapter up"), self._database.connect() as connection:
            row = self._names.find(connection, name)
        if row is None:
            raise AdapterNotFound(name)
        return row

    def _check_pages(self, name: str, num_pages: int, max_pages: int | None) -> None:
        if max_pages is not None and num_pages > max_pages:
            reason = (
                f"it needs {num_pages} pages of the memory pool, which has {max_pages}; give the "
                "server a larger pool, or train a smaller rank"
            )
            raise AdapterRefused((reason,), name)

    def _check_free(self, name: str, content_id: str) -> None:
        """Spare a hopeless upload the writing; `_add` decides."""
        with storage_errors("look the name up"), self._database.connect() as connection:
            row = self._names.find(connection, name)
        if row is not None and row.adapter_id != content_id:
            raise AdapterNameTaken(name)

    def _store(self, content_id: str, weights: AdapterWeights) -> int:
        """Put the canonical file under its id and return its size in bytes.

        Written even if it is there: that heals a file that was damaged or lost.
        """
        with (
            storage_errors("store the adapter"),
            tempfile.TemporaryDirectory(dir=self._dir.staging, prefix="store-") as folder,
        ):
            file = Path(folder, "adapter.safetensors")
            write_adapter_file(file, weights)
            size_bytes = file.stat().st_size
            self._blobs.put(content_id, file)
        return size_bytes

    def _add(self, row: NameRow) -> tuple[AdapterRecord, bool]:
        """Commit the name, or find that somebody else was faster.

        The caller holds the id. Without a name in the end, the file is doomed again, and goes
        when the last hold ends.
        """
        with self._lock, storage_errors("register the adapter"):
            try:
                with self._database.begin() as connection:
                    other = self._names.find(connection, row.name)
                    if other is None:
                        self._names.add(connection, row)
            finally:
                self._doom_unless_named(row.adapter_id)
        if other is None:
            return self._record(row), True
        if other.adapter_id != row.adapter_id:
            raise AdapterNameTaken(row.name)
        return self._record(other), False

    def _doom_unless_named(self, content_id: str) -> None:
        with self._database.connect() as connection:
            is_named = is_stored(connection, content_id)
        if is_named:
            self._holds.spare(content_id)
        else:
            self._holds.doom(content_id)

    def _record(self, row: NameRow) -> AdapterRecord:
        layout = AdapterLayout(self._pool_layout, row.spec)
        return AdapterRecord(
            name=row.name,
            id=row.adapter_id,
            base_model=row.base_model,
            spec=row.spec,
            rank_max=max(map(max, row.spec.ranks)),
            target_modules=tuple(
                projection
                for projection, ranks in zip(
                    PROJECTIONS, zip(*row.spec.ranks, strict=True), strict=True
                )
                if any(ranks)
            ),
            size_bytes=row.size_bytes,
            pool_pages=layout.num_pages,
            created=row.created,
        )

    def _manifest(self, row: NameRow) -> AdapterManifest:
        try:
            with storage_errors("open the adapter's file"):
                path = self._blobs.local_path(row.adapter_id)
        except StorageFailed as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise StorageFailed(
                    f"the weights of {row.name!r} are gone from the data folder; upload it again"
                ) from error
            raise
        return AdapterManifest(adapter_id=row.adapter_id, path=str(path), spec=row.spec)
