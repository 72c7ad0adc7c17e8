"""One user's hold on one adapter."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_server.adapters.record import AdapterRecord


class AdapterLease:
    """Owned by one request, from admission to its terminal event.

    While it is held the adapter's file stays, whatever happens to the name; `record` and
    `manifest` are what the name stood for when it was resolved, and never change. Release it from
    any thread; releasing again does nothing.
    """

    def __init__(
        self,
        record: AdapterRecord,
        manifest: AdapterManifest,
        on_release: Callable[[AdapterLease], None],
    ) -> None:
        self.record = record
        self.manifest = manifest
        self._on_release = on_release

    def release(self) -> None:
        self._on_release(self)

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
