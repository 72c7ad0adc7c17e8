"""`/v1/audit`: who changed adapters and keys, for admins."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Engine

from loraplex_server.adapters.audit_log import AuditEntry, read_audit
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.api.pages import After, Limit, page_of
from loraplex_server.tenants.errors import InvalidCursor


def audit_router(database: Engine) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter(tags=["audit"])

    @router.get("/v1/audit")
    async def list_audit(
        limit: Limit = 100,
        after: After = None,
        tenant: Annotated[str | None, Query(max_length=64)] = None,
        subject: Annotated[str | None, Query(max_length=256)] = None,
    ) -> dict[str, Any]:
        """List changes, newest first: of one tenant's adapters and keys, or of one of them."""
        before = None if after is None else _entry_id(after)

        def read() -> list[AuditEntry]:
            with storage_errors("read the audit"), database.connect() as connection:
                return read_audit(
                    connection, limit=limit + 1, before=before, tenant=tenant, subject=subject
                )

        found = await asyncio.to_thread(read)
        return page_of(found, limit, _entry_body, lambda entry: str(entry.entry_id))

    return router


def _entry_id(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise InvalidCursor(cursor)
    return int(cursor)


def _entry_body(entry: AuditEntry) -> dict[str, Any]:
    return {
        "object": "audit.entry",
        "id": str(entry.entry_id),
        "time": entry.time,
        "actor": entry.actor.key_id,
        "tenant": entry.tenant,
        "action": entry.action,
        "subject": entry.subject,
        "adapter_id": entry.adapter_id,
        "request_id": entry.actor.request_id,
        "details": dict(entry.details),
    }
