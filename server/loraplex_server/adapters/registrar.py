"""Registering one folder: checked, its files stored, and then its version committed."""

from __future__ import annotations

from pathlib import Path

from loraplex_server.adapters.adapter_writer import AdapterWriter
from loraplex_server.adapters.checks import AdapterChecks, CheckedAdapter
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.registration import Registration
from loraplex_server.adapters.registration_rules import (
    check_owner,
    check_ownership,
    check_replaceable,
)
from loraplex_server.adapters.registry import Registry
from loraplex_server.adapters.store import AdapterStore
from loraplex_server.adapters.version_row import NewVersion, StoredAdapter, VersionRow


class AdapterRegistrar:
    """Stateless; safe from any thread. Blocks for as long as reading the adapter takes."""

    def __init__(
        self,
        checks: AdapterChecks,
        writer: AdapterWriter,
        registry: Registry,
        store: AdapterStore,
        *,
        base_name: str,
    ) -> None:
        self._checks = checks
        self._writer = writer
        self._registry = registry
        self._store = store
        self._base_name = base_name

    def register(
        self, wish: Registration, folder: Path, max_pages: int | None, now: int
    ) -> tuple[VersionRow, bool]:
        """See `AdapterCatalog.register`; the name has been checked."""
        checked = self._checks.check(
            folder, name=wish.name, check_base=wish.check_base, max_pages=max_pages
        )
        self._check_early(wish, checked.adapter_id)
        # Held while its file is stored: a delete of the same content may not take it meanwhile.
        self._store.in_use.hold(checked.adapter_id)
        try:
            return self._store.add(self._write(wish, checked, folder, now), wish, now)
        except StorageFailed:
            self._store.doom_unless_named(checked.adapter_id)
            raise
        finally:
            self._store.in_use.release(checked.adapter_id)

    def _check_early(self, wish: Registration, content_id: str) -> None:
        """Spare a hopeless upload the writing; the store decides."""
        with storage_errors("look the name up"), self._store.database.connect() as connection:
            row = self._registry.find(connection, wish.name)
            check_ownership(wish, row)
            if row is None or row.adapter_id != content_id:
                check_replaceable(wish, row)
                check_owner(self._registry, connection, wish, row, new=None)

    def _write(
        self, wish: Registration, checked: CheckedAdapter, folder: Path, now: int
    ) -> NewVersion:
        content_id = checked.adapter_id
        native_bytes = 0 if checked.is_native else self._writer.write_native(content_id, folder)
        stored = StoredAdapter(
            adapter_id=content_id,
            spec=checked.spec,
            size_bytes=self._writer.write(content_id, checked.weights),
            native_bytes=native_bytes,
            self_test_error=checked.self_test_error,
        )
        return NewVersion(
            name=wish.name,
            adapter=stored,
            base_model=_shown(checked.base_model or self._base_name),
            created=now,
            source=wish.source,
            report=checked.report_json(),
            owner=wish.owner,
        )


def _shown(base_model: str) -> str:
    """Return a name out of a file as databases and terminals can take it."""
    return "".join(char if char.isprintable() else "\ufffd" for char in base_model)
