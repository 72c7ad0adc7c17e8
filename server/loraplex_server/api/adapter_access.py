"""The catalogue as whoever asks may see it: what may not be seen is not there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, TypeVar

from loraplex_server.adapters.catalog import AdapterCatalog
from loraplex_server.adapters.errors import AdapterNotFound, AdapterNotOwned, AmbiguousVersion
from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.tenants.namespace import Namespace

_T = TypeVar("_T")

#: Of a name in a message.
_SHOWN_CHARS: Final = 256


class AdapterAccess:
    """Stateless; methods may be called from any thread, and block but for `try_acquire`."""

    def __init__(self, catalog: AdapterCatalog) -> None:
        self._catalog = catalog

    def find(self, namespace: Namespace, name: str) -> AdapterRecord:
        """Return what `name` or `name@sha256:...` stands for.

        Raises:
            AdapterNotFound: nothing, or nothing that may be seen.
            AmbiguousVersion, InvalidAdapterName, StorageFailed
        """
        return self._resolve(namespace, name)[1]

    def acquire(self, namespace: Namespace, name: str) -> AdapterLease:
        """The same, and hold it; see `AdapterCatalog.acquire`."""

        def acquire(reading: str, *, is_fresh: bool = False) -> AdapterLease:
            lease = self._catalog.acquire(reading, is_fresh=is_fresh)
            return self._checked(namespace, name, lease)

        try:
            return self._first(namespace, name, acquire)[1]
        except AdapterNotFound:
            # It may have been registered since; what is known of that may be a second old.
            return self._first(namespace, name, functools.partial(acquire, is_fresh=True))[1]

    def try_acquire(self, namespace: Namespace, name: str) -> AdapterLease | None:
        """The same by what is known; None where something must be asked. Does not block."""
        for reading in namespace.readings(name):
            try:
                lease = self._catalog.try_acquire(reading)
                return lease and self._checked(namespace, name, lease)
            except AdapterNotFound:
                continue
        return None

    def _checked(self, namespace: Namespace, name: str, lease: AdapterLease) -> AdapterLease:
        if not namespace.may_read(lease.record):
            lease.release()
            raise AdapterNotFound(name[:_SHOWN_CHARS])
        return lease

    def registered_name(self, namespace: Namespace, name: str, *, to_change: bool = False) -> str:
        """Return what the catalogue calls an adapter that may be seen, a version's `@...` included.

        Args:
            to_change: it must be one's own.

        Raises:
            AdapterNotOwned: it may be seen, and is not one's own.
            AdapterNotFound, AmbiguousVersion, InvalidAdapterName, StorageFailed
        """
        reading, record = self._resolve(namespace, name)
        if to_change and not namespace.may_change(record):
            raise AdapterNotOwned(record.name)
        return reading

    def _resolve(self, namespace: Namespace, name: str) -> tuple[str, AdapterRecord]:
        def get_visible(reading: str) -> AdapterRecord:
            record = self._catalog.get(reading)
            if not namespace.may_read(record):
                raise AdapterNotFound(name[:_SHOWN_CHARS])
            return record

        return self._first(namespace, name, get_visible)

    def _first(self, namespace: Namespace, name: str, get: Callable[[str], _T]) -> tuple[str, _T]:
        """Return the first reading of the name that there is, and what it gives."""
        for reading in namespace.readings(name):
            try:
                return reading, get(reading)
            except AdapterNotFound:
                continue
            except AmbiguousVersion:
                bare = self._catalog.get(reading.partition("@")[0])
                if namespace.may_read(bare):
                    raise
        raise AdapterNotFound(name[:_SHOWN_CHARS])
