"""The adapter catalogue: which name stands for which adapter, durably.

Signatures first; the bodies follow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.layout import PoolLayout
from loraplex_server.adapters.record import AdapterLimits, AdapterRecord
from loraplex_server.adapters.upload import UploadStaging


class AdapterLease:
    """One user of an adapter: while it is held, the adapter's file stays, whatever happens to
    the name. Release it once, from any thread; releasing again does nothing."""

    record: AdapterRecord
    manifest: AdapterManifest

    def release(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class AdapterCatalog:
    """Owned by the API process, one per data folder; every method may be called from any thread.

    All methods block (disk, SQL; `register` for as long as reading the adapter takes), so an
    event loop calls them in worker threads.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        pool_layout: PoolLayout,
        base_name: str,
        base_aliases: tuple[str, ...] = (),
        limits: AdapterLimits | None = None,
        on_discard: Callable[[str], None] | None = None,
    ) -> None:
        """Open or create the catalogue and sweep what an interrupted run left behind.

        Args:
            data_dir: created if missing; one process at a time.
            base_name: the name requests use for the base; no adapter may have it.
            base_aliases: other names of the same base (hub id, folder), for the base check.
            on_discard: called with an adapter id, in the thread that ended its last use, when
                no name and no lease refers to it any more. A hint to free its pages: the same
                content may be registered again at any time.

        Raises:
            StorageFailed: the folder cannot be used, or another process uses it.
        """

    def close(self) -> None:
        """Let go of the data folder. Idempotent."""

    def new_upload(self) -> UploadStaging:
        """Return a fresh quarantine folder for one upload; use it as a context manager.

        Raises:
            StorageFailed
        """
        raise NotImplementedError

    def check_name(self, name: str) -> None:
        """Check `name` before an upload is received.

        Raises:
            InvalidAdapterName
        """

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
        raise NotImplementedError

    def get(self, name: str) -> AdapterRecord:
        """Return the record of `name`; raises AdapterNotFound, StorageFailed."""
        raise NotImplementedError

    def list(self, *, limit: int = 100, after: str | None = None) -> tuple[AdapterRecord, ...]:
        """Return up to `limit` records ordered by name, those behind the name `after`."""
        raise NotImplementedError

    def delete(self, name: str) -> AdapterRecord:
        """Take the name away and return what it stood for; users that hold a lease go on.

        Raises:
            AdapterNotFound, StorageFailed
        """
        raise NotImplementedError

    def acquire(self, name: str) -> AdapterLease:
        """Resolve `name` once and hold what it stands for.

        Raises:
            AdapterNotFound, StorageFailed
        """
        raise NotImplementedError
