# Written by clients/generate_sync.py from async_resources/accounts.py: change that, and run it.
"""Keys, the usage ledger and the audit of a server with keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraplex.calls import accounts
from loraplex.calls.accounts import Bucket, Role
from loraplex.types import ApiKey, AuditEntry, CreatedKey, KeyRevoked, UsageRecord

if TYPE_CHECKING:
    from loraplex.client import Client


class Keys:
    """The API keys that the server knows; for admins."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        name: str,
        *,
        role: Role,
        tenant: str | None = None,
        expires_in_s: float | None = None,
    ) -> CreatedKey:
        """Make a key. Its `secret` is in this answer and in no other.

        Args:
            name: For people.
            role: What it allows: "user" asks models, "uploader" changes the tenant's adapters too,
                "admin" may do anything.
            tenant: On whose account its requests run; admins need none.
            expires_in_s: Seconds until it stops working; None for never.
        """
        return self._client.send(accounts.create_key(name, role, tenant, expires_in_s))

    def list(self, *, page_size: int = 100) -> Iterator[ApiKey]:
        """Iterate over the keys, without their secrets."""
        return self._client.items(accounts.list_keys(page_size))

    def revoke(self, key_id: str) -> KeyRevoked:
        """Make a key stop working, or raise NotFoundError."""
        return self._client.send(accounts.revoke_key(key_id))


class UsageLedger:
    """What tenants used of which adapters."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(
        self,
        *,
        start: int | None = None,
        end: int | None = None,
        bucket: Bucket | None = None,
        tenant: str | None = None,
        adapter: str | None = None,
        page_size: int = 100,
    ) -> Iterator[UsageRecord]:
        """Iterate over the ledger: a record for each bucket, tenant and adapter.

        Args:
            start: Unix seconds; of buckets that end after it.
            end: Unix seconds; of buckets that start before it.
            bucket: How long a record's time is: "hour", "day", or "all" of it.
            tenant: Of this tenant only. Keys that are not an admin's see their own alone.
            adapter: Of this adapter only.
            page_size: How many records are fetched at a time.
        """
        return self._client.items(
            accounts.list_usage(start, end, bucket, tenant, adapter, page_size)
        )


class Audit:
    """Who changed adapters and keys, and when."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(
        self, *, tenant: str | None = None, subject: str | None = None, page_size: int = 100
    ) -> Iterator[AuditEntry]:
        """Iterate over the entries, newest first.

        Args:
            tenant: Of this tenant only.
            subject: Of this adapter or key only.
            page_size: How many entries are fetched at a time.
        """
        return self._client.items(accounts.list_audit(tenant, subject, page_size))
