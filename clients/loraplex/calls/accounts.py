"""Keys, the usage ledger and the audit."""

from __future__ import annotations

from typing import Literal, TypeAlias

from loraplex.calls.call import Call, body_of, list_call, segment
from loraplex.types import ApiKey, AuditEntry, CreatedKey, KeyRevoked, Page, UsageRecord

Role: TypeAlias = Literal["admin", "uploader", "user"]
Bucket: TypeAlias = Literal["hour", "day", "all"]


def create_key(
    name: str, role: Role, tenant: str | None, expires_in_s: float | None
) -> Call[CreatedKey]:
    """POST /v1/keys. Never sent twice: an answer that was lost had a secret in it."""
    fields = {"name": name, "role": role, "tenant": tenant, "expires_in_s": expires_in_s}
    body = body_of(fields, {})
    return Call("POST", "/v1/keys", CreatedKey, json=body, is_repeatable=False)


def list_keys(page_size: int) -> Call[Page[ApiKey]]:
    """GET /v1/keys, the first page."""
    return list_call("/v1/keys", Page[ApiKey], page_size)


def revoke_key(key_id: str) -> Call[KeyRevoked]:
    """DELETE /v1/keys/{id}."""
    return Call("DELETE", f"/v1/keys/{segment(key_id)}", KeyRevoked, is_repeatable=False)


def list_usage(
    start: int | None,
    end: int | None,
    bucket: Bucket | None,
    tenant: str | None,
    adapter: str | None,
    page_size: int,
) -> Call[Page[UsageRecord]]:
    """GET /v1/usage, the first page."""
    return list_call(
        "/v1/usage",
        Page[UsageRecord],
        page_size,
        start=start,
        end=end,
        bucket=bucket,
        tenant=tenant,
        adapter=adapter,
    )


def list_audit(tenant: str | None, subject: str | None, page_size: int) -> Call[Page[AuditEntry]]:
    """GET /v1/audit, the first page."""
    return list_call("/v1/audit", Page[AuditEntry], page_size, tenant=tenant, subject=subject)
