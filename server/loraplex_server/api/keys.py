"""`/v1/keys`: API keys, for admins."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from loraplex_server.api.pages import After, Limit, page_of
from loraplex_server.api.principals import actor_of
from loraplex_server.api.tenant_desk import TenantDesk
from loraplex_server.tenants.api_key import ApiKey, KeyWish
from loraplex_server.tenants.principal import Role


class KeyBody(BaseModel):
    """A key that is wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    role: Role
    tenant: str = ""
    expires_in_s: int | None = None


def keys_router(desk: TenantDesk) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(tags=["keys"])

    @router.post("/v1/keys")
    async def create_key(body: KeyBody, request: Request) -> dict[str, Any]:
        """Make a key; its `secret` is in this answer and nowhere else."""
        wish = KeyWish(body.name, body.role, body.tenant, body.expires_in_s)
        key, secret = await asyncio.to_thread(
            desk.key_store.create, wish, actor_of(request), has_other_admin=desk.keys.has_setting
        )
        await desk.keys.refresh()
        return {**key_body(key), "secret": secret}

    @router.get("/v1/keys")
    async def list_keys(limit: Limit = 100, after: After = None) -> dict[str, Any]:
        """List the keys that are not revoked, in the order of their making."""
        found = await asyncio.to_thread(desk.key_store.list, limit=limit + 1, after=after)
        uses = desk.keys.last_uses()
        found = [replace(key, last_used=uses.get(key.key_id, key.last_used)) for key in found]
        return page_of(found, limit, key_body, lambda key: key.key_id)

    @router.delete("/v1/keys/{key_id}")
    async def revoke_key(key_id: str, request: Request) -> dict[str, Any]:
        """Revoke a key: here at once, on other servers within two seconds."""
        key = await asyncio.to_thread(desk.key_store.revoke, key_id, actor_of(request))
        await desk.keys.refresh()
        return {"object": "key.deleted", "id": key.key_id, "deleted": True}

    return router


def key_body(key: ApiKey) -> dict[str, Any]:
    """Return the JSON of a key, which never has its secret."""
    return {"object": "key", **key.as_json()}
