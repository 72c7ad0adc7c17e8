"""Which role each endpoint needs: one table, checked where a request has found its endpoint.

What is not in the table is an admin's: a new endpoint is closed until somebody decides.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Route

from loraplex_server.api.errors import RoleRequired
from loraplex_server.api.principals import principal_of
from loraplex_server.tenants.principal import Role

#: Needs no key, even where keys exist: probes say nothing of any tenant.
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/ping"})
METRICS_PATH: Final = "/metrics"

ROLES: Final = {
    "POST /v1/completions": Role.USER,
    "POST /v1/chat/completions": Role.USER,
    "POST /v1/embeddings": Role.USER,
    "POST /v1/responses": Role.USER,
    "POST /v1/messages": Role.USER,
    "POST /v1/messages/count_tokens": Role.USER,
    "POST /tokenize": Role.USER,
    "POST /detokenize": Role.USER,
    "POST /generate": Role.USER,
    "POST /generate_stream": Role.USER,
    "GET /v1/models": Role.USER,
    "GET /v1/models/{name:path}": Role.USER,
    "DELETE /v1/models/{name:path}": Role.UPLOADER,
    "GET /v1/adapters": Role.USER,
    "GET /v1/adapters/{name:path}": Role.USER,
    "GET /v1/adapters/{name:path}/versions": Role.USER,
    "POST /v1/adapters/{name:path}/prefetch": Role.USER,
    "POST /v1/adapters": Role.UPLOADER,
    "POST /v1/adapters/validate": Role.UPLOADER,
    "POST /v1/adapters/{name:path}/rollback": Role.UPLOADER,
    "PATCH /v1/adapters/{name:path}": Role.UPLOADER,
    "DELETE /v1/adapters/{name:path}": Role.UPLOADER,
    "POST /v1/load_lora_adapter": Role.ADMIN,
    "POST /v1/unload_lora_adapter": Role.ADMIN,
    "POST /load_lora_adapter": Role.ADMIN,
    "POST /unload_lora_adapter": Role.ADMIN,
    "GET /v1/usage": Role.USER,
    "GET /v1/keys": Role.ADMIN,
    "POST /v1/keys": Role.ADMIN,
    "DELETE /v1/keys/{key_id}": Role.ADMIN,
    "GET /v1/audit": Role.ADMIN,
    "GET /v1/pool": Role.ADMIN,
    "GET /load": Role.USER,
    "GET /version": Role.USER,
    "GET /metrics": Role.ADMIN,
}
_DOCUMENTATION: Final = frozenset({"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})


def role_check(open_paths: frozenset[str]) -> Callable[[Request], Awaitable[None]]:
    """Return the dependency of every endpoint that checks the role of whoever asks.

    A dependency, as only the router knows which endpoint a path means; a second look at the path
    could come to another answer.
    """

    async def check_role(request: Request) -> None:
        if request.scope["path"] in open_paths:
            return
        needed = ROLES.get(f"{request.method} {request.scope['route'].path}", Role.ADMIN)
        principal = principal_of(request)
        if not principal.role.includes(needed):
            raise RoleRequired(needed, principal.role)

    return check_role


def operations(routes: Iterable[BaseRoute]) -> list[str]:
    """Return what the table has entries for, of these routes.

    Any role may read the documentation, which has no dependencies; nothing else may be like it.
    """
    found: list[str] = []
    for route in routes:
        inner = getattr(route, "original_router", None)  # how FastAPI keeps what it includes
        if inner is not None:
            found += operations(inner.routes)
            continue
        is_checked = isinstance(route, APIRoute) or getattr(route, "path", "") in _DOCUMENTATION
        assert is_checked, f"nothing checks who asks for {route}"
        assert isinstance(route, Route)
        found += [
            f"{method} {route.path}" for method in sorted((route.methods or set()) - {"HEAD"})
        ]
    return found
