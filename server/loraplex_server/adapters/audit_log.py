"""Who changed what, written in the transaction that changes it. Rows are added, and only added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, insert, select

from loraplex_server.adapters.tenant_tables import audit

#: Whoever needs no key: the server itself, its command line, and everybody where no keys exist.
LOCAL: Final = "local"


@dataclass(frozen=True)
class Actor:
    """Who asks for a change.

    Attributes:
        key_id: of the key that was used, or `LOCAL`.
        request_id: of the HTTP request, if it was one.
    """

    key_id: str = LOCAL
    request_id: str | None = None


@dataclass(frozen=True)
class AuditEntry:
    """One change.

    Attributes:
        tenant: whose adapter or key was changed; "" is nobody's in particular.
        action: `adapter.create`, `key.revoke` and so on.
        subject: name of the adapter, or id of the key.
        entry_id: counts up; 0 of one that is not written yet.
        time: Unix seconds.
    """

    action: str
    subject: str
    tenant: str
    adapter_id: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    actor: Actor = Actor()
    time: int = 0
    entry_id: int = 0


def write_audit(connection: Connection, entry: AuditEntry, now: int) -> None:
    """Add an entry, in the caller's transaction."""
    connection.execute(
        insert(audit).values(
            time=now,
            actor=entry.actor.key_id,
            tenant=entry.tenant,
            action=entry.action,
            subject=entry.subject,
            adapter_id=entry.adapter_id,
            request_id=entry.actor.request_id,
            details=json.dumps(entry.details),
        )
    )


def read_audit(
    connection: Connection,
    *,
    limit: int,
    before: int | None = None,
    tenant: str | None = None,
    subject: str | None = None,
) -> list[AuditEntry]:
    """Return up to `limit` entries, newest first, those older than the entry `before`."""
    query = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.id < before)
    if tenant is not None:
        query = query.where(audit.c.tenant == tenant)
    if subject is not None:
        query = query.where(audit.c.subject == subject)
    return [
        AuditEntry(
            action=row.action,
            subject=row.subject,
            tenant=row.tenant,
            adapter_id=row.adapter_id,
            details=json.loads(row.details),
            actor=Actor(row.actor, row.request_id),
            time=row.time,
            entry_id=row.id,
        )
        for row in connection.execute(query)
    ]
