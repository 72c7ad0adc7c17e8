"""Keys, what they used, and what was done with them. All times are Unix seconds."""

from __future__ import annotations

from typing import Any

from loraplex.types.base import ApiModel


class ApiKey(ApiModel):
    """One API key, without its secret.

    Attributes:
        id: "key_...".
        role: "admin", "uploader" or "user".
        tenant: On whose account its requests run.
        expires: None for never.
        last_used: None if it was never used.
    """

    id: str
    name: str = ""
    role: str
    tenant: str
    created: int
    expires: int | None = None
    last_used: int | None = None


class CreatedKey(ApiKey):
    """A new key. `secret` is what clients send; the server never tells it again."""

    secret: str


class KeyRevoked(ApiModel):
    """The answer of DELETE /v1/keys/{id}."""

    id: str
    deleted: bool


class UsageRecord(ApiModel):
    """What one tenant used of one adapter from `start` to `end`.

    Attributes:
        adapter: Its name; None for the base model.
        cached_tokens: Those of the prompt tokens that nobody had to compute.
    """

    start: int
    end: int
    tenant: str
    adapter: str | None
    requests: int
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int


class AuditEntry(ApiModel):
    """One change of an adapter or a key.

    Attributes:
        actor: The id of the key that did it, or "local" on a server without keys.
        action: Such as "adapter.create", "adapter.rollback" or "key.revoke".
        subject: The name of the adapter, or the id of the key.
        adapter_id: The content that the name stood for afterwards.
        request_id: The `x-request-id` of the call.
    """

    id: str | int
    time: int | float
    actor: str
    tenant: str = ""
    action: str
    subject: str
    adapter_id: str | None = None
    request_id: str | None = None
    details: dict[str, Any] = {}
