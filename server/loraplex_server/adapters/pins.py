"""Changing a name's settings, within what pinned adapters may take of the pool together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection

from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_server.adapters.audit_log import Actor, AuditEntry, write_audit
from loraplex_server.adapters.errors import AdapterNotFound, PinRefused
from loraplex_server.adapters.registry import Registry
from loraplex_server.adapters.version_row import VersionRow


def change_settings(
    registry: Registry,
    connection: Connection,
    name: str,
    settings: Mapping[str, Any],
    pages_of: Callable[[AdapterSpec], int],
    max_pinned_pages: int | None,
    actor: Actor,
    now: int,
) -> VersionRow:
    """Change the given fields of a name's settings, in the caller's transaction.

    Raises:
        AdapterNotFound, PinRefused
    """
    if settings.get("pinned"):
        registry.lock_pins(connection)
    registry.lock(connection, name)
    row = registry.find(connection, name)
    if row is None:
        raise AdapterNotFound(name)
    if settings.get("pinned") and max_pinned_pages is not None:
        others = [other for other in registry.pinned(connection) if other.name != name]
        # Names of one content share its pages.
        num_pages = sum({r.adapter_id: pages_of(r.adapter.spec) for r in (*others, row)}.values())
        if num_pages > max_pinned_pages:
            raise PinRefused(name, num_pages, max_pinned_pages)
    registry.set_settings(connection, name, settings)
    changed = registry.find(connection, name)
    if changed is None:  # SQLite's transaction begins with the first change
        raise AdapterNotFound(name)
    # Defaults may be long, and hold what a tenant would not have everybody keep.
    details = {field: "set" if field == "defaults" else settings[field] for field in settings}
    entry = AuditEntry("adapter.change", name, row.owner, row.adapter_id, details, actor)
    write_audit(connection, entry, now)
    return changed
