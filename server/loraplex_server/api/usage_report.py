"""`/v1/usage`: what tenants used of each adapter."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request

from loraplex_server.api.errors import TenantForbidden
from loraplex_server.api.pages import After, Limit, page_of
from loraplex_server.api.principals import namespace_of, principal_of
from loraplex_server.api.tenant_desk import TenantDesk
from loraplex_server.tenants.usage_store import HOUR_S, UsageQuery, UsageRow

_MAX_TIME: Final = 2**40

_Time = Annotated[int | None, Query(ge=0, le=_MAX_TIME)]


class Bucket(StrEnum):
    HOUR = "hour"
    DAY = "day"
    ALL = "all"


_BUCKET_S: Final = {Bucket.HOUR: HOUR_S, Bucket.DAY: 24 * HOUR_S, Bucket.ALL: None}


def usage_router(desk: TenantDesk, base_names: tuple[str, ...]) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter(tags=["usage"])

    @router.get("/v1/usage")
    async def report_usage(
        request: Request,
        start: _Time = None,
        end: _Time = None,
        bucket: Bucket = Bucket.HOUR,
        tenant: Annotated[str | None, Query(max_length=64)] = None,
        adapter: Annotated[str | None, Query(max_length=2048)] = None,
        limit: Limit = 100,
        after: After = None,
    ) -> dict[str, Any]:
        """Sum up requests and tokens by tenant and adapter; tenants see their own."""
        names = None
        if adapter is not None:
            is_base = adapter in ("", *base_names)
            names = ("",) if is_base else tuple(namespace_of(request).readings(adapter))
        query = UsageQuery(
            start=start,
            end=end,
            bucket_s=_BUCKET_S[bucket],
            tenant=_tenant(request, tenant),
            adapters=names,
        )
        await desk.ledger.write()  # what this server knows is not missing
        found = await asyncio.to_thread(desk.usage.report, query, limit=limit + 1, after=after)
        return page_of(found, limit, _usage_body, lambda row: row.cursor)

    return router


def _tenant(request: Request, wanted: str | None) -> str | None:
    """Return whose usage is shown, None for everybody's; raises TenantForbidden."""
    principal = principal_of(request)
    if principal.is_admin:
        return wanted
    if wanted not in (None, principal.tenant):
        raise TenantForbidden(
            f"this key is of the tenant {principal.tenant!r}; only an admin sees others' usage"
        )
    return principal.tenant


def _usage_body(row: UsageRow) -> dict[str, Any]:
    return {
        "object": "usage",
        "start": row.start,
        "end": row.end,
        "tenant": row.tenant,
        "adapter": row.adapter or None,
        **row.amounts._asdict(),
    }
