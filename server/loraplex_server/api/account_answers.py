"""What endpoints of keys, usage and audit answer, for OpenAPI; see `answer_schemas`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class KeyAnswer(BaseModel):
    """A key, without its secret."""

    object: Literal["key"]
    id: str
    name: str
    role: Literal["admin", "uploader", "user"]
    tenant: str
    created: int | float
    expires: int | float | None
    last_used: int | float | None


class NewKeyAnswer(KeyAnswer):
    """A key with its secret, which is shown once."""

    secret: str


class KeyDeletedAnswer(BaseModel):
    """After a key was revoked."""

    object: Literal["key.deleted"]
    id: str
    deleted: Literal[True]


class UsageRowAnswer(BaseModel):
    """What one tenant used of one adapter (null: the base model) in one stretch of time."""

    object: Literal["usage"]
    start: int | float
    end: int | float
    tenant: str
    adapter: str | None
    requests: int = Field(ge=0)
    prompt_tokens: int = Field(ge=0)
    cached_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class AuditEntryAnswer(BaseModel):
    """One change, and who made it."""

    object: Literal["audit.entry"]
    id: str
    time: int | float
    actor: str
    tenant: str
    action: str
    subject: str
    adapter_id: str | None
    request_id: str | None
    details: dict[str, Any]


class _Page(BaseModel):
    object: Literal["list"]
    has_more: bool
    last: str | None = Field(description="pass it as `after` for the next page")


class KeyListAnswer(_Page):
    """A page of keys."""

    data: list[KeyAnswer]


class UsageListAnswer(_Page):
    """A page of sums."""

    data: list[UsageRowAnswer]


class AuditListAnswer(_Page):
    """A page of changes, newest first."""

    data: list[AuditEntryAnswer]
